"""The rows of a table, from CSV or from JSON lines, by the names of its columns."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.corpora.records import BadRecord, BadRecords, as_object
from shards.corpora.text_files import parse_json, read_text
from shards.errors import UserError

COLUMNS = ("image", "audio", "text", "speaker", "split")
NEEDED = COLUMNS[:2]
CSV = {".csv": ",", ".tsv": "\t"}  # with the separator that is expected
JSON_LINES = (".jsonl", ".json", ".ndjson")
_SEPARATORS = (",", "\t", ";")
_SEPARATOR_LINE = re.compile(r"\"?sep=([,;\t|])\"?[,;\t|]*", re.IGNORECASE)  # for Excel
_HEADER_LENGTH = 1 << 16  # characters in which the first line is looked for
_SHOWN, _COLUMNS_SHOWN = 60, 12  # characters of a name, and names, in a message
_KNOWN = frozenset(COLUMNS)


class Rows:
    """Gives line number and known columns of every row that has fields as it should.

    Args:
        table: The file.
        bad: Notes the rows that have not.

    Attributes:
        unread: Names of columns that are not known.
    """

    def __init__(self, table: Path, bad: BadRecords) -> None:
        self.table, self.bad = table, bad
        self.unread: set[str] = set()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over the rows; blank ones are passed over.

        Raises:
            UserError: The file cannot be read, its columns are not those of a table, or a quote is not closed.
        """
        text = read_text(self.table)
        return self._csv(text) if self.table.suffix in CSV else self._json_lines(text)

    def _csv(self, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        told = _SEPARATOR_LINE.fullmatch(text.partition("\n")[0])
        rows = self._numbered(_reader(text, told[1] if told else self._separator(text)))
        if told:
            next(rows)
        header_line, header = next(rows, (1, []))
        columns = self._columns(header, header_line)
        for number, row in rows:
            if len(row) == len(header):
                yield number, {name: row[index] for name, index in columns.items()}
            else:
                reason = f"not as many fields as in line {header_line}: is a text without quotes?"
                self.bad.add(f"{self.table} line {number}", reason)

    def _separator(self, text: str) -> str:
        """What divides the columns: the expected one, or another by which alone the first line has those needed."""
        expected = CSV[self.table.suffix]
        for separator in (expected, *_SEPARATORS):
            try:
                header = next(filter(_is_filled, _reader(text[:_HEADER_LENGTH], separator)), [])
            except csv.Error:
                continue
            if set(NEEDED) <= set(map(_column, header)):
                return separator
        return expected

    def _numbered(self, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
        """Number of the first line, and fields, of every row that is not blank."""
        last = 0
        try:
            for row in reader:
                first, last = last + 1, reader.line_num  # type: ignore[attr-defined]
                if _is_filled(row):
                    yield first, row
        except csv.Error as error:
            raise UserError(f"{self.table} line {last + 1}: {error}: is a quote not closed?") from None

    def _columns(self, header: Sequence[str], line: int) -> dict[str, int]:
        """Where in a row the known columns are."""
        names = [_column(name) for name in header]
        for name in names:
            if name and names.count(name) > 1:
                raise UserError(
                    f"{self.table} line {line}: column {name[:_SHOWN]} comes {names.count(name)} times: rename one"
                )
        missing = [name for name in NEEDED if name not in names]
        if missing:
            shown = ", ".join(repr(name[:_SHOWN]) for name in header[:_COLUMNS_SHOWN]) or "nothing"
            more = f" and {len(header) - _COLUMNS_SHOWN} more" if len(header) > _COLUMNS_SHOWN else ""
            raise UserError(
                f"{self.table} line {line}: no column {' and no column '.join(missing)}: it has {shown}{more}; the "
                f"first line has to name the columns image and audio, and if you like {', '.join(COLUMNS[2:])}, with "
                "commas between"
            )
        self.unread |= {name.strip() for name in header if name.strip() and _column(name) not in COLUMNS}
        return {name: names.index(name) for name in COLUMNS if name in names}

    def _json_lines(self, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):  # a text may hold what splitlines takes for an end of line
            if not line.strip():
                continue
            try:
                yield number, self._known(as_object(parse_json(line)))
            except (ValueError, RecursionError) as error:
                self.bad.add(f"{self.table} line {number}", f"it is not JSON ({error})")
            except BadRecord as reason:
                line = 'each line is an object like {"image": ..., "audio": ...}'
                self.bad.add(f"{self.table} line {number}", f"{reason}: {line}")

    def _known(self, row: dict[str, Any]) -> dict[str, Any]:
        """The known columns of a row.

        Raises:
            BadRecord: Two names are one column.
        """
        if row.keys() <= _KNOWN:
            return row
        known: dict[str, Any] = {}
        for key, value in row.items():
            name = _column(key)
            if name not in _KNOWN:
                self.unread.add(key[:_SHOWN])
            elif name in known:
                raise BadRecord(f"the key {name!r} comes twice")
            else:
                known[name] = value
        return known


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)


def _is_filled(row: Sequence[str]) -> bool:
    return any(map(str.strip, row))


def _column(name: str) -> str:
    """A column's name without blanks around and capitals."""
    return name.strip().lower()
