"""Typed access to the fields of a corpus's records, and the collection of bad records."""

import math
from typing import Any, Literal

from shards.corpora.text_files import RepeatedKey
from shards.errors import UserError
from shards.report import Dropped

_URL_MARK = "://"


class BadRecord(Exception):
    """A record that cannot be used; the message says which field and why."""


class BadRecords:
    """Collects the bad records of a corpus: they end the run, or with `--skip-bad` are dropped and reported."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.dropped: list[Dropped] = []
        self._first = ""

    def add(
        self,
        where: str,
        reason: object,
        *,
        what: Literal["picture", "caption"] = "caption",
        name: str | None = None,
        split: str = "-",
        captions: int = 1,
    ) -> None:
        """Add a bad record.

        Args:
            where: File and line, or file and index.
            reason: Why the record cannot be used.
            what: Whether a picture or a caption is lost.
            name: Name of the picture or caption, if known.
            split: Split of the picture or caption, if known.
            captions: Number of captions lost.
        """
        self._first = self._first or f"{where}: {reason}"
        line = f"{where}: {reason}" if name else str(reason)
        self.dropped.append(Dropped(what, name or where, split, line, captions))

    def raise_if_any(self, hint: str = "--skip-bad drops and reports such records") -> None:
        """Raise an error if there are bad records, unless they are to be skipped.

        Raises:
            UserError: There are bad records; the message names the first and counts the others.
        """
        if self.dropped and not self.skip:
            more = f" (and {len(self.dropped) - 1:,} more)" if len(self.dropped) > 1 else ""
            raise UserError(f"{self._first}{more}; {hint}")


def as_object(value: Any) -> dict[str, Any]:
    """Return a record that has to be a JSON object.

    Raises:
        BadRecord: It is something else, or has a repeated key.
    """
    if not isinstance(value, dict):
        raise BadRecord(f"{described(value)}, expected an object")
    if isinstance(value, RepeatedKey):
        raise BadRecord(f"the key {value.key!r} is repeated")
    return value


def optional_text(record: dict[str, Any], key: str) -> str | None:
    """Return a field that is text, null (None) or absent (None).

    Raises:
        BadRecord: The field is something else.
    """
    value = record.get(key)
    if value is None or (type(value) is str and _is_storable(value)):
        return value
    raise BadRecord(f"{key} is {described(value)}, expected text")


def required_text(record: dict[str, Any], key: str) -> str:
    """Return a field that has to be text with more than white space.

    Raises:
        BadRecord: The field is absent, blank or not text.
    """
    if key not in record:
        raise BadRecord(f"{key} is missing")
    value = optional_text(record, key)
    if value is None:
        raise BadRecord(f"{key} is null, expected text")
    if not value or value.isspace():
        raise BadRecord(f"{key} is empty")
    return value


def text_or_integer(record: dict[str, Any], key: str) -> str | None:
    """Return a field that is text, an integer (as text), null or absent; raises as `optional_text` does."""
    value = record.get(key)
    return str(value) if type(value) is int else optional_text(record, key)


def file_name(record: dict[str, Any], key: str) -> str:
    """Return a field that has to be a file name.

    Raises:
        BadRecord: The field is absent, blank, not text or a URL.
    """
    value = required_text(record, key)
    if _URL_MARK in value:
        raise BadRecord(f"{key} is the URL {value!r}, expected the name of a file: download it and name the copy")
    return value


def records_of(record: dict[str, Any], key: str) -> list[Any]:
    """Return a field that has to be a non-empty list.

    Raises:
        BadRecord: The field is absent, empty or not a list.
    """
    if key not in record:
        raise BadRecord(f"{key} is missing")
    value = record[key]
    if not isinstance(value, list):
        raise BadRecord(f"{key} is {described(value)}, expected a list")
    if not value:
        raise BadRecord(f"{key} is an empty list")
    return value


def integer(record: dict[str, Any], key: str) -> int:
    """Return a field that has to be an integer.

    Raises:
        BadRecord: The field is absent or not an integer.
    """
    value = record.get(key)
    if type(value) is not int:
        raise BadRecord(f"{key} is {described(value)}, expected an integer" if key in record else f"{key} is missing")
    return value


def described(value: Any) -> str:
    """Describe a JSON value in a message, in JSON's terms."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, int | float):
        return "a number" if abs(value) > 1e18 else f"the number {value}"
    if isinstance(value, str):
        return repr(value) if _is_storable(value) else f"{value!r}, which cannot be stored as text"
    return "a list" if isinstance(value, list) else "an object"


def _is_storable(value: str) -> bool:
    """Whether a text can be stored as UTF-8; JSON may contain one half of a surrogate pair."""
    if value.isascii():
        return "\0" not in value
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
