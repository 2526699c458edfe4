"""What a corpus holds twice: a file in two splits is a leak, and a caption that comes twice counts as two queries.

With `--skip-bad` it is dropped: of a leak everything outside the split that is kept, the first one other than train, so
that training loses it and evaluation stays whole; of anything else all but the first. One recording of several captions
within a split may be meant, as may one picture under several names, and stays.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from shards.corpora.file_finder import FileFinder
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecords
from shards.errors import UserError
from shards.files import file_sha256

# The contents of more files than these are not compared here, since each would be asked for its size before the first
# shard: check_shards.py compares what was stored.
MAX_COMPARED = 50_000
_SAMPLED = 4096  # bytes at the start, in the middle and at the end: all that is read of most files of equal size
_THREADS, _CHUNK = 16, 64  # the threads wait for the disk
_TRAIN = "train"


class _Use(NamedTuple):
    """A picture, or one of its captions."""

    item: Item
    caption: Caption | None = None

    @property
    def path(self) -> Path | None:
        """The file, unless it is made by a function."""
        source = self.caption.audio if self.caption else self.item.picture
        return source if isinstance(source, Path) else None

    @property
    def place(self) -> str:
        """Where the corpus names it."""
        return (self.caption.place if self.caption else self.item.place) or f"picture {self.item.image_id}"


_Key = Callable[[_Use], str | None]


class RepeatFinder:
    """Takes out of a corpus what it holds twice.

    Args:
        bad: Notes what is taken out.
        files: Tells which paths are one file.
        share_pictures: Splits that may have pictures in common.
    """

    def __init__(self, bad: BadRecords, files: FileFinder, share_pictures: Collection[str] = ()) -> None:
        self._bad = bad
        self._files = files
        self._shared = set(share_pictures)
        self._removed: set[int] = set()  # ids of items and captions
        self._shared_recordings: list[str] = []

    def without_repeats(self, items: Sequence[Item]) -> list[Item]:
        """Look for pictures, recordings, utterances and image ids that come twice.

        Args:
            items: The corpus. Its files are compared by their paths, with links followed, and up to `MAX_COMPARED` of
                them by content too.

        Returns:
            The items without what was noted.
        """
        several = len({item.split for item in items}) > 1
        if several:
            items = self._take_out(items, _pictures, self._identity, self._note_shared_picture)
            items = self._take_out_copies(items, _pictures)
        items = self._take_out(items, _captions, self._identity, self._note_repeated_recording)
        if several:
            items = self._take_out_copies(items, _captions)
        items = self._take_out(items, _captions, _utterance, self._note_utterance)
        return list(self._take_out(items, _pictures, lambda use: use.item.image_id, self._note_image_id))

    @property
    def remark(self) -> str | None:
        """What to say of recordings that several captions have, if there are any."""
        if not self._shared_recordings:
            return None
        more = len(self._shared_recordings) - 1
        return self._shared_recordings[0] + (f" (and {more:,} more)" if more else "") + ": each counts as a query"

    def _identity(self, use: _Use) -> str | None:
        return self._files.identity(use.path) if use.path else None

    def _take_out(
        self,
        items: Sequence[Item],
        uses: Callable[[Iterable[Item]], Iterator[_Use]],
        key: _Key,
        note: Callable[[list[_Use]], None],
    ) -> Sequence[Item]:
        """Note every group of uses that have a key in common."""
        for group in _groups(items, uses, key):
            note(group)
        return self._left(items)

    def _take_out_copies(
        self, items: Sequence[Item], uses: Callable[[Iterable[Item]], Iterator[_Use]]
    ) -> Sequence[Item]:
        """Note files of the same content in two splits."""
        files = [use for use in uses(items) if use.path]
        if len(files) <= MAX_COMPARED:
            for group in _copies(files):
                self._note_leak(group, "a copy of it", uses is _pictures)
        return self._left(items)

    def _left(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items without those, and the captions, that were removed."""
        if not self._removed:
            return items
        left = []
        for item in items:
            captions = tuple(one for one in item.captions if id(one) not in self._removed)
            if id(item) not in self._removed and captions:
                left.append(item if len(captions) == len(item.captions) else replace(item, captions=captions))
            elif id(item) not in self._removed and self._bad.skip:
                self._note(_Use(item), "no caption is left", captions=0)
        self._removed.clear()
        return left

    def _note(self, use: _Use, reason: str, captions: int | None = None) -> None:
        self._removed.add(id(use.caption or use.item))
        lost = (1 if use.caption else len(use.item.captions)) if captions is None else captions
        name = use.caption.utterance if use.caption else use.item.image_id
        self._bad.add(
            use.place,
            reason,
            what="caption" if use.caption else "picture",
            name=name,
            split=use.item.split,
            captions=lost,
        )

    def _note_leak(self, group: list[_Use], other: str, pictures: bool) -> list[_Use]:
        """Note what is in another split than the one that is kept, and give the rest."""
        kept = next((use for use in group if use.item.split != _TRAIN), group[0])
        rest = []
        for use in group:
            splits = {use.item.split, kept.item.split}
            if len(splits) == 1 or (pictures and splits <= self._shared):
                rest.append(use)
                continue
            name = "picture" if pictures else "recording"
            where = f"{kept.path} at {kept.place}" if use.path != kept.path else kept.place
            line = f"{name} {use.path} is in split {use.item.split}, {other} in split {kept.item.split}: {where}"
            self._note(use, line)
        return rest

    def _note_shared_picture(self, group: list[_Use]) -> None:
        self._note_leak(group, "and", pictures=True)

    def _note_repeated_recording(self, group: list[_Use]) -> None:
        seen: dict[tuple[int, str | None], _Use] = {}
        for use in self._note_leak(group, "and", pictures=False):
            first = seen.setdefault((id(use.item), _utterance(use)), use)
            if first is not use:
                self._note(use, f"the same picture and recording as at {first.place}")
        if len(seen) > 1:
            places = [use.place for use in seen.values()][:2]
            self._shared_recordings.append(
                f"recording {group[0].path} is that of several captions: {' and '.join(places)}"
            )

    def _note_utterance(self, group: list[_Use]) -> None:
        first = self._identity(group[0])
        for use in group[1:]:
            if first is None or self._identity(use) != first:  # one recording under one id has been looked at
                self._note(
                    use, f"utterance {_utterance(use)} comes again: another recording has it at {group[0].place}"
                )

    def _note_image_id(self, group: list[_Use]) -> None:
        for use in group[1:]:
            self._note(use, f"picture {use.item.image_id} comes again: first at {group[0].place}")


