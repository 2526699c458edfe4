"""Sequential reading of a tar as untrusted input: nothing is extracted, and memory is bounded for any header."""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from shards.reading.reader import MAX_MEMBER
from shards.tars.members import DamagedTar, parse_header

_BLOCK = 1 << 20
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
    tarfile.SOLARIS_XHDTYPE: "an extended header",
}


@dataclass(frozen=True)
class Member:
    """A regular file in a tar; `data` is None if it is larger than `MAX_MEMBER`."""

    name: str
    offset: int  # of its data
    size: int  # bytes
    data: bytes | None


class TarScan:
    """Read a tar file once and compute its checksum."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """Start at the beginning of a file of `size` bytes."""
        self._file, self._size, self._position = file, size, 0
        self._digest = hashlib.sha256()

    def members(self) -> Iterator[Member]:
        """Yield the members in order, up to the end of the archive.

        Raises:
            DamagedTar: There is a damaged header, a member that is not a regular file or ends beyond the file, or data
                after the end. Members yielded before are valid.
        """
        while True:
            start = self._position
            if (info := parse_header(self._read(tarfile.BLOCKSIZE), start)) is None:
                break
            name = repr(info.name)
            if not 0 <= info.size <= self._size - self._position:
                raise DamagedTar(f"member {name} at byte {start:,} claims {info.size:,} bytes, more than the file has")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                kind = _KINDS.get(info.type, f"of unknown type {info.type!r}")
                raise DamagedTar(f"member {name} at byte {start:,} is {kind}, not a regular file")
            offset = self._position
            data = self._read(info.size) if info.size <= MAX_MEMBER else None
            self._skip(-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE - (self._position - offset))
            yield Member(info.name, offset, info.size, data)
        while block := self._read(_BLOCK):
            if block.count(0) < len(block):
                raise DamagedTar(f"there are bytes after the end of the archive (near byte {self._position:,})")

    def sha256(self) -> str:
        """Return the SHA-256 of the file, after reading the rest of it."""
        self._skip(self._size)
        return self._digest.hexdigest()

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._digest.update(data)
        self._position += len(data)
        return data

    def _skip(self, count: int) -> None:
        while count > 0 and (block := self._read(min(count, _BLOCK))):
            count -= len(block)
