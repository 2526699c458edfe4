"""A tar read from front to back as untrusted input: nothing is extracted, no header can make it take much memory."""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from shards.reading.reader import MAX_MEMBER

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


class DamagedTar(Exception):
    """The tar cannot be followed beyond this point."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar; `data` is None where it is larger than `MAX_MEMBER`."""

    name: str
    offset: int  # of its data
    size: int  # bytes
    data: bytes | None


class TarScan:
    """One pass over a tar file, which also takes its checksum."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """Begin at the start of a file of `size` bytes."""
        self._file, self._size, self._at = file, size, 0
        self._digest = hashlib.sha256()

    def members(self) -> Iterator[Member]:
        """Give the members in order, up to the end of the archive and no byte further.

        Raises:
            DamagedTar: a damaged header, a member that is no regular file or ends beyond the file, or bytes after the
                end. What was given before stands.
        """
        while True:
            start = self._at
            info = self._header()
            if info is None:
                break
            name = repr(info.name)
            if not 0 <= info.size <= self._size - self._at:
                raise DamagedTar(f"member {name} at byte {start:,} claims {info.size:,} bytes, more than the file has")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                kind = _KINDS.get(info.type, f"of unknown type {info.type!r}")
                raise DamagedTar(f"member {name} at byte {start:,} is {kind}, not a regular file")
            offset = self._at
            data = self._read(info.size) if info.size <= MAX_MEMBER else None
            self._skip(-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE - (self._at - offset))
            yield Member(info.name, offset, info.size, data)
        while block := self._read(_BLOCK):
            if block.count(0) < len(block):
                raise DamagedTar(f"there are bytes after the end of the archive (near byte {self._at:,})")

    def sha256(self) -> str:
        """Checksum of the whole file; reads what is left of it."""
        self._skip(self._size)
        return self._digest.hexdigest()

    def _header(self) -> tarfile.TarInfo | None:
        """Read the next header; None: the end of the archive."""
        start = self._at
        block = self._read(tarfile.BLOCKSIZE)
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise DamagedTar("it ends without the mark of an archive's end") from None
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTar(f"the header at byte {start:,} is damaged ({error})") from None

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._digest.update(data)
        self._at += len(data)
        return data

    def _skip(self, count: int) -> None:
        while count > 0 and (block := self._read(min(count, _BLOCK))):
            count -= len(block)
