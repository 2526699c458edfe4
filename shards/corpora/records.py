"""Records of a corpus's files: their fields by type, and what becomes of a bad one."""

import math
from typing import Any, Literal

from shards.corpora.text_files import RepeatedKey
from shards.errors import UserError
from shards.report import Dropped

_URL_MARK = "://"


class BadRecord(Exception):
    """A record that cannot be used; the message says which field and why."""


class BadRecords:
    """Collects what cannot be used of a corpus: the end of the run, or with `--skip-bad` dropped and reported.

    Attributes:
        skip: Whether bad records are dropped.
        dropped: What was found so far.
    """

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
        """Note a bad record.

        Args:
            where: File and line, or file and index.
            reason: What is wrong with it.
            what: Whether a picture or a caption is lost.
            name: Of the picture or caption, where it is known.
            split: In which it is, where it is known.
            captions: How many are lost.
        """
        self._first = self._first or f"{where}: {reason}"
        line = f"{where}: {reason}" if name else str(reason)
        self.dropped.append(Dropped(what, name or where, split, line, captions))

    def settle(self, mend: str = "--skip-bad drops and reports such records") -> None:
        """End the run if something is bad, unless it is to be skipped.

        Args:
            mend: What to do about it.

        Raises:
            UserError: It names the first bad record and says how many there are.
        """
        if self.dropped and not self.skip:
            more = f" (and {len(self.dropped) - 1:,} more)" if len(self.dropped) > 1 else ""
            raise UserError(f"{self._first}{more}; {mend}")


def as_object(value: Any) -> dict[str, Any]:
    """See that a record is a JSON object.

    Raises:
        BadRecord: It is something else, or has a key twice.
    """
    if not isinstance(value, dict):
        raise BadRecord(f"{described(value)} where an object is expected")
    if isinstance(value, RepeatedKey):
        raise BadRecord(f"the key {value.key!r} comes twice")
    return value


def optional_text(record: dict[str, Any], key: str) -> str | None:
    """A field that holds text, or null, or is absent.

    Raises:
        BadRecord: It holds something else.
    """
    value = record.get(key)
    if value is None or (type(value) is str and _is_storable(value)):
        return value
    raise BadRecord(f"{key} is {described(value)}, expected text")


def required_text(record: dict[str, Any], key: str) -> str:
    """A field that has to hold text other than blanks.

    Raises:
        BadRecord: It does not.
    """
    if key not in record:
        raise BadRecord(f"{key} is missing")
    value = optional_text(record, key)
    if value is None:
        raise BadRecord(f"{key} is null, expected text")
    if not value or value.isspace():
        raise BadRecord(f"{key} is empty")
    return value


def file_name(record: dict[str, Any], key: str) -> str:
    """A field that has to name a file.

    Raises:
        BadRecord: It does not.
    """
    value = required_text(record, key)
    if _URL_MARK in value:
        raise BadRecord(f"{key} is the URL {value!r}, expected the name of a file: download it and name the copy")
    return value


def records_of(record: dict[str, Any], key: str) -> list[Any]:
    """A field that has to hold a list with something in it.

    Raises:
        BadRecord: It does not.
    """
    if key not in record:
        raise BadRecord(f"{key} is missing")
    value = record[key]
    if not isinstance(value, list):
        raise BadRecord(f"{key} is {described(value)}, expected a list")
    if not value:
        raise BadRecord(f"{key} is an empty list")
    return value


def whole_number(record: dict[str, Any], key: str) -> int:
    """A field that has to hold a whole number.

    Raises:
        BadRecord: It does not.
    """
    value = record.get(key)
    if type(value) is not int:
        raise BadRecord(
            f"{key} is {described(value)}, expected a whole number" if key in record else f"{key} is missing"
        )
    return value


def described(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, int | float):
        return "a number" if abs(value) > 1e18 else f"the number {value}"
    if isinstance(value, str):
        return repr(value) if _is_storable(value) else f"{value!r}, which is no text that can be stored"
    return "a list" if isinstance(value, list) else "an object"


def _is_storable(value: str) -> bool:
    """Whether UTF-8 can hold a text; JSON may write half of a character that needs two escapes."""
    if value.isascii():
        return "\0" not in value
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