def check_split_names(items: Iterable[Item]) -> None:
    """See that no two splits differ in capitals only.

    Raises:
        UserError: Two do, so that one is likely a slip.
    """
    first: dict[str, Item] = {}
    for item in {item.split: item for item in reversed(list(items))}.values():
        other = first.setdefault(item.split.casefold(), item)
        if other is not item:
            places = " and ".join(f"{one.split!r} ({one.place or one.image_id})" for one in (item, other))
            raise UserError(f"splits {places} differ in capitals only: write them alike")


def _pictures(items: Iterable[Item]) -> Iterator[_Use]:
    return (_Use(item) for item in items)


def _captions(items: Iterable[Item]) -> Iterator[_Use]:
    return (_Use(item, caption) for item in items for caption in item.captions)


def _utterance(use: _Use) -> str | None:
    return use.caption.utterance if use.caption else None


def _groups(items: Sequence[Item], uses: Callable[[Iterable[Item]], Iterator[_Use]], key: _Key) -> list[list[_Use]]:
    """The uses that have a key in common; where there are none, nothing but the keys is kept in memory."""
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
    """Groups of files of the same content that are in more than one split: by size, by some bytes, then by all."""
    groups = [uses]
    with ThreadPoolExecutor(_THREADS) as pool:
        for measure in (_size, _sample, _checksum):
            flat = [(number, use) for number, group in enumerate(groups) for use in group]
            chunks = [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]
            measured = pool.map(lambda chunk, f=measure: [f(use.path) for _, use in chunk], chunks)
            alike: dict[tuple[int, int | str], list[_Use]] = {}
            for (number, use), value in zip(flat, (one for chunk in measured for one in chunk), strict=True):
                if value is not None:
                    alike.setdefault((number, value), []).append(use)
            groups = [group for group in alike.values() if len({use.item.split for use in group}) > 1]
    return groups


# Of a file; none of one that cannot be read or is empty, which the writer names.


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size or None
    except OSError:
        return None


def _sample(path: Path) -> str | None:
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


def _checksum(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None
