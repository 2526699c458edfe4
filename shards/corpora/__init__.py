"""The corpora that make_shards reads: a module each, imported when it is asked for.

A module has `add_arguments(parser)`, which adds its own options, and `read(options) -> list[Item]`; its docstring shows
the layout on disk.
"""

import argparse
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from shards.corpora.item import Item
from shards.corpora.lists import note_list
from shards.errors import UserError

# Name of the module -> its line in the help.
CORPORA = {
    "scenes": "drawn scenes with synthetic speech, made here",
    "flickr8k": "Flickr8k Audio Caption Corpus",
    "spokencoco": "SpokenCOCO, with the Karpathy split if its JSON is given",
    "places": "Places Audio Captions",
    "table": "your own data: a CSV or JSON lines file that names pictures and recordings",
}


def module(name: str) -> ModuleType:
    """Import the module of a corpus."""
    return import_module(f"shards.corpora.{name}")


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


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark; a `UserError` names it if it cannot be read."""
    try:
        data = path.read_bytes()
        note_list(path, data)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from None


def read_json(path: Path) -> Any:
    """A JSON file; a `UserError` names it if it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): is the download complete?") from None


def checked(items: Sequence[Item], options: argparse.Namespace) -> list[Item]:
    """The items, once every file they name is seen to exist; with `--skip-bad` the writer drops the missing ones.

    Raises:
        UserError: files are missing; it names the first and says how many.
    """
    if not getattr(options, "skip_bad", False):
        sources = [source for item in items for source in (item.picture, *(one.audio for one in item.captions))]
        listed: dict[str, set[str]] = {}
        missing = [source for source in sources if isinstance(source, Path) and not _is_listed(source, listed)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{missing[0]} is missing{more}: complete the corpus, or drop such samples by --skip-bad")
    return list(items)


def _is_listed(path: Path, listed: dict[str, set[str]]) -> bool:
    # One listing a folder is far quicker than a question a file where the folder is on a network.
    folder, name = os.path.split(path)
    if folder not in listed:
        try:
            listed[folder] = set(os.listdir(folder or "."))
        except (OSError, ValueError):  # the latter for a name that no file can have
            listed[folder] = set()
    return name in listed[folder]
