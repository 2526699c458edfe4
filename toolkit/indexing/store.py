"""An index on disk, for reading: embeddings as a memory map, and one JSON line per item.

    index.json               format, model, source, shape; written last, so that it always names complete files
    embeddings-000003.npy    float16 or float32 [N, D], unit length
    items-000003.jsonl       {"name", "size", "version"} of each row, sorted by name
    approximate-000003       folder of a large index; see approximate.py

Nothing is unpickled, and sizes, types and names are checked: an index may come from anywhere.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.files import atomic_write
from toolkit.indexing.items import Item, Modality

HEAD = "index.json"
FORMAT = 1
DTYPES = ("float16", "float32")
_MAX_HEAD = 1 << 20  # bytes
_MAX_DIM = 1 << 16


@dataclass(frozen=True)
class Head:
    """Contents of `index.json`."""

    modality: Modality  # images or audio files
    model: str  # SHA-256 of the model that made the embeddings; see `model_checksum`
    model_folder: str  # folder of that model, the default of a search
    source: dict[str, str] = field(default_factory=dict)  # kind and location ("place"); see `open_source`
    dim: int = 0  # D, size of an embedding
    dtype: str = "float16"  # of the embeddings
    rows: int = 0  # N, number of items
    generation: int = 0  # number of the files that belong to it

    @property
    def embeddings_name(self) -> str:
        """Name of the file of embeddings."""
        return f"embeddings-{self.generation:06d}.npy"

    @property
    def approximate_name(self) -> str:
        """Name of the folder of the approximate index."""
        return f"approximate-{self.generation:06d}"

    @property
    def items_name(self) -> str:
        """Name of the file of items."""
        return f"items-{self.generation:06d}.jsonl"


def read_head(folder: Path) -> Head | None:
    """Read and validate `index.json`; None if there is none.

    Raises:
        UserError: It is damaged, or of another format.
    """
    path = folder / HEAD
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_HEAD:
            raise ValueError(f"more than {_MAX_HEAD:,} bytes")
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{path} is of another format than {FORMAT}: index again, in a new folder")
        return _checked(values)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): index again, in a new folder") from None


def _checked(values: dict[str, Any]) -> Head:
    """Build a head from JSON; raises `ValueError` or `TypeError` where a value is not possible."""
    head = Head(**values)
    for attribute in fields(Head):
        value, default = getattr(head, attribute.name), getattr(Head, attribute.name, "")
        expected = dict if attribute.name == "source" else type(default)
        if type(value) is not expected:
            raise ValueError(f"{attribute.name} is {value!r}")
    if head.modality not in ("image", "audio") or head.dtype not in DTYPES:
        raise ValueError(f"modality {head.modality!r}, dtype {head.dtype!r}")
    if not 1 <= head.dim <= _MAX_DIM or head.rows < 0 or head.generation < 0:
        raise ValueError(f"{head.rows} rows of {head.dim}, generation {head.generation}")
    if not all(isinstance(value, str) for value in head.source.values()):
        raise ValueError("source is not of strings")
    needed = {"folder": {"place"}, "files": set(), "shards": {"place", "split", "hash"}}
    kind = head.source.get("kind", "")
    if kind not in needed or not needed[kind] <= set(head.source):
        raise ValueError(f"source of kind {kind!r}")
    return head


def write_head(folder: Path, head: Head) -> None:
    """Write `index.json`, atomically."""
    with atomic_write(folder / HEAD) as file:
        file.write(json.dumps({"format": FORMAT, **asdict(head)}, indent=1).encode() + b"\n")


class Index:
    """An index, opened for reading: embeddings and lines are read from the disk when they are used.

    Attributes:
        folder: Its folder.
        head: Contents of `index.json`.
        embeddings: [N, D], a memory map that cannot change the file.
    """

    def __init__(self, folder: Path, head: Head, embeddings: np.ndarray, lines: np.ndarray) -> None:
        """Take opened files; use `Index.open`."""
        self.folder, self.head, self.embeddings, self._lines = folder, head, embeddings, lines
        self._ends = _line_ends(lines)
        if len(self._ends) != head.rows:
            name = folder / head.items_name
            raise UserError(f"{name} is damaged: {len(self._ends):,} lines, expected {head.rows:,}: index again")

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Open an index.

        Raises:
            UserError: There is none, or it is damaged.
        """
        for attempt in range(3):  # an update may replace the files in between
            head = read_head(folder)
            if head is None:
                raise UserError(f"{folder} holds no index (no {HEAD}): make one with python toolkit/index.py")
            try:
                return cls(folder, head, _open_embeddings(folder, head), _open_lines(folder, head))
            except FileNotFoundError as error:
                if attempt == 2:
                    raise UserError(f"{error.filename} is missing: index again, in a new folder") from None
        raise AssertionError

    def __len__(self) -> int:
        return self.head.rows

    def item(self, row: int) -> Item:
        """Read one item.

        Raises:
            UserError: Its line is damaged, or its name leads out of the folder.
        """
        start = int(self._ends[row - 1]) + 1 if row else 0
        try:
            return parse_item(bytes(self._lines[start : int(self._ends[row])]), self.head.source["kind"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.folder / self.head.items_name} line {row + 1} is damaged: {error}") from None

    def items(self) -> list[Item]:
        """Read all items."""
        return [self.item(row) for row in range(len(self))]

    def chunks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row and the embeddings of each chunk; a chunk that was used does not stay in memory."""
        for start in range(0, len(self), rows):
            chunk = self.embeddings[start : start + rows]
            yield start, np.asarray(chunk)
            release(self.embeddings, start, start + len(chunk))


def release(array: np.ndarray, start: int, stop: int) -> None:
    """Drop the memory of rows that were read from a memory map; they are read from the disk again when needed."""
    memory = array.base
    if isinstance(memory, mmap.mmap) and isinstance(array, np.memmap) and stop > start:
        # numpy maps from the start of the allocation unit in which the header ends.
        first = array.offset % mmap.ALLOCATIONGRANULARITY + start * array.strides[0]
        aligned = first - first % mmap.PAGESIZE
        memory.madvise(mmap.MADV_DONTNEED, aligned, first + (stop - start) * array.strides[0] - aligned)


def parse_item(line: bytes, kind: str) -> Item:
    """Parse a line of an item.

    Raises:
        ValueError: It is not one, or it names a file outside of the folder.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or set(values) != {"name", "size", "version"}:
        raise ValueError("expected name, size and version")
    name, size, version = values["name"], values["size"], values["version"]
    if not (isinstance(name, str) and name and type(size) is int and size >= 0 and isinstance(version, str)):
        raise ValueError(f"{str(values)[:100]}")
    if kind == "folder" and (name.startswith("/") or ".." in name.split("/") or "\0" in name):
        raise ValueError(f"{name[:100]!r} is outside of the folder")
    return Item(name, size, version)


def format_item(item: Item) -> bytes:
    """Format the line of an item; any file name is possible, also one that is not UTF-8."""
    return json.dumps(item._asdict()).encode() + b"\n"


def _open_embeddings(folder: Path, head: Head) -> np.ndarray:
    if not head.rows:
        return np.empty((0, head.dim), head.dtype)
    return open_array(folder / head.embeddings_name, (head.rows, head.dim), head.dtype)


def open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Map a `.npy` file of a known shape, with at least one value; the file cannot be changed through it.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is of another shape or dtype, or damaged.
    """
    try:
        if not path.is_file() and path.exists():
            raise ValueError("not a regular file")
        # Copy on write: torch takes no read-only arrays, and the file stays as it is.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape}, expected {dtype} {shape}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, OverflowError, EOFError, SyntaxError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): index again") from None
    expected = array.offset + math.prod(array.shape) * array.itemsize
    if os.path.getsize(path) != expected:
        raise UserError(f"{path} is damaged: {os.path.getsize(path):,} bytes, expected {expected:,}: index again")
    return array


def _open_lines(folder: Path, head: Head) -> np.ndarray:
    path = folder / head.items_name
    if not head.rows:
        return np.empty(0, np.uint8)
    try:
        if not path.is_file() and path.exists():
            raise UserError(f"{path} is not a regular file: index again")
        return np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _line_ends(lines: np.ndarray) -> np.ndarray:
    """Positions of line breaks, found without parsing the lines."""
    block = 1 << 24
    parts = [np.flatnonzero(lines[start : start + block] == 10) + start for start in range(0, len(lines), block)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
