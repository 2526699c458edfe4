"""The text and JSON files that list a corpus's samples: decoded, parsed, and recorded with their checksums."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import UserError
from shards.media.media_type import describe_content

_AS_UTF8 = "save it as UTF-8 (spreadsheets call it CSV UTF-8)"
_WORKBOOKS = (b"PK\3\4", b"\xd0\xcf\x11\xe0")  # of Excel, LibreOffice and others


class ListFile(NamedTuple):
    """A file that lists samples of a corpus, such as a table, a token file or a JSON file."""

    path: str
    bytes: int
    sha256: str


_noted: ContextVar[list[ListFile] | None] = ContextVar("_noted", default=None)


@contextmanager
def noted_lists() -> Iterator[list[ListFile]]:
    """Yield a list to which every list file read inside the block is appended, also if reading ends with an error."""
    noted: list[ListFile] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_list(path: Path, data: bytes) -> None:
    """Record the checksum of a list file. The same bytes are parsed, so a change between the two cannot be missed."""
    noted = _noted.get()
    if noted is not None:
        noted.append(ListFile(str(path), len(data), hashlib.sha256(data).hexdigest()))


class RepeatedKey(dict[str, Any]):
    """A JSON object with a repeated key, so that one of its values is lost."""

    key: str  # the first one


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark, and normalize line ends to line feeds.

    Raises:
        UserError: The file cannot be read or is not UTF-8; the message gives the line and the likely file type.
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


def _not_text(data: bytes, offset: int) -> str:
    """Describe a file whose byte at `offset` is not valid UTF-8 text, to follow its name in a message."""
    line = data.count(b"\n", 0, offset) + 1
    if data.startswith(_WORKBOOKS):
        return f"is a workbook or an archive, not text: {_AS_UTF8.replace('save it', 'save the table')}"
    content = describe_content(data)
    if content and not content.startswith("text"):  # "text": valid up to a few bytes at the end
        return f"is not UTF-8 text but {content}"
    if data[offset] == 0:
        return f"line {line} has zero bytes, so it is UTF-16 or binary: {_AS_UTF8}"
    return f"line {line} is not UTF-8 (byte 0x{data[offset]:02x}, as in Latin-1 or Windows-1252): {_AS_UTF8}"


def parse_json(text: str) -> Any:
    """Parse JSON; an object with a repeated key becomes a `RepeatedKey`.

    Raises:
        ValueError: The text is not JSON.
        RecursionError: The JSON is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) == len(pairs):
        return parsed
    repeated, seen = RepeatedKey(parsed), set[str]()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


def read_json_records(path: Path, key: str, what: str, hint: str) -> tuple[dict[str, Any], list[Any]]:
    """Read a JSON file whose top-level object has a list of records.

    Args:
        path: The file.
        key: Key of the list.
        what: Name of the expected format, for messages.
        hint: How to fix another file, for messages.

    Returns:
        The object, and the list of records.

    Raises:
        UserError: The file cannot be read, is not JSON, or has no such list.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        file_type = describe_content(text[:512].encode()) if not text.lstrip().startswith(("{", "[")) else None
        raise UserError(f"{path} is not JSON ({file_type or error}): is the download complete?") from None
    if isinstance(content, RepeatedKey):
        raise UserError(f"{path} has a repeated key {content.key!r}: remove one")
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path} is not {what} (it has no list {key!r}): {hint}")
    return content, records
