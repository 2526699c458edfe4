"""The members of a tar, listed as untrusted input: nothing is extracted, and memory is bounded for any header.

Offsets are kept rather than contents, so that a member is read later and by any process. Names in extended headers
(pax, GNU) are understood, since `tarfile` and `tar` write them; sparse members are not.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from shards.errors import TransientError, UserError
from shards.remote import BLOCK, Remote, is_url
from shards.stored import StoredFile

MAX_SOURCE = 1 << 28  # bytes; a larger picture or audio file is refused
MAX_TEXT = 1 << 20  # bytes of a text or JSON, and of an extended header
_MAX_NAME = 4096  # characters
_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]{1,256})=")  # of a pax header
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_GLOBAL, _LOCAL = (tarfile.XGLTYPE,), (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True)
class TarMember(StoredFile):
    """A regular file in a tar."""

    container: str
    name: str
    offset: int  # of its data in the tar
    size: int
    container_bytes: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """Read it; see `StoredFile`."""
        if is_url(self.container):
            folder, _, name = self.container.rpartition("/")
            return _remote(folder).read_range(name, self.offset, self.size)
        try:
            with open(self.container, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except FileNotFoundError:
            raise UserError(f"{self.container} is missing") from None
        except OSError as error:
            raise TransientError(f"{self} cannot be read: {error.strerror}; check the disk") from None
        if len(data) < self.size:
            raise UserError(f"{self.container} is shorter than when it was listed: run the same command again")
        return data


@dataclass
class TarListing:
    """The members of a tar, in order."""

    members: list[TarMember] = field(default_factory=list)  # regular files
    # Contents of the members of text, by index in `members`.
    texts: dict[int, bytes] = field(default_factory=dict)
    problem: str | None = None  # why the tar cannot be parsed beyond the last member; None if it is intact


class DamagedTar(Exception):
    """The tar cannot be parsed beyond this point."""


def list_tar(location: str, is_text: Callable[[str], bool] = lambda name: False) -> TarListing:
    """List the members of a tar.

    Args:
        location: Absolute path, or URL.
        is_text: Whether the content of a member with this name is read too; those of more than 1 MiB are not.

    Raises:
        UserError: The tar is missing or cannot be opened.
        TransientError: The network does not respond.
    """
    if is_url(location):
        folder, _, name = location.rpartition("/")

        def scan(system: Any, path: str) -> TarListing:
            with system.open(path, "rb", block_size=BLOCK) as file:
                return _list(file, location, file.seek(0, os.SEEK_END), is_text)

        return _remote(folder).with_retries(name, scan)
    path = Path(location)
    try:
        if not path.is_file():  # opening a pipe would block
            raise UserError(f"{path} {'is not a regular file' if path.exists() else 'is missing'}")
        with open(path, "rb") as file:
            return _list(file, location, os.fstat(file.fileno()).st_size, is_text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=8)
def _remote(folder: str) -> Remote:
    return Remote(folder)


def _list(file: IO[bytes], location: str, size: int, is_text: Callable[[str], bool]) -> TarListing:
    listing = TarListing()
    try:
        for name, offset, length in _regular_files(file, size):
            if is_text(name) and length <= MAX_TEXT:
                file.seek(offset)
                listing.texts[len(listing.members)] = file.read(length)
            listing.members.append(TarMember(location, name, offset, length, size))
    except DamagedTar as damage:
        listing.problem = str(damage)
    return listing


def _regular_files(file: IO[bytes], size: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and bytes of the regular files; folders, links and devices are passed over.

    Raises:
        DamagedTar: A header is damaged, or a member ends beyond the file.
    """
    position, extended = 0, dict[bytes, bytes]()
    while (info := parse_header(_block(file, position), position)) is not None:
        start, position = position, position + tarfile.BLOCKSIZE
        length, name = info.size, info.name
        if b"size" in extended and extended[b"size"].isdigit():
            length = int(extended[b"size"][:19])
        if b"path" in extended:
            name = extended[b"path"].decode("utf-8", "backslashreplace")
        if not 0 <= length <= size - position:
            name = repr(name[:_MAX_NAME])
            raise DamagedTar(f"member {name} at byte {start:,} claims {length:,} bytes, more than the file has")
        if info.type in (*_GLOBAL, *_LOCAL, *_LONG):
            payload = _payload(file, position, length)
            if info.type in _LOCAL:
                extended |= _pax_records(payload, start)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended[b"path"] = payload.split(b"\0")[0]
        else:
            if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse") for key in extended):
                raise DamagedTar(f"member {name[:_MAX_NAME]!r} at byte {start:,} is sparse: pack the tar again")
            if info.type in _REGULAR:
                if len(name) > _MAX_NAME:
                    raise DamagedTar(f"the name of the member at byte {start:,} has {len(name):,} characters")
                yield name, position, length
            elif info.type in tarfile.SUPPORTED_TYPES:  # a folder, a link or a device
                length = 0  # whatever the header says
            extended = {}
        position += -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def parse_header(block: bytes, position: int) -> tarfile.TarInfo | None:
    """Parse the header block at a position; None at the end of the archive.

    Raises:
        DamagedTar: The block is not a header.
    """
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
        raise DamagedTar("it ends without the end-of-archive marker: it is empty or truncated") from None
    except (tarfile.HeaderError, ValueError) as error:
        compressed = block.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))
        hint = ": it is compressed, unpack it first, e.g. gunzip X.tar.gz" if compressed and not position else ""
        raise DamagedTar(f"the header at byte {position:,} is damaged ({error}){hint}") from None


def _block(file: IO[bytes], position: int) -> bytes:
    file.seek(position)
    return file.read(tarfile.BLOCKSIZE)


def _payload(file: IO[bytes], position: int, length: int) -> bytes:
    if length > MAX_TEXT:
        raise DamagedTar(f"the extended header at byte {position:,} has {length:,} bytes, the limit is {MAX_TEXT:,}")
    file.seek(position)
    return file.read(length)


def _pax_records(data: bytes, start: int) -> dict[bytes, bytes]:
    """Parse the records of a pax header: LENGTH KEY=VALUE and a line feed each."""
    records, position = {}, 0
    while position < len(data) and data[position]:
        match = _RECORD.match(data, position)
        if not match or not match.end() < position + int(match[1]) <= len(data):
            raise DamagedTar(f"the extended header at byte {start:,} is damaged")
        records[match[2]] = data[match.end() : position + int(match[1]) - 1]
        position += int(match[1])
    return records
