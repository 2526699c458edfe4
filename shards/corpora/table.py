"""Your own data: a table of pictures and recordings, as CSV (first line: the names of the columns) or JSON lines.

    image,audio,text,speaker,split
    photos/1.jpg,speech/1a.wav,a dog runs,anna,train
    photos/1.jpg,speech/1b.flac,a running dog,ben,train
    photos/2.jpg,speech/2.mp3,,,test

`image` and `audio` are paths, absolute or relative to the table's folder. `text`, `speaker` and `split` may be empty or
absent; the split is then train. Rows with the same image are one sample. In place of the comma there may be a semicolon
or a tab; columns of other names are not read.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, file_name, optional_text
from shards.corpora.table_rows import COLUMNS, CSV, JSON_LINES, Rows
from shards.errors import UserError
from shards.files import listed
from shards.manifest import SPLIT

_HINT = "--root is the table itself, or the folder that holds it as its only .csv, .tsv or .jsonl file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "the table (.csv, .tsv, .jsonl), or a folder with one table in it")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """The pictures in the order of their first rows; one of two splits is an item of each.

    Args:
        options: What `add_arguments` added.
        bad: Notes the rows that cannot be used.

    Raises:
        UserError: There is no table, or its columns are not those of one.
    """
    table = _find(options.root)
    rows = Rows(table, bad)
    pictures: dict[tuple[str, str], list[Caption]] = {}
    for number, row in rows:
        try:
            picture, audio = _path(row, "image"), _path(row, "audio")
            split, text, speaker = _split(row), _word(row, "text"), _word(_with_number_as_text(row), "speaker")
        except BadRecord as reason:
            bad.add(f"{table} line {number}", reason)
            continue
        caption = Caption(audio, table.parent / audio, text, speaker, f"{table.name} line {number}")
        pictures.setdefault((picture, split), []).append(caption)
    if not pictures and not bad.dropped:
        raise UserError(f"{table} has no rows")
    if rows.unread:
        names = ", ".join(map(repr, sorted(rows.unread)))
        print(f"table: columns of {table} that are not read: {names}; known are {', '.join(COLUMNS)}", file=sys.stderr)
    return [
        Item(name, split, table.parent / name, tuple(spoken), place=spoken[0].place)
        for (name, split), spoken in pictures.items()
    ]


def _find(root: Path) -> Path:
    existing(root, ".", hint=_HINT)
    if os.path.isfile(root):
        if root.suffix not in (*CSV, *JSON_LINES):
            raise UserError(f"{root} is no table: its name has to end in .csv, .tsv or .jsonl")
        return root
    tables = sorted(path for path in listed(root) if path.suffix in (*CSV, ".jsonl", ".ndjson"))
    if len(tables) != 1:
        raise UserError(f"{root} holds {len(tables)} tables (.csv, .tsv, .jsonl), give one file as --root")
    return tables[0]


def _path(row: dict[str, Any], column: str) -> str:
    return os.path.normpath(file_name(row, column).strip())


def _word(row: dict[str, Any], column: str) -> str | None:
    return (optional_text(row, column) or "").strip() or None


def _split(row: dict[str, Any]) -> str:
    split = _word(row, "split") or "train"
    if not SPLIT.fullmatch(split):
        raise BadRecord(f"split is {split!r}, expected a name of letters, digits, _ and - only")
    return split


def _with_number_as_text(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a speaker's number as CSV would have it."""
    return row | {"speaker": str(row["speaker"])} if type(row.get("speaker")) is int else row
