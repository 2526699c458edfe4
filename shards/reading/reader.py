"""Indexed reads from shards: one read per member, at the offset in the manifest; no tar is parsed.

sample or caption row -> shard, offset, bytes -> pread from the local shard
                                              -> pread from the node's cache, which downloads the complete shard
                                              -> range request to the remote shard, without a cache or room in it
"""

import errno
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from shards.errors import TransientError, UserError
from shards.manifest import Manifest, ShardInfo
from shards.reading.bad_samples import UnreadableSampleError
from shards.reading.cache import Cache
from shards.remote import Remote

MAX_MEMBER = 64 << 20  # bytes; a larger picture or caption is refused
MAX_META = 1 << 20  # bytes of a sample's JSON
MAX_OPEN = 64  # shards kept open at a time

# Reads the bytes of an open shard at an offset, with a size; raises the errors of `Reader.picture`.
_ReadMember = Callable[[int, int], bytes]

# Errors of a network file system or of the connection to it.
_NETWORK_ERRORS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
)


def caption_metadata(data: bytes, key: str, count: int) -> list[dict[str, Any]]:
    """Return text, speaker, language and utterance id of the captions of a sample from any tar.

    Args:
        data: The JSON of our shards; a JSON object with `text`, `speaker` and `language`, where `text` may be a list;
            text with a line for each caption; or nothing.
        key: Key of the sample, from which utterance ids are made where the data has none.
        count: Number of captions.

    Returns:
        Values that are absent or not text are None; `duration` is there if it is a number.
    """
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        text = data.decode(errors="replace").strip()
        described = {"text": text.splitlines() if count > 1 else text}
    several = described.get("captions", described.get("text"))
    several = several if isinstance(several, list) else [several]
    if len(several) != count:
        several = [None] * count
    common = {name: described.get(name) for name in ("speaker", "language")}
    captions = []
    for number, one in enumerate(several):
        own = common | {"utterance": None} | (one if isinstance(one, dict) else {"text": one})
        caption = {name: _text(own.get(name)) for name in ("text", "speaker", "language")}
        caption["utterance"] = _text(own["utterance"]) or f"{key}.{number}"
        seconds = own.get("duration")
        captions.append(caption | ({"duration": seconds} if isinstance(seconds, float) and 0 <= seconds < 1e9 else {}))
    return captions


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


