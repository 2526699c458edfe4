"""Random access to a file's bytes, to follow a container's structure without reading all of it."""

import os
from dataclasses import dataclass

_WINDOW = 8192  # bytes read at a time
_FAR = 1 << 20  # bytes over which a lost structure is looked for


class DamagedRecording(Exception):
    """A recording of which its own container says that something is missing; the message follows the file's name."""


@dataclass(frozen=True)
class Span:
    """One of the streams that lie one behind another in a file.

    Attributes:
        start: Its first byte.
        end: The byte behind its last.
        present: Share of what its header promises that is there; 1 where it promises nothing.
        header: What has to precede its bytes for a decoder to know how long it is.
    """

    start: int
    end: int
    present: float = 1.0
    header: bytes = b""


class Content:
    """The bytes of a file or of a byte string."""

    def __init__(self, source: bytes | int) -> None:
        """Take a byte string, or the number of an open file, whose position is left alone."""
        self._file = source if isinstance(source, int) else None
        self._window = source if isinstance(source, bytes) else b""
        self._start = 0
        self.size = os.fstat(source).st_size if isinstance(source, int) else len(source)

    def read(self, at: int, count: int) -> bytes:
        """Up to `count` bytes from byte `at`; fewer at the end.

        Raises:
            OSError: The file cannot be read.
        """
        if self._file is not None and not self._start <= at <= at + count <= self._start + len(self._window):
            self._window, self._start = os.pread(self._file, max(count, _WINDOW), at), at
        return self._window[at - self._start : at - self._start + count]

    def find(self, wanted: bytes, at: int, end: int | None = None) -> int:
        """Where `wanted` begins, looked for from `at` to `end` and at most 1 MiB far; -1 if nowhere."""
        end = min(self.size if end is None else end, at + _FAR)
        while at < end:
            found = self.read(at, min(_WINDOW, end - at)).find(wanted)
            if found >= 0:
                return at + found
            at += max(1, _WINDOW - len(wanted) + 1)
        return -1


def skip_id3(content: Content, at: int = 0) -> int:
    """Where the ID3v2 tags that begin at `at` end."""
    while (head := content.read(at, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if head[5] & 0x10 else 0)
    return at
