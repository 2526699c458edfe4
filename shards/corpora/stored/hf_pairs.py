"""Data sets of the Hugging Face hub that pair pictures with recordings by relevance, as mteb reads them.

    ROOT/                                       as `hf download --repo-type dataset NAME --local-dir ROOT` makes it
        corpus/test-00000-of-00001.parquet      id, image {bytes, path}
        queries/test-00000-of-00001.parquet     id, audio {bytes, path}; text, speaker, language if there are any
        qrels/test-00000-of-00001.parquet       query-id, corpus-id, score

The columns say what a file is, so pictures may be the queries as well. A recording is a caption of the picture that it
is relevant to (score above 0). The split is that of the file of qrels, or `--split NAME`; `--split-list train=FILE`
divides the pictures by lists of ids or file names, one a line, such as Flickr_8k.trainImages.txt. Needs pyarrow, the
extra `[parquet]`.
"""

import argparse
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, integer, optional_text, text_or_integer
from shards.corpora.text_files import read_text
from shards.errors import UserError
from shards.manifest import SPLIT
from shards.stored import StoredFile

logger = logging.getLogger(__name__)

MAX_ROW_GROUP = 1 << 31  # bytes that are decoded at a time
_HINT = "--root is a local copy of the data set, with its .parquet files"
_IDS = ("id", "_id")
_RELEVANCE = ("query-id", "corpus-id")
_DESCRIPTIONS = ("text", "speaker", "language")


@dataclass(frozen=True)
class ParquetValue(StoredFile):
    """The bytes in one row of a parquet file."""

    container: str
    name: str
    row_group: int
    row: int  # in the row group
    column: str
    size: int = 0  # unknown until it is read
    container_bytes: int = 0

    def read(self) -> bytes:
        """Read it; see `StoredFile`. The last row groups are kept in memory."""
        value = _column(self.container, self.row_group, self.column)[self.row].as_py()
        if not isinstance(value, bytes):
            raise UserError(f"{self}: its bytes are not in the file: take a copy of the data set that has them")
        return value


@lru_cache(maxsize=4)  # pictures and recordings of neighboring rows
def _column(path: str, row_group: int, column: str) -> Any:
    """Decode the bytes in a column of a row group."""
    with _opened(path) as file:
        if file.metadata.row_group(row_group).total_byte_size > MAX_ROW_GROUP:
            raise UserError(f"{path}: row group {row_group} has more than {MAX_ROW_GROUP:,} bytes: write smaller ones")
        try:
            array = file.read_row_group(row_group, columns=[column]).column(0)
            return array.combine_chunks().field("bytes") if array.type.num_fields else array
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: row group {row_group} cannot be read ({error})") from None


