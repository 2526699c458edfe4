"""A bounded folder on the node's local disk that caches remote shards, shared by all processes of the node.

    SHA256.tar    a complete, verified shard; readers hold a shared lock (flock) on it while it is open
    SHA256.part   a shard being downloaded; the downloader holds an exclusive lock, and other processes wait for a
                  shared one, which they get when the download or the downloader ends
    lock          held while shards are evicted and files are renamed

Shards are named by checksum, so that data sets share common shards and a changed shard is a new one. A download
reserves its full size on the disk before the first byte, so the total size of the files never exceeds the bound. The
least recently opened shards that no process has open are evicted. The kernel releases a process's locks however it
ends: a part without a lock was left by a killed download.
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

_CACHE_FILE = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Cache:
    """One process's access to the cache; processes share only the folder."""

    def __init__(self, folder: Path | str, gigabytes: float = 100.0) -> None:
        """Create the folder if it does not exist.

        Args:
            folder: A folder on a local disk, used by nothing else.
            gigabytes: Largest total size of the files, 1 GB = 10^9 bytes.

        Raises:
            UserError: The folder cannot be created, or its file system does not support locks.
        """
        self.folder, self.bound = Path(folder), int(gigabytes * 1e9)
        self.warnings: list[str] = []  # for the user; see `Reader.take_warnings`
        with self._folder_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass

    def open(self, remote: Remote, info: ShardInfo) -> int | None:
        """Open a shard for reading, after downloading it if it is not cached.

        Returns:
            A descriptor; the shard is not evicted until it is closed. None: there is no room for the shard.

        Raises:
            UserError: The shard is missing or differs from its manifest, or the folder cannot be used.
        """
        complete, part = self._paths(info)
        with self._folder_errors():
            while True:
                if (descriptor := _open_complete(complete)) is not None:
                    return descriptor
                if (claimed := _claim(part, wait=True)) is None:
                    continue  # another process has downloaded it, or failed to
                if complete.exists():
                    _release(claimed, part)
                elif not self._fetch_or_clean_up(remote, info, claimed):
                    self._warn_full()
                    return None
        return None

    def prefetch(self, remote: Remote, info: ShardInfo) -> None:
        """Download a shard that is neither cached nor being downloaded.

        Raises:
            UserError: See `open`.
        """
        complete, part = self._paths(info)
        with self._folder_errors():
            if complete.exists() or (claimed := _claim(part, wait=False)) is None:
                return
            if complete.exists():
                _release(claimed, part)
            else:
                self._fetch_or_clean_up(remote, info, claimed)

    def _paths(self, info: ShardInfo) -> tuple[Path, Path]:
        return self.folder / f"{info.sha256}.tar", self.folder / f"{info.sha256}.part"

    def _fetch_or_clean_up(self, remote: Remote, info: ShardInfo, descriptor: int) -> bool:
        """Download a claimed part and return True, or remove it and return False if there is no room for it."""
        complete, part = self._paths(info)
        try:
            if self._make_room(descriptor, info.bytes):
                self._fetch(remote, info, descriptor)
                with self._locked():  # otherwise a concurrent `_survey` might count neither name, or both
                    os.rename(part, complete)
                os.close(descriptor)
                return True
        except BaseException:
            _release(descriptor, part)
            raise
        _release(descriptor, part)
        return False

    def _fetch(self, remote: Remote, info: ShardInfo, descriptor: int) -> None:
        """Download a shard into its part and verify it; a mismatch is retried once."""

        def copy(*_: object) -> str:
            """Fill the part from its beginning; return how it differs from the manifest, "" if it does not."""
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
                problem = remote.with_retries(info.name, copy)
            except _WriteError as error:
                raise error.cause from None
            if not problem:
                os.fsync(descriptor)
                return
        raise UserError(f"{remote.address(info.name)} {problem} of its manifest: make the shards again")

    def _make_room(self, descriptor: int, size: int) -> bool:
        """Reserve the size of a claimed part on the disk, evicting the least recently opened shards if necessary."""
        if size > self.bound:
            return False
        with self._locked():
            os.ftruncate(descriptor, 0)  # left by a killed download
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
        """Return bytes in use and the complete shards, least recently opened last; remove abandoned parts."""
        used, opened = 0, []
        for path in list(self.folder.iterdir()):
            if not _CACHE_FILE.fullmatch(path.name):
                continue
            if path.suffix == ".part" and (abandoned := _claim(path, wait=False, create=False)) is not None:
                if os.fstat(abandoned).st_size:  # an empty one is about to reserve its size
                    path.unlink(missing_ok=True)
                os.close(abandoned)
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
    def _folder_errors(self) -> Iterator[None]:
        """Warn of a full disk, as the run can go on without the cache; turn other errors into `UserError`."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise UserError(
                    f"--data.cache {self.folder} cannot be used: {error.strerror}; name a folder on a disk of this "
                    "machine"
                ) from None
            self._warn_full()

    def _warn_full(self) -> None:
        line = (
            f"no room in {self.folder}: all of --data.cache_gb {self.bound / 1e9:g} is in use or its disk is full; "
            "shards that do not fit are read over the network, which is slow"
        )
        if line not in self.warnings:
            self.warnings.append(line)


class _WriteError(UserError):
    """The disk failed rather than the network, so a retry of the request does not help."""

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


def _open_complete(path: Path) -> int | None:
    """Open a cached shard, lock it against eviction and update its modification time."""
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
        A descriptor; None: another process has the lock (or had it, if this one waited), or the file is gone.
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
        pass  # downloaded or removed between opening and locking
    except BlockingIOError:
        if wait:  # for a shared lock, as the file becomes the complete shard, on which readers hold shared locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.close(descriptor)
    return None


def _release(descriptor: int, part: Path) -> None:
    """Remove a claimed part and release its lock."""
    try:
        part.unlink(missing_ok=True)
    finally:  # otherwise processes that wait for the lock would hang
        os.close(descriptor)


def _reserved(descriptor: int, size: int) -> bool:
    """Reserve disk space for a part; return whether there is enough."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _DISK_FULL:
            os.ftruncate(descriptor, 0)
            return False
        os.ftruncate(descriptor, size)  # the file system cannot reserve space; the size is counted
    return True


def _evict(path: Path) -> int:
    """Remove a shard unless a process has it open; return the bytes freed."""
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
