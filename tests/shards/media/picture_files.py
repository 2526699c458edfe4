"""Picture files byte by byte, with depths and metadata that Pillow does not write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

EXIF = b"Exif\0\0"


def picture(width=64, height=48):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=2).astype(np.uint8))


def saved(kind, image=None, **options):
    """A picture in a format of Pillow."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def directory(entries, at, order="<"):
    """A TIFF directory at an offset, and the values that do not fit into it; entries: tag, type, count, bytes."""
    values, out = b"", struct.pack(order + "H", len(entries))
    end = at + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            values, value = values + value + bytes(len(value) % 2), struct.pack(order + "I", end + len(values))
        out += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return out + bytes(4) + values


def exif(entries=(), orientation=6, order="<"):
    entries = [(274, 3, 1, struct.pack(order + "H", orientation)), *entries]
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory(entries, 8, order)


def tiff(values, kind=1, photometric=1, order="<", compressed=False, extra=None, more=()):
    """TIFF of an array [h, w] or [h, w, channels]; kind: SampleFormat (1 unsigned, 2 signed, 3 float)."""

    def short(*numbers):
        return struct.pack(f"{order}{len(numbers)}H", *numbers)

    values = values.astype(values.dtype.newbyteorder(order))
    height, width, channels = (*values.shape, 1)[:3]
    pixels = zlib.compress(values.tobytes()) if compressed else values.tobytes()
    entries = [
        (256, 3, 1, short(width)),
        (257, 3, 1, short(height)),
        (258, 3, channels, short(*[8 * values.dtype.itemsize] * channels)),
        (259, 3, 1, short(8 if compressed else 1)),
        (262, 3, 1, short(photometric)),
        (273, 4, 1, struct.pack(order + "I", 8)),
        (277, 3, 1, short(channels)),
        (278, 3, 1, short(height)),
        (279, 4, 1, struct.pack(order + "I", len(pixels))),
        (339, 3, channels, short(*[kind] * channels)),
    ]
    entries += [(338, 3, 1, short(extra))] if extra is not None else []
    pixels += bytes(len(pixels) % 2)
    first = 8 + len(pixels)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", first)
    return start + pixels + directory([*entries, *more], first, order)


def chunk(name, data, right=True):
    checksum = zlib.crc32(name + data) ^ (not right)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(values, bits, colour, transparent=None):
    """PNG of an array [h, w] or [h, w, channels] of 1 to 16 bits; transparent: the levels that tRNS names."""
    height, width = values.shape[:2]
    lines = values.reshape(height, -1)
    if bits == 16:
        lines = lines.astype(">u2").view(np.uint8)
    elif bits < 8:
        spread = lines.reshape(height, -1, 8 // bits) << np.arange(8 - bits, -1, -bits)
        lines = spread.sum(axis=2)
    pixels = b"".join(b"\0" + line.astype(np.uint8).tobytes() for line in lines)
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    if transparent is not None:
        chunks.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")])


def jpeg_with(*segments):
    """JPEG with segments, each a marker's number and its payload."""
    data = saved("JPEG")
    inserted = (b"\xff" + bytes([kind]) + struct.pack(">H", len(load) + 2) + load for kind, load in segments)
    return data[:2] + b"".join(inserted) + data[2:]


def png_with(*chunks, last=False):
    """PNG with more chunks, before or after the pixels."""
    data = saved("PNG")
    at = len(data) - 12 if last else 33
    return data[:at] + b"".join(chunks) + data[at:]


def webp_with(*chunks):
    """WebP with more chunks, each a name and its payload."""
    flags = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
    header = bytes([sum(flags.get(name, 0) for name, _ in chunks), 0, 0, 0]) + bytes([63, 0, 0, 47, 0, 0])
    pixels = saved("WEBP", lossless=True)[12:]
    inserted = [name + struct.pack("<I", len(load)) + load + bytes(len(load) % 2) for name, load in chunks]
    profile = [part for part in inserted if part.startswith(b"ICCP")]
    others = [part for part in inserted if not part.startswith(b"ICCP")]
    body = b"".join([b"WEBPVP8X", struct.pack("<I", 10), header, *profile, pixels, *others])
    return b"RIFF" + struct.pack("<I", len(body)) + body
