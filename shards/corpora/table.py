"""Your own data: a table of pictures and audio files, as CSV (with a header line) or JSON lines.

    image,audio,text,speaker,split,language
    photos/1.jpg,speech/1a.wav,a dog runs,anna,train,en
    photos/1.jpg,speech/1b.flac,ein Hund rennt,ben,train,de
    photos/2.jpg,speech/2.mp3,,,test,

`image` and `audio` are paths, absolute or relative to the table's folder. `text`, `speaker`, `split` and `language` may
be empty or absent; the split is then train. Rows with the same image form one sample. The separator may also be a
semicolon or a tab; other columns are ignored.
"""

import argparse
import csv
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, as_object, file_name, optional_text, text_or_integer
from shards.corpora.text_files import parse_json, read_text
from shards.errors import UserError
from shards.files import listed
from shards.manifest import SPLIT

logger = logging.getLogger(__name__)

COLUMNS = ("image", "audio", "text", "speaker", "split", "language")
REQUIRED = COLUMNS[:2]
CSV = {".csv": ",", ".tsv": "\t"}  # ending -> expected separator
JSON_LINES = (".jsonl", ".json", ".ndjson")
_SEPARATORS = (",", "\t", ";")
_SEPARATOR_LINE = re.compile(r"\"?sep=([,;\t|])\"?[,;\t|]*", re.IGNORECASE)  # Excel's hint
_HEADER_LENGTH = 1 << 16  # characters searched for the header
_SHOWN, _COLUMNS_SHOWN = 60, 12  # most characters of a name, and names, in a message
_KNOWN = frozenset(COLUMNS)

_HINT = "--root is the table itself, or the folder that has it as its only .csv, .tsv or .jsonl file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "the table (.csv, .tsv, .jsonl), or a folder with one table in it")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures in the order of their first rows; a picture in two splits is an item of each.

    Raises:
        UserError: There is no table, or required columns are missing.
    """
    table = _find(options.root)
    rows = Rows(table, bad)
    pictures: dict[tuple[str, str], list[Caption]] = {}
    for number, row in rows:
        try:
            picture, audio = _path(row, "image"), _path(row, "audio")
            split, text, language = _split(row), _word(row, "text"), _word(row, "language")
            speaker = _word({"speaker": text_or_integer(row, "speaker")}, "speaker")
        except BadRecord as reason:
            bad.add(f"{table} line {number}", reason)
            continue
        caption = Caption(audio, table.parent / audio, text, speaker, f"{table.name} line {number}", language)
        pictures.setdefault((picture, split), []).append(caption)
    if not pictures and not bad.dropped:
        raise UserError(f"{table} has no rows")
    if rows.ignored:
        names = ", ".join(map(repr, sorted(rows.ignored)))
        logger.warning("table: ignored columns of %s: %s; known columns: %s", table, names, ", ".join(COLUMNS))
    return [
        Item(name, split, table.parent / name, tuple(spoken), where=spoken[0].where)
        for (name, split), spoken in pictures.items()
    ]


def _find(root: Path) -> Path:
    existing(root, ".", hint=_HINT)
    if os.path.isfile(root):
        if root.suffix not in (*CSV, *JSON_LINES):
            raise UserError(f"{root} is not a table: its name has to end in .csv, .tsv or .jsonl")
        return root
    tables = sorted(path for path in listed(root) if path.suffix in (*CSV, ".jsonl", ".ndjson"))
    if len(tables) != 1:
        raise UserError(f"{root} has {len(tables)} tables (.csv, .tsv, .jsonl): give one file as --root")
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


class Rows:
    """Iterates over line number and known columns of every well-formed row."""

    def __init__(self, table: Path, bad: BadRecords) -> None:
        self.table, self.bad = table, bad
        self.ignored: set[str] = set()  # names of unknown columns

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over the rows that are not blank.

        Raises:
            UserError: The file cannot be read, required columns are missing, or a quote is not closed.
        """
        text = read_text(self.table)
        return self._csv(text) if self.table.suffix in CSV else self._json_lines(text)

    def _csv(self, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        hint = _SEPARATOR_LINE.fullmatch(text.partition("\n")[0])
        rows = self._numbered(_reader(text, hint[1] if hint else self._separator(text)))
        if hint:
            next(rows)
        header_line, header = next(rows, (1, []))
        columns = self._columns(header, header_line)
        for number, row in rows:
            if len(row) == len(header):
                yield number, {name: row[index] for name, index in columns.items()}
            else:
                reason = f"number of fields differs from line {header_line}: does a text need quotes?"
                self.bad.add(f"{self.table} line {number}", reason)

    def _separator(self, text: str) -> str:
        """Return the separator with which the header has the required columns: the expected one first."""
        expected = CSV[self.table.suffix]
        for separator in (expected, *_SEPARATORS):
            try:
                header = next(filter(_is_filled, _reader(text[:_HEADER_LENGTH], separator)), [])
            except csv.Error:
                continue
            if set(REQUIRED) <= set(map(_column, header)):
                return separator
        return expected

    def _numbered(self, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of the first line, and the fields, of every row that is not blank."""
        last = 0
        try:
            for row in reader:
                first, last = last + 1, reader.line_num  # type: ignore[attr-defined]
                if _is_filled(row):
                    yield first, row
        except csv.Error as error:
            raise UserError(f"{self.table} line {last + 1}: {error}: is a quote not closed?") from None

    def _columns(self, header: Sequence[str], line: int) -> dict[str, int]:
        """Return the index of each known column.

        Raises:
            UserError: A column is repeated, or a required one is missing.
        """
        names = [_column(name) for name in header]
        for name in names:
            if name and names.count(name) > 1:
                raise UserError(
                    f"{self.table} line {line}: column {name[:_SHOWN]} occurs {names.count(name)} times: rename one"
                )
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            shown = ", ".join(repr(name[:_SHOWN]) for name in header[:_COLUMNS_SHOWN]) or "nothing"
            more = f" and {len(header) - _COLUMNS_SHOWN} more" if len(header) > _COLUMNS_SHOWN else ""
            raise UserError(
                f"{self.table} line {line}: no column {' and no column '.join(missing)}: it has {shown}{more}; the "
                f"first line has to name the columns image and audio, and optionally {', '.join(COLUMNS[2:])}, "
                "separated by commas"
            )
        self.ignored |= {name.strip() for name in header if name.strip() and _column(name) not in COLUMNS}
        return {name: names.index(name) for name in COLUMNS if name in names}

    def _json_lines(self, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits inside texts
            if not line.strip():
                continue
            try:
                yield number, self._known(as_object(parse_json(line)))
            except (ValueError, RecursionError) as error:
                self.bad.add(f"{self.table} line {number}", f"not JSON ({error})")
            except BadRecord as reason:
                expected = 'each line is an object like {"image": ..., "audio": ...}'
                self.bad.add(f"{self.table} line {number}", f"{reason}: {expected}")

    def _known(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the known columns of a row.

        Raises:
            BadRecord: A column is repeated.
        """
        if row.keys() <= _KNOWN:
            return row
        known: dict[str, Any] = {}
        for key, value in row.items():
            name = _column(key)
            if name not in _KNOWN:
                self.ignored.add(key[:_SHOWN])
            elif name in known:
                raise BadRecord(f"the key {name!r} is repeated")
            else:
                known[name] = value
        return known


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)


def _is_filled(row: Sequence[str]) -> bool:
    return any(map(str.strip, row))


def _column(name: str) -> str:
    """Normalize a column's name: strip white space and ignore case."""
    return name.strip().lower()
