"""Duplicates in a corpus: a file in two splits is a leak, and a repeated caption counts as two queries.

With `--skip-bad` duplicates are dropped. Of a leak, only the samples of one split are kept, the first other than train:
training loses them and the evaluation splits stay complete. Of other duplicates, the first is kept. One audio file with
several captions, or one picture under several names, may be intended within a split and is kept.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from shards.corpora.file_finder import FileFinder
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecords
from shards.errors import UserError
from shards.files import file_sha256
from shards.remote import is_url
from shards.stored import StoredFile

# Contents are compared only up to this number of files, since each needs a `stat` before the first shard is written;
# check_shards.py compares what was stored.
MAX_COMPARED = 50_000
_SAMPLED = 4096  # bytes at the start, in the middle and at the end; enough to distinguish most files of equal size
_THREADS, _CHUNK = 16, 64  # threads mostly wait for the disk
_TRAIN = "train"


class _Use(NamedTuple):
    """An occurrence of a file: a picture, or the audio of one of its captions."""

    item: Item
    caption: Caption | None = None

    @property
    def path(self) -> Path | StoredFile | None:
        """The file; None if a function generates the data."""
        source = self.caption.audio if self.caption else self.item.picture
        return source if isinstance(source, Path | StoredFile) else None

    @property
    def where(self) -> str:
        """Where in the corpus it is listed."""
        return (self.caption.where if self.caption else self.item.where) or f"picture {self.item.image_id}"


_Key = Callable[[_Use], str | None]


class RepeatFinder:
    """Removes duplicates from a corpus."""

    def __init__(self, bad: BadRecords, files: FileFinder, splits_sharing_pictures: Collection[str] = ()) -> None:
        self._bad = bad
        self._files = files
        self._shared = set(splits_sharing_pictures)
        self._removed: set[int] = set()  # ids of items and captions
        self._shared_audio: list[str] = []

    def without_repeats(self, items: Sequence[Item]) -> list[Item]:
        """Drop repeated pictures, audio files, utterances and image ids.

        Files are compared by path, with links followed, and up to `MAX_COMPARED` of them also by content.
        """
        several = len({item.split for item in items}) > 1
        if several:
            items = self._remove_groups(items, _pictures, self._identity, partial(self._note_leak, pictures=True))
            items = self._remove_copies(items, _pictures)
        items = self._remove_groups(items, _captions, self._identity, self._note_repeated_audio)
        if several:
            items = self._remove_copies(items, _captions)
        items = self._remove_groups(items, _captions, _utterance, self._note_utterance)
        return list(self._remove_groups(items, _pictures, lambda use: use.item.image_id, self._note_image_id))

    @property
    def remark(self) -> str | None:
        """Message about audio files that several captions share; None if there are none."""
        if not self._shared_audio:
            return None
        more = len(self._shared_audio) - 1
        return self._shared_audio[0] + (f" (and {more:,} more)" if more else "") + ": each counts as a query"

    def _identity(self, use: _Use) -> str | None:
        if isinstance(use.path, StoredFile):
            return str(use.path)
        return self._files.identity(use.path) if use.path else None

    def _remove_groups(
        self,
        items: Sequence[Item],
        uses: Callable[[Iterable[Item]], Iterator[_Use]],
        key: _Key,
        note: Callable[[list[_Use]], object],
    ) -> Sequence[Item]:
        """Apply `note` to every group of uses with the same key, and remove what it noted."""
        for group in _groups(items, uses, key):
            note(group)
        return self._remaining(items)

    def _remove_copies(self, items: Sequence[Item], uses: Callable[[Iterable[Item]], Iterator[_Use]]) -> Sequence[Item]:
        """Remove files with the same content in two splits."""
        files = [use for use in uses(items) if use.path]
        if len(files) <= MAX_COMPARED:
            for group in _copies(files):
                self._note_leak(group, "a copy of it", pictures=uses is _pictures)
        return self._remaining(items)

    def _remaining(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items without the removed items and captions."""
        if not self._removed:
            return items
        remaining = []
        for item in items:
            captions = tuple(caption for caption in item.captions if id(caption) not in self._removed)
            if id(item) not in self._removed and captions:
                remaining.append(item if len(captions) == len(item.captions) else replace(item, captions=captions))
            elif id(item) not in self._removed and self._bad.skip:
                self._note(_Use(item), "no caption is left", captions=0)
        self._removed.clear()
        return remaining

    def _note(self, use: _Use, reason: str, captions: int | None = None) -> None:
        self._removed.add(id(use.caption or use.item))
        lost = (1 if use.caption else len(use.item.captions)) if captions is None else captions
        name = use.caption.utterance if use.caption else use.item.image_id
        self._bad.add(
            use.where,
            reason,
            what="caption" if use.caption else "picture",
            name=name,
            split=use.item.split,
            captions=lost,
        )

    def _note_leak(self, group: list[_Use], other: str = "and", *, pictures: bool) -> list[_Use]:
        """Note the uses outside the split that is kept, and return the others."""
        kept = next((use for use in group if use.item.split != _TRAIN), group[0])
        rest = []
        for use in group:
            splits = {use.item.split, kept.item.split}
            if len(splits) == 1 or (pictures and splits <= self._shared):
                rest.append(use)
                continue
            name = "picture" if pictures else "audio file"
            where = f"{kept.path} at {kept.where}" if use.path != kept.path else kept.where
            reason = f"{name} {use.path} is in split {use.item.split}, {other} in split {kept.item.split}: {where}"
            self._note(use, reason)
        return rest

    def _note_repeated_audio(self, group: list[_Use]) -> None:
        seen: dict[tuple[int, str | None], _Use] = {}
        for use in self._note_leak(group, pictures=False):
            first = seen.setdefault((id(use.item), _utterance(use)), use)
            if first is not use:
                self._note(use, f"the same picture and audio file as at {first.where}")
        if len(seen) > 1:
            listed = [use.where for use in seen.values()][:2]
            self._shared_audio.append(f"audio file {group[0].path} belongs to several captions: {' and '.join(listed)}")

    def _note_utterance(self, group: list[_Use]) -> None:
        first = self._identity(group[0])
        for use in group[1:]:
            if first is None or self._identity(use) != first:  # the same file under one id has been handled
                self._note(
                    use, f"utterance {_utterance(use)} is repeated: another audio file has it at {group[0].where}"
                )

    def _note_image_id(self, group: list[_Use]) -> None:
        for use in group[1:]:
            self._note(use, f"image id {use.item.image_id} is repeated: first at {group[0].where}")


