"""Detects truncated audio files from the structure of their containers.

Decoders return whatever samples are present. The complete length is in the header (WAV, AIFF, AU, W64, RF64, CAF, 8SVX
and NIST SPHERE), in the first frame (MP3), or follows from the pages (Ogg).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shards.media import mpeg, ogg
from shards.media.random_access import Content, Span, skip_id3

# Lengths from here on mean "unknown yet": 0x7FFFFFFF, 0xFFFFFFFF, or slightly less. SoX writes the smallest.
_STREAMED = 0x7E000000
_SLACK = 64  # bytes by which headers of complete files may be wrong, e.g. by counting themselves
_MAX_CHUNKS = 4096
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


@dataclass(frozen=True)
class Extent:
    """Extent of a file's samples in bytes, according to its header."""

    start: int
    declared: int  # by the header
    available: int  # from `start` to the end of the file

    @property
    def fraction(self) -> float:
        """Fraction of the declared bytes that is available; 1 if none or an unknown number is declared."""
        if self.declared <= self.available + _SLACK or self.declared >= _STREAMED:
            return 1.0
        return self.available / self.declared


def find_spans(content: Content) -> list[Span]:
    """Find the concatenated streams in a file; a decoder reads only the first.

    Raises:
        DamagedAudioError: Pages of an Ogg stream are missing.
        OSError: The file cannot be read.
    """
    at = skip_id3(content)
    head = content.read(at, 4)
    if head == b"OggS":
        return ogg.find_spans(content, at)
    if at or (len(head) == 4 and head[0] == 0xFF and head[1] >= 0xE0):
        return mpeg.find_spans(content, at)
    header = _unclosed_header(content, at) if head in (b"RIFF", b"RIFX") else b""
    return [Span(len(header), content.size, header=header)]


def samples_extent(content: Content) -> Extent | None:
    """Read the extent of a file's samples from its header; None for containers that do not declare it.

    Raises:
        OSError: The file cannot be read.
    """
    at = skip_id3(content)
    head = content.read(at, 12)
    magic, form = head[:4], head[8:]
    if magic in (b"RIFF", b"RF64", b"BW64", b"RIFX") and form == b"WAVE":
        return _riff_extent(content, at, "big" if magic == b"RIFX" else "little")
    if magic == b"FORM" and form in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        return _aiff_extent(content, at)
    if magic == b"riff":
        return _w64_extent(content, at)
    if magic in (b".snd", b"dns."):
        order: Literal["little", "big"] = "big" if magic == b".snd" else "little"
        start = at + int.from_bytes(head[4:8], order)
        return _extent(content, start, int.from_bytes(head[8:12], order))
    if magic == b"caff":
        return _caf_extent(content, at)
    return _sphere_extent(content) if head.startswith(b"NIST_1A") else None


def _extent(content: Content, start: int, declared: int) -> Extent:
    return Extent(start, declared, max(0, content.size - start))


def _chunks(content: Content, at: int, order: Literal["little", "big"]) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of each chunk from `at` on; chunks begin at even bytes."""
    for _ in range(_MAX_CHUNKS):
        head = content.read(at, 8)
        if len(head) < 8:
            return
        length = int.from_bytes(head[4:], order)
        yield head[:4], at + 8, length
        at += 8 + length + length % 2


def _riff_extent(content: Content, at: int, order: Literal["little", "big"]) -> Extent | None:
    long = 0  # RF64's 64-bit length
    for name, start, length in _chunks(content, at + 12, order):
        if name == b"ds64":
            long = int.from_bytes(content.read(start + 8, 8), "little")
        elif name == b"data":
            return _extent(content, start, long if length == 0xFFFFFFFF and long else length)
    return None


def _aiff_extent(content: Content, at: int) -> Extent | None:
    for name, start, length in _chunks(content, at + 12, "big"):
        if name == b"SSND":  # begins with an offset and a block size
            return _extent(content, start + 8, max(0, length - 8))
        if name == b"BODY":
            return _extent(content, start, length)
    return None


def _w64_extent(content: Content, at: int) -> Extent | None:
    at += 40  # the first chunk's GUID and length, and "wave"
    for _ in range(_MAX_CHUNKS):
        head = content.read(at, 24)
        length = int.from_bytes(head[16:], "little")  # including these 24 bytes
        if len(head) < 24 or length < 24:
            return None
        if head[:16] == _W64_DATA:
            return _extent(content, at + 24, length - 24)
        at += length + -length % 8
    return None


def _caf_extent(content: Content, at: int) -> Extent | None:
    at += 8
    for _ in range(_MAX_CHUNKS):
        head = content.read(at, 12)
        length = int.from_bytes(head[4:], "big")  # all ones if unknown
        if len(head) < 12:
            return None
        if head[:4] == b"data":  # begins with a number of edits
            return _extent(content, at + 16, max(0, length - 4))
        at += 12 + length
    return None


def _sphere_extent(content: Content) -> Extent | None:
    """Read the extent from a NIST SPHERE header, which gives the number of samples per channel."""
    head = content.read(0, 16)[8:]
    start = int(head) if head.strip().isdigit() else 1024
    header = content.read(0, min(start, 1 << 16))
    fields = dict(re.findall(rb"^(\w+) -[is]\d* (\w+)", header, re.MULTILINE))
    numbers = {name: int(value) for name, value in fields.items() if value.isdigit()}
    # Telephony codecs have one byte per sample; libsndfile writes two in the header.
    width = 1 if fields.get(b"sample_coding") in (b"ulaw", b"alaw", b"mu") else numbers.get(b"sample_n_bytes", 2)
    count = numbers.get(b"sample_count", 0) * width
    extent = _extent(content, start, count * numbers.get(b"channel_count", 1))
    # Some files count the samples of all channels together.
    return _extent(content, start, count) if abs(extent.available - count) <= _SLACK else extent


def _unclosed_header(content: Content, at: int) -> bytes:
    """Return a header with unknown lengths for a WAV that was streamed or not closed; empty for other files.

    In such a WAV both lengths, of the file and of the samples, are those of an empty file. If only that of the samples
    is 0, something else is wrong.
    """
    order: Literal["little", "big"] = "little" if content.read(at, 4) == b"RIFF" else "big"
    extent = samples_extent(content)
    if extent is None or extent.declared or not bytes_after_empty_header(content):
        return b""
    if at + int.from_bytes(content.read(at + 4, 4), order) > extent.start:
        return b""
    header = content.read(0, extent.start)
    return header[: at + 4] + b"\xff" * 4 + header[at + 8 : -4] + b"\xff" * 4


def bytes_after_empty_header(content: Content) -> int:
    """Count the bytes after a header that declares no samples, unless another chunk begins there.

    An interrupted recording leaves such a file: the samples are present, but their end is unknown.
    """
    extent = samples_extent(content)
    if extent is None or extent.declared or not extent.available:
        return 0
    name, length = (head := content.read(extent.start, 8))[:4], int.from_bytes(head[4:], "little")
    is_chunk = name.isascii() and name.decode("ascii").isprintable() and length <= extent.available
    return 0 if is_chunk else extent.available