def _opened(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("hf-pairs reads parquet files: pip install 'speech-image-toolkit[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file ({' '.join(str(error).split())})") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "local copy of the data set")
    parser.add_argument("--split", metavar="NAME", help="split of all pictures (default: that of the qrels)")
    parser.add_argument(
        "--split-list",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a split's pictures, by id or file name, one a line; several times; other pictures are left out",
    )


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures in the order of the files, with their captions in the order of the qrels.

    Raises:
        UserError: There is no parquet file, or no file with one of the roles.
    """
    existing(options.root, ".", hint=_HINT)
    pairs = _Pairs(bad)
    for path in sorted(options.root.rglob("*.parquet")):
        if not any(part.startswith(".") for part in path.relative_to(options.root).parts):
            pairs.add_file(path)
    pairs.check(options.root)
    lists = _split_lists(options)
    items, silent, unlisted = [], 0, 0
    for image_id, picture in pairs.pictures.items():
        captions = pairs.captions.get(image_id, {})
        split = options.split or next(iter(captions.values()), "")
        if lists:
            names = (image_id, os.path.basename(picture.path), Path(picture.path).stem)
            split = next((lists[name] for name in names if name in lists), "")
            unlisted += not split
        silent += not captions
        if captions and split:
            if not SPLIT.fullmatch(split):
                raise UserError(f"split {split!r}: expected letters, digits, _ and -: give --split NAME")
            items.append(Item(image_id, split, picture.value, tuple(captions), where=picture.where))
    for count, what in ((silent, "have no caption"), (unlisted, "are in no --split-list")):
        if count:
            logger.warning("hf-pairs: %s pictures %s and are left out", f"{count:,}", what)
    return items


def _split_lists(options: argparse.Namespace) -> dict[str, str]:
    """Return the split of each id or name in the lists."""
    splits: dict[str, str] = {}
    for one in options.split_list:
        name, separator, path = one.partition("=")
        if not separator or not SPLIT.fullmatch(name):
            raise UserError(f"--split-list {one}: expected NAME=FILE such as train=Flickr_8k.trainImages.txt")
        for line in filter(None, map(str.strip, read_text(Path(path)).split("\n"))):
            if splits.setdefault(line, name) != name:
                raise UserError(f"{path}: {line} is in the list of {splits[line]} too")
    return splits


@dataclass(frozen=True)
class _Stored:
    value: ParquetValue
    path: str  # that the data set names, "" if none
    row: dict[str, Any]
    where: str


class _Pairs:
    """Pictures, recordings and their relevance, from the files of a data set."""

    def __init__(self, bad: BadRecords) -> None:
        self.bad = bad
        self.pictures: dict[str, _Stored] = {}
        self.recordings: dict[str, _Stored] = {}
        self._relevance: list[tuple[str, str, str, str]] = []  # query, document, split, where
        self.captions: dict[str, dict[Caption, str]] = {}  # by picture: captions and their splits

    def add_file(self, path: Path) -> None:
        """Read ids, descriptions and relevance of a file; pictures and recordings stay on the disk."""
        with _opened(os.path.abspath(path)) as file:
            columns = set(file.schema_arrow.names)
            if columns.issuperset(_RELEVANCE):
                self._add_relevance(path, file)
            for column, known in (("image", self.pictures), ("audio", self.recordings)):
                if column in columns and columns.intersection(_IDS):
                    self._add_values(path, file, column, known)

    def check(self, root: Path) -> None:
        """Check that there are files of each role, and pair pictures and recordings.

        Raises:
            UserError: A role has no file.
        """
        roles = {"id, image": self.pictures, "id, audio": self.recordings, ", ".join(_RELEVANCE): self._relevance}
        for columns, rows in roles.items():
            if not rows and not self.bad.dropped:
                raise UserError(f"{root} has no .parquet file with rows and the columns {columns}: {_HINT}")
        paired: dict[str, str] = {}
        for query, document, split, where in self._relevance:
            image_id, utterance = (query, document) if query in self.pictures else (document, query)
            if image_id not in self.pictures or utterance not in self.recordings:
                self.bad.add(where, f"no picture and recording have the ids {query} and {document}")
            elif paired.setdefault(utterance, image_id) != image_id:
                self.bad.add(where, f"recording {utterance} is relevant to {paired[utterance]} too")
            else:
                self._add_caption(image_id, utterance, split)

    def _add_caption(self, image_id: str, utterance: str, split: str) -> None:
        stored = self.recordings[utterance]
        try:
            text, speaker, language = (optional_text(stored.row, name) for name in _DESCRIPTIONS)
        except BadRecord as reason:
            self.bad.add(stored.where, reason)
            return
        caption = Caption(utterance, stored.value, text, speaker, stored.where, language)
        self.captions.setdefault(image_id, {}).setdefault(caption, split)

    def _add_values(self, path: Path, file: Any, column: str, known: dict[str, _Stored]) -> None:
        names = [name for name in (*_IDS, *_DESCRIPTIONS) if name in file.schema_arrow.names]
        field = file.schema_arrow.field(column).type
        has_path = field.num_fields and field.get_field_index("path") >= 0
        size = path.stat().st_size
        for group, number, row in _rows(path, file, [*names, *([f"{column}.path"] if has_path else [])]):
            where = f"{path} row {number}"
            own = row.pop(column, None)
            try:
                identity = _text_id(row, next(name for name in _IDS if name in row))
            except BadRecord as reason:
                self.bad.add(where, reason, what="picture" if column == "image" else "caption")
                continue
            if identity in known:
                self.bad.add(where, f"id {identity} is repeated: first at {known[identity].where}")
                continue
            name = f"{column} {identity}"
            within = number - sum(file.metadata.row_group(n).num_rows for n in range(group))
            value = ParquetValue(
                os.path.abspath(path), name, group, within, f"{column}.bytes" if has_path else column, 0, size
            )
            known[identity] = _Stored(value, str((own or {}).get("path") or ""), row, where)

    def _add_relevance(self, path: Path, file: Any) -> None:
        split = re.sub(r"-\d+-of-\d+$", "", path.stem)
        scored = "score" in file.schema_arrow.names
        for _, number, row in _rows(path, file, [*_RELEVANCE, *(["score"] if scored else [])]):
            where = f"{path} row {number}"
            try:
                query, document = (_text_id(row, name) for name in _RELEVANCE)
                score = row.get("score", 1)
                if (isinstance(score, float) or integer(row | {"score": score}, "score")) and score > 0:
                    self._relevance.append((query, document, split, where))
            except BadRecord as reason:
                self.bad.add(where, reason)


def _rows(path: Path, file: Any, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield row group, number and values of the rows of a file."""
    number = 0
    for group in range(file.metadata.num_row_groups):
        try:
            rows = file.read_row_group(group, columns=columns).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: row group {group} cannot be read ({error})") from None
        for row in rows:
            yield group, number, row
            number += 1


def _text_id(row: dict[str, Any], name: str) -> str:
    if not (text := text_or_integer(row, name)):
        raise BadRecord(f"{name} is empty")
    return text
