"""Random access to the bytes of a file, to parse a container without reading all of it."""

import os
from dataclasses import dataclass

_WINDOW = 8192  # bytes read at a time
_FAR = 1 << 20  # bytes searched for the next structure after damage


class DamagedAudioError(Exception):
    """Parts of an audio file are missing according to its container; the message follows the file's name."""


@dataclass(frozen=True)
class Span:
    """One of the concatenated streams of a file."""

    start: int  # first byte
    end: int  # one past the last byte
    fraction: float = 1.0  # fraction of the declared length that is present; 1 if none is declared
    header: bytes = b""  # bytes to prepend so that a decoder can determine the length


class Content:
    """The bytes of a file or of a byte string."""

    def __init__(self, source: bytes | int) -> None:
        """Wrap a byte string, or the descriptor of an open file, whose position is not changed."""
        self._file = source if isinstance(source, int) else None
        self._window = source if isinstance(source, bytes) else b""
        self._start = 0
        self.size = os.fstat(source).st_size if isinstance(source, int) else len(source)

    def read(self, at: int, count: int) -> bytes:
        """Return up to `count` bytes from index `at`; fewer at the end.

        Raises:
            OSError: The file cannot be read.
        """
        if self._file is not None and not self._start <= at <= at + count <= self._start + len(self._window):
            self._window, self._start = os.pread(self._file, max(count, _WINDOW), at), at
        return self._window[at - self._start : at - self._start + count]

    def find(self, wanted: bytes, at: int, end: int | None = None) -> int:
        """Return the index of `wanted` between `at` and `end`, searching at most 1 MiB; -1 if absent."""
        end = min(self.size if end is None else end, at + _FAR)
        while at < end:
            offset = self.read(at, min(_WINDOW, end - at)).find(wanted)
            if offset >= 0:
                return at + offset
            at += max(1, _WINDOW - len(wanted) + 1)
        return -1


def skip_id3(content: Content, at: int = 0) -> int:
    """Return the end of the ID3v2 tags that begin at `at`."""
    while (head := content.read(at, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if head[5] & 0x10 else 0)
    return at
