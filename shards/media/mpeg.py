"""MPEG audio (MP3): compares the number of frames with the header's, and splits files that were concatenated.

Only Xing, Info and VBRI headers, which most encoders write into a first, silent frame, declare a number of frames. A
file without one may end anywhere, even within a frame, as many complete files do. If its bit rate varies, libsndfile
estimates its length from the first frame and stops there: such a file is given a header.
"""

import struct
from dataclasses import dataclass

from shards.media.random_access import Content, Span, skip_id3

_RATES = ((11025, 12000, 8000), None, (22050, 24000, 16000), (44100, 48000, 32000))  # Hz, by version
_KBITS = {  # by whether it is MPEG-1, and by layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_NEAR = 1 << 16  # bytes within which the first frame begins
_ALL = 1 << 62  # frames
_JOINED = 8  # consecutive frames after the declared ones that count as another stream, not as encoder padding


def find_spans(content: Content, at: int) -> list[Span]:
    """Find the streams that were concatenated behind the tags, each with the fraction of its frames that is present."""
    spans: list[Span] = []
    start, first = 0, _find_frame(content, at, at + _NEAR)
    while first >= 0:
        declared = _declared_frames(content, first)
        frames = _count_frames(content, first, declared or _ALL)
        if not declared:
            header = _xing_frame(content.read(first, 4), frames.count + 1) if frames.variable else b""
            spans.append(Span(first if header else start, content.size, header=header))
            break
        spans.append(Span(start, frames.end, frames.count / declared))
        start = first = _joined_frame(content, frames.end)
    return spans or [Span(0, content.size)]


def _frame_bytes(header: bytes) -> int:
    """Return the length of the frame with this 4-byte header; 0 if it is invalid or does not determine a length."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    rates, kbits, rate = _RATES[version], header[2] >> 4, header[2] >> 2 & 3
    if rates is None or layer == 4 or not 0 < kbits < 15 or rate == 3:
        return 0
    bits = 1000 * _KBITS[version == 3, layer][kbits - 1]
    padding = header[2] >> 1 & 1
    if layer == 1:
        return 4 * (12 * bits // rates[rate] + padding)
    return (72 if layer == 3 and version != 3 else 144) * bits // rates[rate] + padding


def _kind(header: bytes) -> tuple[int, int]:
    """Return version, layer and sampling rate bits, which are equal in all frames of a stream."""
    return header[1] & 0xFE, header[2] & 0x0C


def _find_frame(content: Content, at: int, end: int, kind: tuple[int, int] | None = None) -> int:
    """Find the first frame from `at` on that is followed by a frame of its kind or the end of the file; -1 if none."""
    while (at := content.find(b"\xff", at, end)) >= 0:
        header = content.read(at, 4)
        length = _frame_bytes(header)
        if length and kind in (None, _kind(header)):
            following = content.read(at + length, 4)
            if at + length == content.size or (_frame_bytes(following) and _kind(following) == _kind(header)):
                return at
        at += 1
    return -1


def _declared_frames(content: Content, at: int) -> int:
    """Return the number of frames declared after a stream's first; 0 if there is no such header."""
    tag = at + 4 + _side_bytes(content.read(at, 4))
    for start in (tag, tag + 2):  # with or without a checksum before it
        head = content.read(start, 12)
        if head[:4] in (b"Xing", b"Info") and head[7] & 1:
            return int.from_bytes(head[8:12], "big")
    head = content.read(at + 36, 18)
    return int.from_bytes(head[14:], "big") if head[:4] == b"VBRI" else 0


@dataclass(frozen=True)
class _Frames:
    count: int  # complete frames after the first
    end: int  # index of the byte after the last
    variable: bool  # whether the bit rate varies


def _count_frames(content: Content, first: int, declared: int) -> _Frames:
    """Count the frames of a stream, up to the declared number.

    One frame may be missing, since some encoders count the first frame too; but not if there are gaps between frames,
    which mean that bytes were lost.
    """
    header = content.read(first, 4)
    kind, lengths = _kind(header), {header[:3]: _frame_bytes(header)}
    previous, at, count, gaps = first, first + lengths[header[:3]], 0, 0
    while count < declared:
        header = content.read(at, 4)
        if (length := lengths.get(header[:3], -1)) < 0:
            length = lengths[header[:3]] = _frame_bytes(header) if len(header) == 4 and _kind(header) == kind else 0
        if length and at + length <= content.size:
            previous, at, count = at, at + length, count + 1
            continue
        resumed = _find_frame(content, previous + 1, content.size, kind)
        if resumed < 0:
            break
        gaps += 1
        # If it begins within the previous frame, that one is incomplete.
        previous, at, count = resumed, resumed, count - (resumed < at and previous != first)
    if not gaps and declared - count <= 1:
        count = declared
    return _Frames(count, at, len({header[2] >> 4 for header, length in lengths.items() if length}) > 1)


def _xing_frame(header: bytes, frames: int) -> bytes:
    """Build a silent frame that declares the number of frames after it, from the header of one of them."""
    header = bytes([header[0], header[1] | 1, 0x80 | header[2] & 0x0C, header[3]])  # no checksum, room for the tag
    head = header + bytes(_side_bytes(header)) + b"Xing" + struct.pack(">II", 1, frames)
    return head.ljust(_frame_bytes(header), b"\0")


def _side_bytes(header: bytes) -> int:
    """Return the length of the side information between a frame's header and a Xing tag."""
    mono, mpeg1 = header[3] >> 6 == 3, header[1] >> 3 & 3 == 3
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)


def _joined_frame(content: Content, at: int) -> int:
    """Find the first frame of another stream after the end of one; -1 if there is none."""
    if content.read(at, 3) == b"TAG":  # ID3v1
        at += 128
    at = first = skip_id3(content, at)
    for _ in range(_JOINED):
        length = _frame_bytes(content.read(at, 4))
        if not length or at + length > content.size:
            return -1
        at += length
    return first
