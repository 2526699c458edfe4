"""Indexed reads from shards: one read a member, at the offset that the manifest gives; no tar is parsed.

sample or caption row -> shard, offset, bytes -> pread from the local shard
                                              -> pread from the node's cache, which fetches a remote shard whole
                                              -> a range of the remote shard, where there is no cache or no room
"""

import errno
import json
import os
import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from shards.errors import TransientError, UserError
from shards.manifest import Manifest, ShardInfo
from shards.reading.bad_samples import UnreadableSampleError
from shards.reading.cache import Cache
from shards.remote import Remote

MAX_MEMBER = 64 << 20  # bytes; a larger picture or caption is refused
MAX_META = 1 << 20  # bytes of a sample's JSON
MAX_OPEN = 64  # shards kept open at a time

# What the server of a shared disk, or the way to it, is to blame for.
_NO_ANSWER = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
)


class Reader:
    """The samples of one or several data sets, numbered end to end; threads and forked processes may share it."""

    def __init__(self, *manifests: Manifest, cache: Cache | None = None) -> None:
        """Open nothing yet.

        Args:
            manifests: The data sets.
            cache: Where remote shards are kept; without one they are read from afar, member by member.
        """
        self.manifests, self.cache = manifests, cache
        self._first_sample = _starts([len(m.key) for m in manifests])
        self._first_row = _starts([len(m.duration) for m in manifests])
        self._remotes = [Remote(m.url) if m.url else None for m in manifests]
        self.cached = cache is not None and any(self._remotes)
        self._keep = MAX_OPEN
        if cache and self.cached:  # a process holds half of the cache at most: what is held cannot make room
            self._keep = min(MAX_OPEN, max(2, cache.bound // (2 * self.largest_shard)))
        self._forget()

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest shard of all."""
        return max((shard.bytes for m in self.manifests for shard in m.shards), default=0) or 1

    def __getstate__(self) -> dict[str, Any]:
        return {"manifests": self.manifests, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["manifests"], cache=state["cache"])  # type: ignore[misc]

    def picture(self, sample: int) -> bytes:
        """Read the encoded picture of a sample.

        Raises:
            UserError: Its shard is missing or has not the manifest's size.
            TransientError: The disk or network does not answer.
            UnreadableSampleError: This member alone cannot be read.
        """
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        return self._read(part, int(m.shard[local]), int(m.image_offset[local]), int(m.image_bytes[local]))

    def audio(self, caption: int) -> bytes:
        """Read the encoded audio of a caption row; raises what `picture` does."""
        part, local = self._find(self._first_row, caption)
        m = self.manifests[part]
        sample = int(np.searchsorted(m.first_caption, local, side="right")) - 1
        return self._read(part, int(m.shard[sample]), int(m.audio_offset[local]), int(m.audio_bytes[local]))

    def meta(self, sample: int) -> dict[str, Any]:
        """Read the JSON of a sample: image id, split, captions; raises what `picture` does."""
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        return json.loads(self._read(part, int(m.shard[local]), int(m.meta_offset[local]), int(m.meta_bytes[local])))

    def describe(self, sample: int) -> tuple[str, str]:
        """Key of a sample, and path or URL of its shard, for messages."""
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        return m.key[local].decode(errors="replace"), f"{m.place}/{m.shards[int(m.shard[local])].name}"

    def prefetch(self, samples: np.ndarray) -> None:
        """Fetch the remote shards of samples int64 [n] into the cache; raises what `picture` does."""
        for part, remote in enumerate(self._remotes):
            m, first = self.manifests[part], self._first_sample[part]
            if remote and self.cache:
                own = samples[(samples >= first) & (samples < first + len(m.key))] - first
                for shard in np.unique(m.shard[own]).tolist():
                    self.cache.prefetch(remote, m.shards[shard])

    def notices(self) -> list[str]:
        """Take the lines that the user should see."""
        if not self.cache:
            return []
        taken, self.cache.notices = self.cache.notices, []
        return taken

    def _find(self, starts: list[int], number: int) -> tuple[int, int]:
        """The data set that a sample or row is in, and its number there."""
        if not 0 <= number < starts[-1]:
            raise IndexError(f"{number} of {starts[-1]}")
        part = 0
        while number >= starts[part + 1]:
            part += 1
        return part, number - starts[part]

    def _read(self, part: int, shard: int, offset: int, size: int) -> bytes:
        if size > MAX_MEMBER:
            raise UnreadableSampleError(f"a member of {size:,} bytes, the limit is {MAX_MEMBER:,}")
        return self._open(part, shard).read(offset, size)

    def _open(self, part: int, shard: int) -> "_Shard":
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            opened = self._shards.get((part, shard))
            if opened is not None:
                self._shards.move_to_end((part, shard))
                return opened
        opened = self._open_anew(part, self.manifests[part].shards[shard])
        with self._lock:
            self._shards[part, shard] = opened
            if len(self._shards) > self._keep:
                self._shards.popitem(last=False)  # closed once the last read from it is done
        return opened

    def _open_anew(self, part: int, info: ShardInfo) -> "_Shard":
        name, remote = f"{self.manifests[part].place}/{info.name}", self._remotes[part]
        if remote is None:
            return _Local(_open_local(name, info), name)
        descriptor = self.cache.open(remote, info) if self.cache else None
        if descriptor is not None:
            return _Local(descriptor, name)
        _check_size(remote.size(info.name), info, name)
        return _Far(remote, info.name)

    def _forget(self) -> None:
        """Begin with nothing open: what a parent process has open stays the parent's."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self._shards: OrderedDict[tuple[int, int], _Shard] = OrderedDict()


class _Shard(Protocol):
    def read(self, offset: int, size: int) -> bytes:
        """Read a member, or raise what `Reader.picture` does."""


class _Local:
    """An open file; closed when it is let go of, which no read in another thread can be surprised by."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read a member."""
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as error:
            # Not a bad sample: what cannot be read now may be later, and a run has to be the same on every repetition.
            raise TransientError(
                f"{self.name}: {size:,} bytes at {offset:,} cannot be read: {error.strerror}; look at the disk"
            ) from None
        if len(data) != size:
            raise UserError(f"{self.name} is shorter than its manifest says: make the shards again")
        return data


class _Far:
    """A remote file that is read piece by piece."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name

    def read(self, offset: int, size: int) -> bytes:
        """Read a member."""
        return self.remote.read_range(self.name, offset, size)


def _open_local(name: str, info: ShardInfo) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_ANSWER:
            raise TransientError(f"cannot open shard {name}: {error.strerror}; look at the disk") from None
        raise UserError(f"cannot open shard {name}: {error.strerror}; make the shards again") from None
    try:
        _check_size(os.fstat(descriptor).st_size, info, name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_size(size: int | None, info: ShardInfo, name: str) -> None:
    if size is not None and size != info.bytes:
        how = "truncated" if size < info.bytes else "changed"
        raise UserError(f"{name} is {how}: {size:,} bytes, its manifest says {info.bytes:,}; make the shards again")


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:n]) for n in range(len(sizes) + 1)]
