"""Atomic writes, checksums, JSON lines, and listings of a user's folder."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shards.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it is renamed to `path` once all of it is on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file to disk, or a folder, which makes a rename durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_object(path: Path, limit: int = 16 << 20) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, larger than a limit in bytes, or holds something else."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(limit))  # a truncated object is not valid JSON
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, line by line; skip an unfinished last line and anything that is not an object.

    A process may have been killed while appending a line.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def listed(folder: Path) -> list[Path]:
    """List the paths in a folder given by the user.

    Raises:
        UserError: The path is not a folder, or cannot be read.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None
