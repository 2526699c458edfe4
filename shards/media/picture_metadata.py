"""Metadata of pictures: orientation is applied, and anything else can be removed if it prevents decoding."""

import struct
from collections.abc import Iterator
from contextlib import suppress

from PIL import ExifTags, Image

# EXIF orientation -> operation that turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_EXIF = b"Exif\0\0"

# JPEG segments that define the color encoding (JFIF and Adobe) -> smallest size of a complete one.
_JPEG_KEPT = {0xE0: 16, 0xEE: 14}

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")

# TIFF tags for the location and encoding of pixels, and Orientation.
_TIFF_KEPT = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332,
              338, 339, 347, *range(512, 522), *range(529, 533)}  # fmt: skip


def upright(image: Image.Image, exif: bytes | None = None) -> Image.Image:
    """Turn a loaded picture upright according to its orientation, if that can be read.

    Args:
        image: The picture as stored.
        exif: The EXIF block, if `image` was opened without it.
    """
    turn = _UPRIGHT.get(_orientation(image, exif))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, exif: bytes | None) -> int:
    block = exif if exif is not None else image.info.get("exif") or b""
    for tags in (
        lambda: image.getexif() if exif is None else _tags(exif),
        # Another tag may have caused the error; an EXIF block is a TIFF file without pixels.
        lambda: _tags(_strip_tiff(block[len(_EXIF) * block.startswith(_EXIF) :])),
    ):
        with suppress(Exception):  # readers of EXIF and XMP raise almost any type
            value = tags().get(ExifTags.Base.Orientation)
            if value in _UPRIGHT:
                return int(value)
    return 1


def _tags(block: bytes) -> Image.Exif:
    tags = Image.Exif()
    tags.load(block)
    return tags


def without_metadata(data: bytes) -> tuple[bytes, bytes | None] | None:
    """Remove from a JPEG, PNG, WebP or TIFF file everything that Pillow does not need for the pixels.

    Returns:
        The file without metadata, and its EXIF block if it had one (a TIFF file keeps its orientation); None for other
        formats and damaged files.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _strip_jpeg(data)
        if data[:8] == _PNG:
            return _strip_chunks(data, _PNG, _png_chunks(data), _PNG_KEPT)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _strip_webp(data)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _strip_tiff(data), None
    except (struct.error, IndexError, ValueError):
        pass
    return None


def _strip_jpeg(data: bytes) -> tuple[bytes, bytes | None]:
    kept, exif, at = [data[:2]], None, 2
    while at < len(data):
        if data[at] != 0xFF:
            raise ValueError("no marker")
        kind = data[at + 1]
        if kind == 0xFF:  # fill
            at += 1
            continue
        if kind == 0xDA:  # the pixels
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xE1 and data.startswith(_EXIF, at + 4):
            exif = exif or data[at + 4 : end]
        elif not (0xE0 <= kind <= 0xEF or kind == 0xFE) or end - at - 2 >= _JPEG_KEPT.get(kind, len(data)):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), exif


def _strip_chunks(
    data: bytes, start: bytes, chunks: Iterator[tuple[bytes, int, int, int]], wanted: tuple[bytes, ...]
) -> tuple[bytes, bytes | None]:
    kept, exif = [start], None
    for name, at, payload, end in chunks:
        if name in wanted:
            kept.append(data[at:end])
        elif name in (b"eXIf", b"EXIF"):
            size = int.from_bytes(data[at : at + 4], "big") if name == b"eXIf" else None
            exif = data[payload : payload + size] if size is not None else data[payload:end]
    return b"".join(kept), exif


def _strip_webp(data: bytes) -> tuple[bytes, bytes | None]:
    stripped, exif = _strip_chunks(data, data[:12], _webp_chunks(data), _WEBP_KEPT)
    if stripped[12:16] == b"VP8X":  # clear the flags for profile, EXIF and XMP
        stripped = stripped[:20] + bytes([stripped[20] & ~0x2C]) + stripped[21:]
    return stripped[:4] + struct.pack("<I", len(stripped) - 8) + stripped[8:], exif


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield name, start, start of the payload, and end of each chunk."""
    at = 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, at + 8, end
        at = end


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        yield data[at : at + 4], at, at + 8, end
        at = end


def _strip_tiff(data: bytes) -> bytes:
    """Keep only the first directory, in place, with its entries for pixels and orientation."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2] == 43 or data[3] == 43:  # BigTIFF
        first, count_form, entry_size, offset_form = struct.unpack_from(order + "Q", data, 8)[0], "Q", 20, "Q"
    else:
        first, count_form, entry_size, offset_form = struct.unpack_from(order + "I", data, 4)[0], "H", 12, "I"
    (count,) = struct.unpack_from(order + count_form, data, first)
    begin = first + struct.calcsize("<" + count_form)
    entries = [data[begin + n * entry_size : begin + (n + 1) * entry_size] for n in range(min(count, 4096))]
    kept = [
        entry
        for entry in entries
        if len(entry) == entry_size and struct.unpack(order + "H", entry[:2])[0] in _TIFF_KEPT
    ]
    directory = struct.pack(order + count_form, len(kept)) + b"".join(kept) + struct.pack(order + offset_form, 0)
    return data[:first] + directory + data[first + len(directory) :]
