"""The corpora that make_shards reads: one module each, imported on demand.

A module has `add_arguments(parser)` for its options and `read(options, bad) -> list[Item]`, which adds the records that
cannot be used to `bad`. Its docstring shows the layout on disk. `load` reads a corpus, locates its files and checks it
for duplicates.

A module may also have `splits_sharing_pictures(items) -> set[str]`: splits that may have pictures in common with one
another, which is then no leak; see `places.py`.

A corpus is listed in `CORPORA`; where its module has another name or is in a subpackage, also in `_MODULES`.
"""

import argparse
import gc
import logging
import os
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

logger = logging.getLogger(__name__)

# Name of the corpus -> its line in the help.
CORPORA = {
    "scenes": "drawn scenes with synthetic speech, made here",
    "flickr8k": "Flickr8k Audio Caption Corpus",
    "spokencoco": "SpokenCOCO, with the Karpathy split if its JSON is given",
    "places": "Places Audio Captions",
    "table": "your own data: a CSV or JSON lines file that names pictures and audio files",
    "hf-pairs": "data sets of the hub with qrels, in parquet files",
    "webdataset": "your own data: tars that stock webdataset writes, with other names for the members",
}

# Modules that are not named like their corpus.
_MODULES = {"hf-pairs": "stored.hf_pairs", "webdataset": "stored.webdataset"}


@dataclass(frozen=True)
class Corpus:
    """A checked corpus, ready to be written."""

    items: list[Item]  # pictures with their captions
    dropped: "list[Dropped]" = field(default_factory=list)  # what was left out with `--skip-bad`


def module(name: str) -> ModuleType:
    """Import the module of a corpus."""
    return import_module(f"shards.corpora.{_MODULES.get(name, name)}")


def load(name: str, options: argparse.Namespace) -> Corpus:
    """Read a corpus and check all of it before anything is written.

    Args:
        name: Name of the corpus.
        options: Options of the module, and `skip_bad`: whether bad records and duplicates are dropped.

    Raises:
        UserError: A file of the corpus is missing or malformed, or without `skip_bad`: a record is bad, a file that it
            names is missing, or there are duplicates.
    """
    # Imported late to keep --help fast.
    from shards.corpora.file_finder import FileFinder
    from shards.corpora.records import BadRecords
    from shards.corpora.repeats import RepeatFinder, check_split_names

    bad = BadRecords(options.skip_bad)
    with _without_garbage_collection():
        items = module(name).read(options, bad)
        bad.raise_if_any()
        splits = dict.fromkeys(item.split for item in items)
        check_split_names(items)
        files = FileFinder()
        items = located(items, files, options.skip_bad)
        splits_sharing_pictures = getattr(module(name), "splits_sharing_pictures", lambda items: ())(items)
        repeats = RepeatFinder(bad, files, splits_sharing_pictures)
        items = repeats.without_repeats(items)
        bad.raise_if_any("keep one of the two, or --skip-bad drops and reports duplicates")
    if not items and bad.dropped:
        raise UserError(f"no sample is left to write: {bad.dropped[0].name}: {bad.dropped[0].reason}")
    for split in splits.keys() - {item.split for item in items}:
        logger.warning("%s: split %s is empty: all of its samples were dropped", name, split)
    if repeats.remark:
        logger.warning("%s: %s", name, repeats.remark)
    return Corpus(items, bad.dropped)


def add_root(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add `--root`, the folder or file that a corpus is read from."""
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help=help_text)


def existing(root: Path, *candidates: str, hint: str) -> Path:
    """Return the first of the candidate paths below `root` that exists.

    Raises:
        UserError: None exists; the message names the first and ends with the hint.
    """
    # os.path, since pathlib raises if a folder is not accessible or a name is too long.
    if not os.path.exists(root):
        raise UserError(f"{root}: no such folder, or no access to it (--root): {hint}")
    for candidate in candidates:
        if os.path.exists(root / candidate):
            return root / candidate
    raise UserError(f"{root / candidates[0]} is missing: {hint}")


def located(items: Sequence[Item], files: "FileFinder", skip_missing: bool) -> list[Item]:
    """Replace the paths in items by those of the files on disk, which may be spelled in another Unicode form.

    Args:
        items: The corpus.
        files: Finds the files.
        skip_missing: Keep the paths of missing files and warn about the first: the writer drops and reports them.

    Raises:
        UserError: Files are missing; the message names the first, gives the reason and counts the others.
    """
    missing: dict[Path, str] = {}  # file -> where in the corpus it is named first

    def find(path: Path, where: str) -> Path:
        on_disk = files.find(path)
        if on_disk is None:
            missing.setdefault(path, where)
        return on_disk or path

    located_items = [_located(item, find) for item in items]
    if missing:
        path, named = next(iter(missing.items()))
        reason, hint = files.why_missing(path)
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        prefix = f"{named}: " if named else ""
        message = f"{prefix}{path} {reason}{more}: {hint}"
        if not skip_missing:
            joint = " Or" if message.endswith("?") else ", or"
            raise UserError(f"{message}{joint} drop such samples by --skip-bad")
        logger.warning("%s", message)
    return located_items


def _located(item: Item, find: Callable[[Path, str], Path]) -> Item:
    picture = find(item.picture, item.where) if isinstance(item.picture, Path) else item.picture
    captions = []
    for caption in item.captions:
        audio = find(caption.audio, caption.where) if isinstance(caption.audio, Path) else caption.audio
        captions.append(caption if audio is caption.audio else replace(caption, audio=audio))
    if picture is item.picture and all(map(lambda a, b: a is b, captions, item.captions)):
        return item
    return replace(item, picture=picture, captions=tuple(captions))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which takes half of the time: millions of objects are created, none in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
