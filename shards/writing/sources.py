"""The source files of shards: the lists of a corpus, and its pictures and audio files.

They are stored in `sources.json` in the folder of the shards; neither the tars nor the manifest depend on it. A list is
unchanged if its SHA-256 is. A picture or audio file is unchanged if size and time of modification are; if only the time
differs, as in a copied corpus, the CRC-32 of its content decides. Therefore a moved or copied corpus is the same
corpus, an edit that keeps the size is noticed, and checking an untouched corpus takes one `stat` per file.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.corpora.item import Item
from shards.corpora.text_files import ListFile
from shards.errors import UserError
from shards.files import atomic_write
from shards.remote import is_url
from shards.stored import StoredFile

logger = logging.getLogger(__name__)

SOURCES = "sources.json"
_FIRST_SPLITS = ("train", "dev", "test")
_MAX_NAMED = 3  # changed files named in a message
_MAX_SILENT = 1000  # files whose content is compared without a message
_READERS = 8  # threads that compare content
_BLOCK = 1 << 20
_MISSING = (-1, -1)
_TAIL = re.compile(rb'"sha256": "([0-9a-f]{64})"}\n')
_TAIL_BYTES = 78


class SourceFile(NamedTuple):
    """A picture or audio file when it was read; size and time of a missing one are -1.

    Of a stored file, path, size and time are those of its container, and the CRC-32 is its own.
    """

    path: str
    bytes: int
    time: int  # of modification, in ns
    crc32: int


@dataclass(frozen=True, eq=False)
class Sources:
    """The source files of a finished folder; its F files are in the order of the samples."""

    pictures: int
    captions: int
    lists: tuple[ListFile, ...]
    bytes: np.ndarray  # int64 [F], like the others; see `SourceFile`
    time: np.ndarray
    crc32: np.ndarray


@dataclass
class Differences:
    """Differences between a corpus and its record."""

    changed: list[str] = field(default_factory=list)  # what changed, with the names of a few files
    missing: int = 0  # files that are missing now, or cannot be read
    missing_example: str = ""  # one of them

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        return "; ".join(self.changed)


def by_split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Return the items of each split, in order of writing."""
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    return {name: splits[name] for name in sorted(splits, key=split_order)}


def split_order(name: str) -> tuple[object, ...]:
    """Sort key of splits: train, dev and test come first."""
    return (*(name != first for first in _FIRST_SPLITS), name)


def files_of(items: Iterable[Item]) -> list[Path | StoredFile]:
    """Return the source files of samples; a sample's picture precedes its audio files."""
    sources = (source for item in items for source in (item.picture, *(caption.audio for caption in item.captions)))
    return [source for source in sources if isinstance(source, Path | StoredFile)]


def stamp(path: Path | StoredFile | str) -> tuple[int, int]:
    """Return size in bytes and time of modification in ns of a file or a container; both -1 if they cannot be read."""
    try:
        if isinstance(path, StoredFile):
            return path.stamp()
        status = os.stat(path)
    except (OSError, ValueError):
        return _MISSING
    return status.st_size, status.st_mtime_ns


def crc32(path: Path | StoredFile | str) -> int:
    """Return the CRC-32 of a file's content; -1 if it cannot be read, or is at a URL, whose time is not known."""
    value = 0
    try:
        if isinstance(path, StoredFile):
            return -1 if is_url(path.container) else zlib.crc32(path.read())
        if not os.path.isfile(path):  # reading a pipe would block
            return -1
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                value = zlib.crc32(block, value)
    except (OSError, ValueError, UserError):
        return -1
    return value


def compare_files(
    paths: Sequence[Path | StoredFile | str], size: np.ndarray, time: np.ndarray, crc: np.ndarray
) -> Differences:
    """Compare files with their recorded sizes, times and checksums, int64 [paths] each, by the rule above."""
    missing: dict[str, None] = {}  # ordered and distinct, as samples may share files
    touched: dict[Path | StoredFile | str, int] = {}
    lines: dict[str, None] = {}
    for number, (path, *then) in enumerate(zip(paths, size.tolist(), time.tolist(), strict=True)):
        now = stamp(path)
        if now == tuple(then):
            continue
        if now == _MISSING:
            missing[str(path)] = None
        elif now[0] == then[0]:
            touched[path] = int(crc[number])
        else:
            lines[f"{path} {'exists now' if then[0] == -1 else 'has another size'}"] = None
    changed = list(lines) or _first_changed_content(list(touched), list(touched.values()))
    if len(changed) > _MAX_NAMED:
        changed[_MAX_NAMED:] = [f"{len(changed) - _MAX_NAMED:,} more files changed"]
    return Differences(changed, len(missing), next(iter(missing), ""))


