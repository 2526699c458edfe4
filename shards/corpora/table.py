"""Your own data: a table of pictures and recordings, as CSV (first line: the names of the columns) or JSON lines.

    image,audio,text,speaker,split
    photos/1.jpg,speech/1a.wav,a dog runs,anna,train
    photos/1.jpg,speech/1b.flac,a running dog,ben,train
    photos/2.jpg,speech/2.mp3,,,test

`image` and `audio` are paths, absolute or relative to the table's folder. `text`, `speaker` and `split` may be empty or
absent; the split is then train. Rows with the same image are one sample.
"""

import argparse
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.corpora import add_root, checked, existing, read_text
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.listing import listed

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_HINT = "--root is the table itself, or the folder that holds it as its only .csv, .tsv or .jsonl file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "the table (.csv, .tsv, .jsonl), or a folder with one table in it")


def read(options: argparse.Namespace) -> list[Item]:
    """The pictures in the order of their first rows.

    Raises:
        UserError: there is no table, or a row lacks a path, or has its picture in another split than an earlier row.
    """
    table = _find(options.root)
    pictures: dict[str, tuple[str, list[Caption]]] = {}
    for number, row in _rows(table):
        picture, audio = (_path(row, column, table, number) for column in ("image", "audio"))
        split = _value(row, "split") or "train"
        first, captions = pictures.setdefault(picture, (split, []))
        if first != split:
            raise UserError(f"{table} line {number}: {picture} is in split {split}, in an earlier line in {first}")
        captions.append(Caption(audio, table.parent / audio, _value(row, "text"), _value(row, "speaker")))
    if not pictures:
        raise UserError(f"{table} has no rows")
    items = [Item(name, split, table.parent / name, tuple(spoken)) for name, (split, spoken) in pictures.items()]
    return checked(items, options)


def _find(root: Path) -> Path:
    existing(root, ".", hint=_HINT)
    if os.path.isfile(root):
        if root.suffix not in (*_SEPARATORS, *_JSON_LINES):
            raise UserError(f"{root} is no table: its name has to end in .csv, .tsv or .jsonl")
        return root
    tables = sorted(path for path in listed(root) if path.suffix in (*_SEPARATORS, ".jsonl", ".ndjson"))
    if len(tables) != 1:
        raise UserError(f"{root} holds {len(tables)} tables (.csv, .tsv, .jsonl), give one file as --root")
    return tables[0]


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values of every row."""
    text = read_text(table)
    if table.suffix in _SEPARATORS:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_SEPARATORS[table.suffix], strict=True)
        before = 0  # the last line of the row before
        try:
            if missing := {"image", "audio"} - set(reader.fieldnames or ()):
                raise UserError(f"{table} line 1: no column {' and no column '.join(sorted(missing))}")
            before = reader.line_num
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{table} line {reader.line_num}: not as many fields as in line 1: is a text without quotes?"
                    )
                before = reader.line_num
                yield before, row
        except csv.Error as error:
            raise UserError(f"{table} line {before + 1}: {error}: is a quote not closed?") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold what splitlines takes for an end of line
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table} line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{table} line {number} is not an object like " + '{"image": ..., "audio": ...}')
            yield number, row


def _path(row: dict[str, Any], column: str, table: Path, number: int) -> str:
    value = _value(row, column)
    if value is None:
        raise UserError(f"{table} line {number}: no {column}")
    return os.path.normpath(value)


def _value(row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    return str(value).strip() or None if value is not None else None
