"""A bounded folder on the node's own disk that holds whole remote shards, shared by all processes of the node.

    SHA256.tar    a whole shard, checked; readers hold a shared lock (flock) on it while it is open
    SHA256.part   a shard on its way; its downloader holds an exclusive lock on it, and who else wants it waits for a
                  shared one, which comes with the end of the download or of the downloader
    lock          held while room is made and names change

A shard goes by its checksum, so data sets share what they have in common and a changed shard is another one. A part
takes its full size on the disk before a byte of it is fetched: what the files take together is what is counted, and it
never passes the bound. Room is made by removing what was opened longest ago and is not open. The kernel lets go of a
process's locks when it ends, in whatever way: a part without a lock is what a killed download left.
"""

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import UserError
from shards.manifest import ShardInfo
from shards.remote import Remote

_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Cache:
    """The cache as one process sees it; nothing but the folder is shared."""

    def __init__(self, folder: Path | str, gigabytes: float = 100.0) -> None:
        """Make the folder if it is not there.

        Args:
            folder: On a disk of this node, used by nothing else.
            gigabytes: Bound of what it holds, 1 GB = 10^9 bytes.

        Raises:
            UserError: The folder cannot be made, or its disk knows no locks.
        """
        self.folder, self.bound = Path(folder), int(gigabytes * 1e9)
        self.notices: list[str] = []  # lines for the user, taken by who prints them
        with self._errors_told():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass

    def open(self, remote: Remote, info: ShardInfo) -> int | None:
        """Open a shard for reading, fetching it first if it is not there.

        Returns:
            A descriptor that holds the shard in the cache until it is closed; None: there is no room for it.

        Raises:
            UserError: The shard is missing, or not the one that its manifest describes; or the folder cannot be used.
        """
        whole, part = self._paths(info)
        with self._errors_told():
            while True:
                if (found := _open_whole(whole)) is not None:
                    return found
                if (claimed := _claim(part, wait=True)) is None:
                    continue  # someone else has fetched it, or failed to
                if whole.exists():
                    _release(claimed, part)
                elif not self._fetch_or_clean_up(remote, info, claimed):
                    self._say_full()
                    return None
        return None

    def prefetch(self, remote: Remote, info: ShardInfo) -> None:
        """Fetch a shard that is neither there nor on its way.

        Raises:
            UserError: As `open`.
        """
        whole, part = self._paths(info)
        with self._errors_told():
            if whole.exists() or (claimed := _claim(part, wait=False)) is None:
                return
            if whole.exists():
                _release(claimed, part)
            else:
                self._fetch_or_clean_up(remote, info, claimed)

    def _paths(self, info: ShardInfo) -> tuple[Path, Path]:
        return self.folder / f"{info.sha256}.tar", self.folder / f"{info.sha256}.part"

    def _fetch_or_clean_up(self, remote: Remote, info: ShardInfo, descriptor: int) -> bool:
        """Turn a claimed part into a whole shard, or leave nothing of it because there is no room."""
        whole, part = self._paths(info)
        try:
            if self._make_room(descriptor, info.bytes):
                self._fetch(remote, info, descriptor)
                with self._locked():  # or who counts what is there might see neither name, or both
                    os.rename(part, whole)
                os.close(descriptor)
                return True
        except BaseException:
            _release(descriptor, part)
            raise
        _release(descriptor, part)
        return False

    def _fetch(self, remote: Remote, info: ShardInfo, descriptor: int) -> None:
        """Copy a shard into its part and check it; what arrives otherwise is fetched once more."""

        def copy(*_: object) -> str:
            """Fill the part from its beginning; say what is wrong with it, nothing if it is the shard."""
            digest, received = hashlib.sha256(), 0
            os.lseek(descriptor, 0, os.SEEK_SET)
            for block in remote.blocks(info.name):
                received += len(block)
                if received > info.bytes:
                    return f"has more than the {info.bytes:,} bytes"
                digest.update(block)
                _write(descriptor, block)
            if received < info.bytes:
                return f"has {received:,} bytes, not the {info.bytes:,}"
            return "" if digest.hexdigest() == info.sha256 else "has not the checksum"

        for _ in range(2):
            try:
                problem = remote.patiently(info.name, copy)
            except _WriteError as error:
                raise error.cause from None
            if not problem:
                os.fsync(descriptor)
                return
        raise UserError(f"{remote.address(info.name)} {problem} of its manifest: make the shards again")

    def _make_room(self, descriptor: int, size: int) -> bool:
        """Give a claimed part its size on the disk, at the cost of shards that were opened longest ago."""
        if size > self.bound:
            return False
        with self._locked():
            os.ftruncate(descriptor, 0)  # what a killed download left
            used, shards = self._survey()
            while used + size > self.bound or not _reserved(descriptor, size):
                freed = 0
                while shards and not freed:
                    freed = _evict(shards.pop())
                if not freed:
                    return False
                used -= freed
        return True

    def _survey(self) -> tuple[int, list[Path]]:
        """Bytes held, and the whole shards, those opened longest ago last; left parts are removed."""
        used, opened = 0, []
        for path in list(self.folder.iterdir()):
            if not _OURS.fullmatch(path.name):
                continue
            if path.suffix == ".part" and (left := _claim(path, wait=False, create=False)) is not None:
                if os.fstat(left).st_size:  # one without a size is about to ask for room
                    path.unlink(missing_ok=True)
                os.close(left)
            with suppress(FileNotFoundError):
                status = path.stat()
                used += status.st_size
                if path.suffix == ".tar":
                    opened.append((status.st_mtime_ns, path))
        return used, [path for _, path in sorted(opened, reverse=True)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Tell of a full disk, without which the run goes on; whatever else is wrong with the folder ends it."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise UserError(
                    f"--data.cache {self.folder} cannot be used: {error.strerror}; name a folder on a disk of this "
                    "machine"
                ) from None
            self._say_full()

    def _say_full(self) -> None:
        line = (
            f"no room in {self.folder}: all that it may hold (--data.cache_gb {self.bound / 1e9:g}) is in use or its "
            "disk is full; what finds no room is read from afar, which is slow"
        )
        if line not in self.notices:
            self.notices.append(line)