def _first_changed_content(paths: Sequence[Path | StoredFile | str], crc: Sequence[int]) -> list[str]:
    """Name the first file whose content changed, if there is one."""
    if len(paths) > _MAX_SILENT:
        logger.info("reading %s files whose time of modification changed", f"{len(paths):,}")
    with ThreadPoolExecutor(_READERS) as readers:
        for path, then, now in zip(paths, crc, readers.map(crc32, paths), strict=True):
            if then != now:
                readers.shutdown(wait=False, cancel_futures=True)
                return [f"{path} has other content"]
    return []


def compare_lists(then: Sequence[ListFile], now: Sequence[ListFile], complete: bool = True) -> list[str]:
    """Return changes of the lists of a corpus, which may have moved; unless `complete`, `now` may lack some."""
    old, new = _by_name(then), _by_name(now)
    lines = []
    for name, one in new.items():
        if name not in old:
            lines.append(f"{one.path} is read now and was not before")
        elif old[name].sha256 != one.sha256:
            lines.append(f"{one.path} was edited")
    unread = [one for name, one in old.items() if name not in new] if complete else []
    return lines + [f"{one.path} was read before and is not now" for one in unread]


def _by_name(lists: Sequence[ListFile]) -> dict[tuple[str, int], ListFile]:
    """Return lists by name and number among those of the same name, as their folder may have moved."""
    named: dict[tuple[str, int], ListFile] = {}
    for one in lists:
        name = os.path.basename(one.path)
        named[name, sum(other == name for other, _ in named)] = one
    return named


def compare(recorded: Sources, lists: Sequence[ListFile], items: Sequence[Item]) -> Differences:
    """Compare a corpus with its record of when the shards were made."""
    changed = compare_lists(recorded.lists, lists)
    counts = {"picture": len(items) - recorded.pictures}
    counts["caption"] = sum(len(item.captions) for item in items) - recorded.captions
    for what, more in counts.items():
        if more:
            changed.append(f"{abs(more):,} {what}{'' if abs(more) == 1 else 's'} {'more' if more > 0 else 'fewer'}")
    if changed:
        return Differences(changed)
    paths = files_of(item for some in by_split(items).values() for item in some)
    if len(paths) != len(recorded.bytes):
        return Differences([f"it names {len(paths):,} files rather than {len(recorded.bytes):,}"])
    return compare_files(paths, recorded.bytes, recorded.time, recorded.crc32)


def save_sources(folder: Path, sources: Sources) -> None:
    """Write `sources.json`, which ends with the checksum of all preceding bytes."""
    stored = {
        **{"pictures": sources.pictures, "captions": sources.captions, "lists": sources.lists},
        **{name: getattr(sources, name).tolist() for name in ("bytes", "time", "crc32")},
    }
    body = json.dumps(stored).encode()[:-1] + b",\n"
    with atomic_write(folder / SOURCES) as file:
        file.write(body + b'"sha256": "%s"}\n' % hashlib.sha256(body).hexdigest().encode())


def load_sources(folder: Path) -> Sources | None:
    """Read `sources.json`; None if it is missing.

    Raises:
        UserError: It is damaged or cannot be read.
    """
    if not os.path.lexists(folder / SOURCES):
        return None
    if problem := sources_problem(folder):
        raise UserError(f"{folder / SOURCES} {problem}")
    try:
        stored = json.loads((folder / SOURCES).read_bytes())
        lists = tuple(ListFile(*one) for one in stored["lists"])
        columns = (np.array(stored[name], np.int64) for name in ("bytes", "time", "crc32"))
        return Sources(int(stored["pictures"]), int(stored["captions"]), lists, *columns)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{folder / SOURCES} is damaged ({error!r})") from None


def sources_problem(folder: Path) -> str | None:
    """Compare `sources.json` with the checksum at its end, reading it in blocks; None: it is intact."""
    path = folder / SOURCES
    try:
        if not os.path.isfile(path):
            return "is not a regular file"
        left, digest = path.stat().st_size - _TAIL_BYTES, hashlib.sha256()
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            tail = _TAIL.fullmatch(file.read(_TAIL_BYTES + 1))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if tail and tail[1].decode() == digest.hexdigest() else "is damaged: its checksum differs"
