"""What shards were made from: the lists of a corpus, and its pictures and recordings file by file.

`sources.json` in the folder of the shards keeps it; neither a tar nor the manifest depends on it. A list is the same if
its sha256 is. A picture or a recording is the same if it has the size that it had and also its time of change; if only
the time is another, as in a corpus that was copied, its content is read and its CRC-32 decides. So a moved or copied
corpus is the same corpus, a file that was edited to the same size is not the same file, and a look at a corpus that
nobody touched costs one question of the file system a file.
"""

import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.corpora.item import Item
from shards.corpora.lists import ListFile
from shards.errors import UserError
from shards.files import atomic_write

SOURCES = "sources.json"
_FIRST_SPLITS = ("train", "dev", "test")
_NAMED = 3  # changed files that a message shows
_MANY = 1000  # files whose content is compared without a word
_READERS = 8  # threads that compare content
_BLOCK = 1 << 20
_MISSING = (-1, -1)
_TAIL = re.compile(rb'"sha256": "([0-9a-f]{64})"}\n')
_TAIL_BYTES = 78


class SourceFile(NamedTuple):
    """A picture or a recording as it was when it was read; sizes and times of one that was not there are -1."""

    path: str
    bytes: int
    time: int  # of its last change, in ns
    crc32: int


@dataclass(frozen=True, eq=False)
class Sources:
    """What a finished folder was made from; its F files are in the order of the samples."""

    pictures: int
    captions: int
    lists: tuple[ListFile, ...]
    bytes: np.ndarray  # int64 [F], as are the others; see `SourceFile`
    time: np.ndarray
    crc32: np.ndarray


@dataclass
class Differences:
    """How a corpus differs from what was recorded of it."""

    changed: list[str] = field(default_factory=list)  # what changed, a few files by name
    gone: int = 0  # files that are not there now, or cannot be looked at
    gone_one: str = ""  # one of them

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        return "; ".join(self.changed)


def by_split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each split, in the order in which they are written."""
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    names = sorted(splits, key=lambda name: (*(name != first for first in _FIRST_SPLITS), name))
    return {name: splits[name] for name in names}


def files_of(items: Iterable[Item]) -> list[Path]:
    """The files that samples are read from, a sample's picture before its recordings."""
    every = (source for item in items for source in (item.picture, *(one.audio for one in item.captions)))
    return [source for source in every if isinstance(source, Path)]


def stamp(path: Path | str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns of a file; both -1 if it cannot be asked for."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _MISSING
    return status.st_size, status.st_mtime_ns


def crc32(path: Path | str) -> int:
    """Checksum of a file's content, -1 if it cannot be read."""
    value = 0
    try:
        if not os.path.isfile(path):  # a pipe is not waited for
            return -1
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                value = zlib.crc32(block, value)
    except (OSError, ValueError):
        return -1
    return value


def compare_files(paths: Sequence[Path | str], size: np.ndarray, time: np.ndarray, crc: np.ndarray) -> Differences:
    """Hold files against what was recorded of them, int64 [paths] each; see the rule above."""
    gone: dict[str, None] = {}  # in order, once each: several samples may be read from one file
    touched: dict[str, int] = {}
    lines: dict[str, None] = {}
    for number, (path, *then) in enumerate(zip(paths, size.tolist(), time.tolist(), strict=True)):
        now = stamp(path)
        if now == tuple(then):
            continue
        if now == _MISSING:
            gone[str(path)] = None
        elif now[0] == then[0]:
            touched[str(path)] = int(crc[number])
        else:
            lines[f"{path} {'is there now' if then[0] == -1 else 'has another size'}"] = None
    changed = list(lines) or _other_content(list(touched), list(touched.values()))
    if len(changed) > _NAMED:
        changed[_NAMED:] = [f"{len(changed) - _NAMED:,} more files changed"]
    return Differences(changed, len(gone), next(iter(gone), ""))


def _other_content(paths: Sequence[str], crc: Sequence[int]) -> list[str]:
    """Name the first file whose content is another, if there is one."""
    if len(paths) > _MANY:
        print(f"reading {len(paths):,} files whose time of change is another than it was", file=sys.stderr)
    with ThreadPoolExecutor(_READERS) as readers:
        for path, then, now in zip(paths, crc, readers.map(crc32, paths), strict=True):
            if then != now:
                readers.shutdown(wait=False, cancel_futures=True)
                return [f"{path} has other content"]
    return []


def compare_lists(then: Sequence[ListFile], now: Sequence[ListFile], complete: bool = True) -> list[str]:
    """What changed in the lists of a corpus, wherever they are now.

    Args:
        then: The lists as they were recorded.
        now: The lists as they were read now.
        complete: Whether all were read; if not, nothing is said of those that are not among them.
    """
    old, new = _by_name(then), _by_name(now)
    lines = []
    for name, one in new.items():
        if name not in old:
            lines.append(f"{one.path} is read now and was not then")
        elif old[name].sha256 != one.sha256:
            lines.append(f"{one.path} was edited")
    unread = [one for name, one in old.items() if name not in new] if complete else []
    return lines + [f"{one.path} was read then and is not now" for one in unread]


def _by_name(lists: Sequence[ListFile]) -> dict[tuple[str, int], ListFile]:
    """Lists by name, and by number among those of that name: their folder may have moved."""
    named: dict[tuple[str, int], ListFile] = {}
    for one in lists:
        name = os.path.basename(one.path)
        named[name, sum(other == name for other, _ in named)] = one
    return named


def compare(recorded: Sources, lists: Sequence[ListFile], items: Sequence[Item]) -> Differences:
    """Hold a corpus against what was recorded of it when shards were made from it.

    Args:
        recorded: What they were made from.
        lists: The corpus's lists as they were read now.
        items: What the corpus holds now.
    """
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
    """Write `sources.json`, which ends with the checksum of all before it."""
    said = {
        **{"pictures": sources.pictures, "captions": sources.captions, "lists": sources.lists},
        **{name: getattr(sources, name).tolist() for name in ("bytes", "time", "crc32")},
    }
    body = json.dumps(said).encode()[:-1] + b",\n"
    with atomic_write(folder / SOURCES) as file:
        file.write(body + b'"sha256": "%s"}\n' % hashlib.sha256(body).hexdigest().encode())


def load_sources(folder: Path) -> Sources | None:
    """Read what `save_sources` wrote; None if it is not there.

    Raises:
        UserError: It is damaged or cannot be read.
    """
    if not os.path.lexists(folder / SOURCES):
        return None
    if problem := sources_problem(folder):
        raise UserError(f"{folder / SOURCES} {problem}")
    try:
        said = json.loads((folder / SOURCES).read_bytes())
        lists = tuple(ListFile(*one) for one in said["lists"])
        columns = (np.array(said[name], np.int64) for name in ("bytes", "time", "crc32"))
        return Sources(int(said["pictures"]), int(said["captions"]), lists, *columns)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{folder / SOURCES} is damaged ({error!r})") from None


def sources_problem(folder: Path) -> str | None:
    """Hold `sources.json` against the checksum at its end; None: it is as it was written. Little of it is in memory."""
    path = folder / SOURCES
    try:
        if not os.path.isfile(path):
            return "is no regular file"
        left, digest = path.stat().st_size - _TAIL_BYTES, hashlib.sha256()
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            tail = _TAIL.fullmatch(file.read(_TAIL_BYTES + 1))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if tail and tail[1].decode() == digest.hexdigest() else "is damaged: its checksum is another"
