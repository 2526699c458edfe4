"""Ogg pages (RFC 3533): checks that a stream is complete, and makes encoded bytes reproducible.

A page has 27 bytes of header, then the table of its segments' lengths, then the segments. Of the header: flags at 5,
the stream's serial number at 14, the page's number in the stream at 18, the checksum at 22, the table's length at 26.
"""

import struct
import zlib

from shards.media.random_access import Content, DamagedAudioError, Span

_HEADER = 27
_FIRST, _LAST = 2, 4  # flags of a stream's first and last page
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_REPAIR = "fetch the file again, or rewrite it if no more is available, e.g. ffmpeg -i X.ogg X.flac"


def find_spans(content: Content, at: int) -> list[Span]:
    """Find the chained streams from the page at `at` on; multiplexed streams form one span.

    Raises:
        DamagedAudioError: A page is missing or damaged, also the last one of a stream.
    """
    starts: list[int] = []
    numbers: dict[int, int] = {}  # latest page number of each open stream
    beginning = False
    while at < content.size:
        page = _page(content, at)
        if not page:
            following = content.find(b"OggS", at + 1)
            if numbers:
                raise DamagedAudioError(_damage(at, following))
            if following < 0:
                break
            at = following
            continue
        flags, serial, number = page[5], *struct.unpack_from("<II", page, 14)
        if flags & _FIRST:
            if not beginning:
                if numbers:
                    raise DamagedAudioError(_damage(at, -1))
                starts.append(at)
        elif serial in numbers and number != (numbers[serial] + 1) % (1 << 32):
            raise DamagedAudioError(_damage(at, at))
        beginning = bool(flags & _FIRST)
        if flags & _FIRST or serial in numbers:
            numbers[serial] = number
        if flags & _LAST:
            numbers.pop(serial, None)
        at += len(page)
    if numbers:
        raise DamagedAudioError(_damage(content.size, -1))
    return [Span(start, end) for start, end in zip(starts, [*starts[1:], content.size], strict=True)]


def _damage(at: int, following: int) -> str:
    if following < 0:
        return f"truncated: its Ogg stream ends before its last page, at byte {at:,}: {_REPAIR}"
    return f"damaged: bytes of its Ogg stream are missing or changed at byte {at:,}: {_REPAIR}"


def _page(content: Content, at: int) -> bytes:
    """Return the page that begins at a byte; empty if there is none, or it is incomplete or fails its checksum."""
    head = content.read(at, _HEADER + 255)
    if len(head) < _HEADER or head[:4] != b"OggS":
        return b""
    table = head[_HEADER : _HEADER + head[26]]
    length = _HEADER + len(table) + sum(table)
    page = content.read(at, length)
    complete = len(table) == head[26] and len(page) == length
    return page if complete and page[22:26] == _checksum(page) else b""


def with_serial_zero(stream: bytes) -> bytes:
    """Set the serial number of all pages to 0, so that the bytes do not depend on the clock as libsndfile's do.

    Args:
        stream: A complete Ogg stream.
    """
    pages, at = [], 0
    while at < len(stream):
        segments = stream[at + 26]
        end = at + _HEADER + segments + sum(stream[at + _HEADER : at + _HEADER + segments])
        page = stream[at : at + 14] + bytes(4) + stream[at + 18 : end]
        pages.append(page[:22] + _checksum(page) + page[26:])
        at = end
    return b"".join(pages)


def _checksum(page: bytes) -> bytes:
    """Compute a page's checksum, ignoring the stored one.

    Ogg's CRC-32 is bit-reversed with respect to zlib's, starts from 0 and is not inverted at the end.
    """
    blank = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(blank.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return struct.pack("<I", int(f"{crc:032b}"[::-1], 2))