class Reader:
    """The samples of one or several data sets, numbered end to end; safe for threads and forked processes."""

    def __init__(self, *manifests: Manifest, cache: Cache | None = None) -> None:
        """Number the samples; shards are opened when first read.

        Args:
            manifests: The data sets.
            cache: Cache for remote shards; without one each member is read by a range request.
        """
        self.manifests, self.cache = manifests, cache
        self._first_sample = list(accumulate((len(m.key) for m in manifests), initial=0))
        self._first_row = list(accumulate((len(m.duration) for m in manifests), initial=0))
        self._remotes = [Remote(m.url) if m.url else None for m in manifests]
        self.cached = cache is not None and any(self._remotes)
        self._max_open = MAX_OPEN
        if cache and self.cached:  # a process keeps half of the cache open at most, as open shards are not evicted
            self._max_open = min(MAX_OPEN, max(2, cache.bound // (2 * self.largest_shard)))
        self._reset()

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
            UserError: Its shard is missing or differs in size from the manifest.
            TransientError: The disk or network does not respond.
            UnreadableSampleError: Only this member cannot be read.
        """
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        return self._read(part, int(m.shard[local]), int(m.image_offset[local]), int(m.image_bytes[local]))

    def audio(self, caption: int) -> bytes:
        """Read the encoded audio of a caption row; raises the errors of `picture`."""
        part, local = self._find(self._first_row, caption)
        m = self.manifests[part]
        sample = int(np.searchsorted(m.first_caption, local, side="right")) - 1
        return self._read(part, int(m.shard[sample]), int(m.audio_offset[local]), int(m.audio_bytes[local]))

    def meta(self, sample: int) -> dict[str, Any]:
        """Read the JSON of a sample: image id, split, captions; raises the errors of `picture`.

        In an indexed tar it is made of what describes the captions there; see `caption_metadata`.
        """
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        size = int(m.meta_bytes[local])
        data = self._read(part, int(m.shard[local]), int(m.meta_offset[local]), size) if size else b""
        if not m.indexed:
            return json.loads(data)
        rows, key = m.captions(local), m.key[local].decode(errors="replace")
        captions = caption_metadata(data, key, len(rows))
        captions = [one | {"duration": float(m.duration[row])} for one, row in zip(captions, rows, strict=True)]
        return {
            "image_id": m.image_id[local].decode(errors="replace"),
            "split": m.splits[m.split[local]],
            "captions": captions,
        }

    def describe(self, sample: int) -> tuple[str, str]:
        """Return the key of a sample and the path or URL of its shard, for messages."""
        part, local = self._find(self._first_sample, sample)
        m = self.manifests[part]
        return m.key[local].decode(errors="replace"), f"{m.location}/{m.shards[int(m.shard[local])].name}"

    def prefetch(self, samples: np.ndarray) -> None:
        """Download the remote shards of samples int64 [n] into the cache; raises the errors of `picture`."""
        for part, remote in enumerate(self._remotes):
            m, first = self.manifests[part], self._first_sample[part]
            if remote and self.cache:
                local = samples[(samples >= first) & (samples < first + len(m.key))] - first
                for shard in np.unique(m.shard[local]).tolist():
                    self.cache.prefetch(remote, m.shards[shard])

    def take_warnings(self) -> list[str]:
        """Return the cache's new warnings for the user, and clear them."""
        if not self.cache:
            return []
        warnings, self.cache.warnings = self.cache.warnings, []
        return warnings

    def _find(self, starts: list[int], number: int) -> tuple[int, int]:
        """Return the number of the data set of a sample or row, and its number in that data set."""
        if not 0 <= number < starts[-1]:
            raise IndexError(f"{number} of {starts[-1]}")
        part = bisect_right(starts, number) - 1  # the last of those that start here: the ones before it are empty
        return part, number - starts[part]

    def _read(self, part: int, shard: int, offset: int, size: int) -> bytes:
        if size > MAX_MEMBER:
            raise UnreadableSampleError(f"member of {size:,} bytes, the limit is {MAX_MEMBER:,}")
        return self._get_shard(part, shard)(offset, size)

    def _get_shard(self, part: int, shard: int) -> _ReadMember:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            opened = self._shards.get((part, shard))
            if opened is not None:
                self._shards.move_to_end((part, shard))
                return opened
        opened = self._open_shard(part, self.manifests[part].shards[shard])
        with self._lock:
            self._shards[part, shard] = opened
            if len(self._shards) > self._max_open:
                self._shards.popitem(last=False)  # closed after the last read from it
        return opened

    def _open_shard(self, part: int, info: ShardInfo) -> _ReadMember:
        name, remote = f"{self.manifests[part].location}/{info.name}", self._remotes[part]
        if remote is None:
            return _LocalShard(_open_local(name, info), name).read
        descriptor = self.cache.open(remote, info) if self.cache else None
        if descriptor is not None:
            return _LocalShard(descriptor, name).read
        _check_size(remote.size(info.name), info, name)
        return partial(remote.read_range, info.name)

    def _reset(self) -> None:
        """Start without open shards; those of a parent process are not used."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self._shards: OrderedDict[tuple[int, int], _ReadMember] = OrderedDict()


class _LocalShard:
    """An open file; closed when the last reference is gone, so never during a read in another thread."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read a member."""
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as error:
            # Not a bad sample: it may be readable later, and a run must be the same on every repetition.
            raise TransientError(
                f"{self.name}: {size:,} bytes at {offset:,} cannot be read: {error.strerror}; check the disk"
            ) from None
        if len(data) != size:
            raise UserError(f"{self.name} is shorter than in its manifest: make the shards again")
        return data


def _open_local(name: str, info: ShardInfo) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NETWORK_ERRORS:
            raise TransientError(f"cannot open shard {name}: {error.strerror}; check the disk") from None
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
        raise UserError(f"{name} is {how}: {size:,} bytes, {info.bytes:,} in its manifest; make the shards again")