def check_split_names(items: Iterable[Item]) -> None:
    """Check that no two split names differ only in case.

    Raises:
        UserError: Two differ only in case, which is likely a typo.
    """
    first: dict[str, Item] = {}
    for item in {item.split: item for item in reversed(list(items))}.values():
        other = first.setdefault(item.split.casefold(), item)
        if other is not item:
            listed = " and ".join(f"{one.split!r} ({one.where or one.image_id})" for one in (item, other))
            raise UserError(f"splits {listed} differ only in case: spell them the same way")


def _pictures(items: Iterable[Item]) -> Iterator[_Use]:
    return (_Use(item) for item in items)


def _captions(items: Iterable[Item]) -> Iterator[_Use]:
    return (_Use(item, caption) for item in items for caption in item.captions)


def _utterance(use: _Use) -> str | None:
    return use.caption.utterance if use.caption else None


def _groups(items: Sequence[Item], uses: Callable[[Iterable[Item]], Iterator[_Use]], key: _Key) -> list[list[_Use]]:
    """Group the uses with equal keys; without duplicates only the keys are kept in memory."""
    seen: set[str] = set()
    repeated: dict[str, list[_Use]] = {}
    for use in uses(items):
        if (one := key(use)) is not None:
            if one in seen:
                repeated[one] = []
            seen.add(one)
    if repeated:
        for use in uses(items):
            if (one := key(use)) in repeated and one is not None:
                repeated[one].append(use)
    return list(repeated.values())


def _copies(uses: list[_Use]) -> list[list[_Use]]:
    """Group files with the same content in more than one split: by size, then by some bytes, then by checksum."""
    groups = [uses]
    with ThreadPoolExecutor(_THREADS) as pool:
        for measure in (_size, _sample, _checksum):
            flat = [(number, use) for number, group in enumerate(groups) for use in group]
            chunks = [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]
            measured = pool.map(lambda chunk, f=measure: [f(use.path) for _, use in chunk], chunks)
            equal: dict[tuple[int, int | str], list[_Use]] = {}
            for (number, use), value in zip(flat, (one for chunk in measured for one in chunk), strict=True):
                if value is not None:
                    equal.setdefault((number, value), []).append(use)
            groups = [group for group in equal.values() if len({use.item.split for use in group}) > 1]
    return groups


# Measures of a file; None if it is empty or cannot be read, which the writer reports.


def _size(path: Path | StoredFile) -> int | None:
    if isinstance(path, StoredFile):
        return None if is_url(path.container) else path.size or None  # reading it would be another download
    try:
        return path.stat().st_size or None
    except OSError:
        return None


def _sample(path: Path | StoredFile) -> str | None:
    if isinstance(path, StoredFile):
        return _checksum(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            digest = sha256()
            for start in (0, size // 2, max(0, size - _SAMPLED)):
                file.seek(start)
                digest.update(file.read(_SAMPLED))
            return digest.hexdigest()
    except OSError:
        return None


def _checksum(path: Path | StoredFile) -> str | None:
    try:
        return sha256(path.read()).hexdigest() if isinstance(path, StoredFile) else file_sha256(path)
    except (OSError, UserError):
        return None
