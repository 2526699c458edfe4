"""The lists of a corpus (tables, token files, JSON files) by their content, noted as they are read."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple


class ListFile(NamedTuple):
    """A file that says what a corpus holds."""

    path: str
    bytes: int
    sha256: str


_noted: ContextVar[list[ListFile] | None] = ContextVar("_noted", default=None)


@contextmanager
def noted_lists() -> Iterator[list[ListFile]]:
    """Give the list that every list file is added to that is read meanwhile, also if reading ends with an error."""
    noted: list[ListFile] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_list(path: Path, data: bytes) -> None:
    """Note the content of a list file; the same bytes are parsed, so that no change between can be missed."""
    noted = _noted.get()
    if noted is not None:
        noted.append(ListFile(str(path), len(data), hashlib.sha256(data).hexdigest()))
