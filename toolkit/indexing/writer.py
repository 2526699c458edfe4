"""Writing of an index: a journal of encoded items, and the commit that merges it.

    lock             locked by the process that updates the index
    pending.bin      the journal: embeddings of encoded items that are not in the index yet, append-only
    pending.jsonl    their lines; a line is written after its embedding is on disk

A killed update leaves the index as it was and loses at most the batch that was being written.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.files import atomic_write
from toolkit.indexing.items import Item
from toolkit.indexing.store import Head, Index, format_item, parse_item, write_head

LOCK = "lock"
JOURNAL_EMBEDDINGS, JOURNAL_ITEMS = "pending.bin", "pending.jsonl"
_ROWS = 4096  # copied at once


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder of an index, and lock it for writing.

    Raises:
        UserError: Another process updates the index, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"another process updates {folder}: wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{folder / LOCK} cannot be locked: {error.strerror}") from None
        try:
            yield
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
        finally:
            if os.listdir(folder) == [LOCK]:  # nothing was written
                os.unlink(folder / LOCK)
                folder.rmdir()
    finally:
        os.close(descriptor)


class Journal:
    """Encoded items that are not in the index yet.

    Attributes:
        rows: Row of each item's embedding; of an item that was encoded twice, the last.
    """

    def __init__(self, folder: Path, head: Head) -> None:
        """Open the journal of an index, and cut off rows that a killed process left incomplete."""
        self.folder, self.head = folder, head
        self._embeddings = open(folder / JOURNAL_EMBEDDINGS, "a+b")  # noqa: SIM115  closed by `close`
        self._lines = open(folder / JOURNAL_ITEMS, "a+b")  # noqa: SIM115
        self._row_bytes = head.dim * np.dtype(head.dtype).itemsize
        self._count = 0
        self.rows: dict[Item, int] = {}
        self._recover()

    def append(self, items: Sequence[Item], embeddings: np.ndarray) -> None:
        """Add items with embeddings [n, D]."""
        if not items:
            return
        self._embeddings.write(np.ascontiguousarray(embeddings, self.head.dtype).tobytes())
        self._embeddings.flush()
        os.fdatasync(self._embeddings.fileno())
        self._lines.write(b"".join(map(format_item, items)))
        self._lines.flush()
        for item in items:
            self.rows[item] = self._count
            self._count += 1

    def embeddings(self) -> np.ndarray:
        """Return all embeddings [n, D], a memory map."""
        if not self._count:
            return np.empty((0, self.head.dim), self.head.dtype)
        return np.memmap(self.folder / JOURNAL_EMBEDDINGS, self.head.dtype, "r", shape=(self._count, self.head.dim))

    def close(self) -> None:
        """Close the files."""
        self._embeddings.close()
        self._lines.close()

    def _recover(self) -> None:
        available = os.fstat(self._embeddings.fileno()).st_size // self._row_bytes
        self._lines.seek(0)
        complete = 0
        for line in self._lines:
            if self._count == available or not line.endswith(b"\n"):
                break
            try:
                item = parse_item(line, self.head.source["kind"])
            except (ValueError, RecursionError):
                break
            self.rows[item] = self._count
            self._count += 1
            complete += len(line)
        self._lines.truncate(complete)
        self._embeddings.truncate(self._count * self._row_bytes)


def commit(index: Index, journal: Journal, kept: Sequence[Item]) -> Head:
    """Write the next generation of an index, with some items of the index and the journal.

    Args:
        index: The index.
        journal: The journal, which is removed.
        kept: The items of the next generation; each is in the index or in the journal.

    Returns:
        The new head.
    """
    old = {item: row for row, item in enumerate(index.items())}
    items = sorted(kept)
    head = replace(index.head, rows=len(items), generation=index.head.generation + 1)
    folder, journaled = index.folder, journal.embeddings()
    with atomic_write(folder / head.embeddings_name) as file:
        form = {"descr": np.dtype(head.dtype).str, "fortran_order": False, "shape": (head.rows, head.dim)}
        np.lib.format.write_array_header_1_0(file, form)
        for start in range(0, len(items), _ROWS):
            chunk = items[start : start + _ROWS]
            block = np.empty((len(chunk), head.dim), head.dtype)
            for number, item in enumerate(chunk):
                row = journal.rows.get(item)
                block[number] = index.embeddings[old[item]] if row is None else journaled[row]
            file.write(block.tobytes())
    with atomic_write(folder / head.items_name) as file:
        file.writelines(map(format_item, items))
    write_head(folder, head)
    journal.close()
    remove_leftovers(folder, head)
    return head


def remove_leftovers(folder: Path, head: Head) -> None:
    """Remove the journal, files of other generations, and temporary files of a killed process."""
    for pattern in ("embeddings-*.npy", "items-*.jsonl", "embeddings-*.tmp", "items-*.tmp", "index.json.*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in (head.embeddings_name, head.items_name):
                path.unlink(missing_ok=True)
    for path in folder.glob("approximate-*"):
        if path.name != head.approximate_name:
            shutil.rmtree(path, ignore_errors=True)
    for name in (JOURNAL_ITEMS, JOURNAL_EMBEDDINGS):  # lines first: embeddings without lines are cut off
        (folder / name).unlink(missing_ok=True)