class _WriteError(UserError):
    """The disk failed, not the network: asking the network again does not help."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _write(descriptor: int, block: bytes) -> None:
    left = memoryview(block)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise _WriteError(error) from None


def _open_whole(path: Path) -> int | None:
    """Open a cached shard and lock it against removal; the file's time says when that was."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # removed just before it was locked
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _claim(part: Path, wait: bool, create: bool = True) -> int | None:
    """Open a part and lock it.

    Returns:
        A descriptor, or None: another process has the lock (or had it, if this one waited), or the file is gone.
    """
    try:
        descriptor = os.open(part, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(part)):
            return descriptor
    except FileNotFoundError:
        pass  # fetched or given up between the opening and the lock
    except BlockingIOError:
        if wait:  # not for an exclusive lock: readers of the whole shard, which is this file, would keep it from us
            fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.close(descriptor)
    return None


def _release(descriptor: int, part: Path) -> None:
    """Give a claimed part up."""
    try:
        part.unlink(missing_ok=True)
    finally:  # or who waits for the lock would wait for ever
        os.close(descriptor)


def _reserved(descriptor: int, size: int) -> bool:
    """Whether the disk has room for a part, which it then has for certain."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _FULL:
            os.ftruncate(descriptor, 0)
            return False
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: it is counted all the same
    return True


def _evict(path: Path) -> int:
    """Remove a shard that nobody has open; gives the bytes that this freed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return os.fstat(descriptor).st_size
    except (BlockingIOError, FileNotFoundError):
        return 0
    finally:
        os.close(descriptor)
