"""The corpora that make_shards reads: a module each, imported when it is asked for.

A module has `add_arguments(parser)`, which adds its own options, and `read(options, bad) -> list[Item]`; its docstring
shows the layout on disk. `load` reads a corpus, finds its files and looks for what it holds twice.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from shards.corpora.item import Item
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.corpora.file_finder import FileFinder
    from shards.report import Dropped

# Name of the module -> its line in the help.
CORPORA = {
    "scenes": "drawn scenes with synthetic speech, made here",
    "flickr8k": "Flickr8k Audio Caption Corpus",
    "spokencoco": "SpokenCOCO, with the Karpathy split if its JSON is given",
    "places": "Places Audio Captions",
    "table": "your own data: a CSV or JSON lines file that names pictures and recordings",
}


@dataclass(frozen=True)
class Corpus:
    """A corpus that is ready to be written.

    Attributes:
        items: Its pictures with their captions.
        dropped: What was left out with `--skip-bad`.
    """

    items: list[Item]
    dropped: "list[Dropped]" = field(default_factory=list)


def module(name: str) -> ModuleType:
    """Import the module of a corpus."""
    return import_module(f"shards.corpora.{name}")


def load(name: str, options: argparse.Namespace) -> Corpus:
    """Read a corpus and look at the whole of it before any of it is written.

    Args:
        name: Of its module.
        options: The module's own, and `skip_bad`: whether bad records, and what comes twice, are dropped.

    Raises:
        UserError: A file of the corpus is missing or not as it should be, or without `skip_bad`: a record is bad, a
            file that one names is missing, or something comes twice.
    """
    # Late, since --help need not wait for them.
    from shards.corpora.file_finder import FileFinder
    from shards.corpora.records import BadRecords
    from shards.corpora.repeats import RepeatFinder, check_split_names

    bad = BadRecords(options.skip_bad)
    with _without_garbage_collection():
        items = module(name).read(options, bad)
        bad.settle()
        splits = dict.fromkeys(item.split for item in items)
        check_split_names(items)
        files = FileFinder()
        items = located(items, files, options.skip_bad)
        share_pictures = getattr(module(name), "share_pictures", lambda items: ())(items)
        repeats = RepeatFinder(bad, files, share_pictures)
        items = repeats.without_repeats(items)
        bad.settle("leave one of the two, or --skip-bad drops and reports what comes twice")
    if not items and bad.dropped:
        raise UserError(f"no sample is left to write: {bad.dropped[0].name}: {bad.dropped[0].reason}")
    for split in splits.keys() - {item.split for item in items}:
        print(f"{name}: split {split} is empty, since all of it was dropped", file=sys.stderr)
    if repeats.remark:
        print(f"{name}: {repeats.remark}", file=sys.stderr)
    return Corpus(items, bad.dropped)


def add_root(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add `--root`, which every corpus that lies on disk needs."""
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help=help_text)


def existing(root: Path, *candidates: str, hint: str) -> Path:
    """The first of the candidate paths below `root` that exists.

    Raises:
        UserError: none does; it names the first and ends with the hint.
    """
    # os.path, since pathlib raises where a folder may not be entered or a name is too long.
    if not os.path.exists(root):
        raise UserError(f"{root}: no such folder, or no access to it (--root): {hint}")
    for candidate in candidates:
        if os.path.exists(root / candidate):
            return root / candidate
    raise UserError(f"{root / candidates[0]} is missing: {hint}")


def located(items: Sequence[Item], files: "FileFinder", skip_missing: bool) -> list[Item]:
    """The items with every file they name as it is called on disk.

    Args:
        items: The corpus.
        files: Finds the files.
        skip_missing: Leave missing files as they are, and say why the first is missing: the writer drops and reports
            them.

    Raises:
        UserError: Files are missing; it names the first, says why and how many there are.
    """
    missing: dict[Path, str] = {}  # with the place that names it first

    def find(path: Path, place: str) -> Path:
        found = files.find(path)
        if found is None:
            missing.setdefault(path, place)
        return found or path

    located_items = [_located(item, find) for item in items]
    if missing:
        path, place = next(iter(missing.items()))
        what, mend = files.why_missing(path)
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        where = f"{place}: " if place else ""
        line = f"{where}{path} {what}{more}: {mend}"
        if not skip_missing:
            joint = " Or" if line.endswith("?") else ", or"
            raise UserError(f"{line}{joint} drop such samples by --skip-bad")
        print(line, file=sys.stderr)
    return located_items


def _located(item: Item, find: Callable[[Path, str], Path]) -> Item:
    picture = find(item.picture, item.place) if isinstance(item.picture, Path) else item.picture
    captions = []
    for one in item.captions:
        audio = find(one.audio, one.place) if isinstance(one.audio, Path) else one.audio
        captions.append(one if audio is one.audio else replace(one, audio=audio))
    if picture is item.picture and all(map(lambda a, b: a is b, captions, item.captions)):
        return item
    return replace(item, picture=picture, captions=tuple(captions))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of objects are made here and none in a circle: looking for circles would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
