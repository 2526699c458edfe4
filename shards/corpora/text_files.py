"""Text and JSON files of a corpus, read whole, with what a program other than expected may have made of them."""

import codecs
import json
from pathlib import Path
from typing import Any

from shards.corpora.lists import note_list
from shards.errors import UserError
from shards.media.media_type import describe_content

_AS_UTF8 = "save it as UTF-8 (spreadsheets call it CSV UTF-8)"
_WORKBOOKS = (b"PK\3\4", b"\xd0\xcf\x11\xe0")  # of Excel, LibreOffice and others


class RepeatedKey(dict[str, Any]):
    """A JSON object in which a key comes twice, so that one of its values is lost.

    Attributes:
        key: The first such key.
    """

    key: str


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark, every end of line as a line feed.

    Raises:
        UserError: The file cannot be read or is not UTF-8; it says in which line and what the file seems to be.
    """
    try:
        data = path.read_bytes()
        note_list(path, data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16 text: {_AS_UTF8}")
    if b"\0" in data:
        raise UserError(f"{path} {_not_text(data, data.index(0))}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {_not_text(data, error.start)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _not_text(data: bytes, place: int) -> str:
    """What to say of a file whose byte at a place belongs to no UTF-8 text."""
    line = data.count(b"\n", 0, place) + 1
    if data.startswith(_WORKBOOKS):
        return f"is no text but a workbook or an archive: {_AS_UTF8.replace('save it', 'save the table')}"
    content = describe_content(data)
    if content and not content.startswith("text"):  # as which it takes what a few bytes at the end spoil
        return f"is not UTF-8 text but {content}"
    if data[place] == 0:
        return f"line {line} holds zero bytes, so it is UTF-16 or no text: {_AS_UTF8}"
    return f"line {line} is not UTF-8 (byte 0x{data[place]:02x}, as in Latin-1 or Windows-1252): {_AS_UTF8}"


def parse_json(text: str) -> Any:
    """Parse JSON; an object that has a key twice becomes a `RepeatedKey`.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    repeated, seen = RepeatedKey(made), set[str]()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


def read_json_records(path: Path, key: str, what: str, hint: str) -> tuple[dict[str, Any], list[Any]]:
    """Read a JSON file that holds an object with a list of records in it.

    Args:
        path: The file.
        key: Where in the object the list is.
        what: What the file should be, for messages.
        hint: What to do about another file, for messages.

    Returns:
        The object, and the list of records.

    Raises:
        UserError: The file cannot be read, is not JSON, or does not hold such a list.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        found = describe_content(text[:512].encode()) if not text.lstrip().startswith(("{", "[")) else None
        raise UserError(f"{path} is not JSON ({found or error}): is the download complete?") from None
    if isinstance(content, RepeatedKey):
        raise UserError(f"{path} has the key {content.key!r} twice: remove one")
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path} is not {what} (it has no list {key!r}): {hint}")
    return content, records
