"""The written captions of Flickr8k, in the forms in which they are passed on."""

import csv
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

from shards.corpora.records import BadRecords
from shards.corpora.text_files import read_text
from shards.errors import UserError

# As distributed, with a tab before the text; blanks are what editors make of it.
_TOKEN = re.compile(r"(\S+)#([0-9]+)(?:\s+(.*))?")
_KAGGLE = ("image", "caption")


class Texts(NamedTuple):
    """Written captions.

    Attributes:
        path: The file.
        captions: Texts by picture and number.
    """

    path: Path
    captions: dict[tuple[str, str], str]


def picture_name(name: str) -> str:
    """A picture's name on disk: one is called X.jpg.1 in the captions and X.jpg on disk."""
    return re.sub(r"(\.jpg)\.\d+$", r"\1", name)


def read_texts(path: Path, bad: BadRecords) -> Texts:
    """Read lines of "X.jpg#0<TAB>the caption", or Kaggle's table of image and caption.

    Args:
        path: The file.
        bad: Notes lines of neither form, and a caption that has two texts.

    Raises:
        UserError: The file cannot be read.
    """
    text = read_text(path)
    header = tuple(name.strip().lower() for name in text.partition("\n")[0].split(","))
    rows = _kaggle(path, text) if header == _KAGGLE else _tokens(path, text, bad)
    captions: dict[tuple[str, str], str] = {}
    for line, picture, number, caption in rows:
        if captions.setdefault((picture, number), caption) != caption:
            bad.add(f"{path} line {line}", f"caption #{number} of {picture} has another text in an earlier line")
    return Texts(path, captions)


def _tokens(path: Path, text: str, bad: BadRecords) -> list[tuple[int, str, str, str]]:
    """Line, picture, number and text of every caption."""
    rows = []
    for line, content in enumerate(text.split("\n"), 1):
        if match := _TOKEN.fullmatch(content.strip()):
            rows.append((line, picture_name(match[1]), match[2], match[3] or ""))
        elif content.strip():
            bad.add(f"{path} line {line}", f"expected X.jpg#0, a tab and the caption, got {content.strip()[:60]!r}")
    return rows


def _kaggle(path: Path, text: str) -> list[tuple[int, str, str, str]]:
    """The same of a table without numbers: a picture's captions are in their order."""
    rows, counts = [], dict[str, int]()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        next(reader)
        for row in filter(None, reader):
            if len(row) != len(_KAGGLE):
                raise UserError(
                    f"{path} line {reader.line_num}: expected an image and a caption, got {len(row)} fields"
                )
            picture = picture_name(row[0].strip())
            number = counts[picture] = counts.get(picture, -1) + 1
            rows.append((reader.line_num, picture, str(number), row[1].strip()))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}: is a quote not closed?") from None
    print(f"flickr8k: {path} does not number the captions: taken in the order of its lines", file=sys.stderr)
    return rows
