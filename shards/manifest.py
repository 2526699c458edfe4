"""The manifest: what a folder of shards holds, as columns that a million samples fill in well under a second.

`manifest.json` names the shards with their sizes and checksums and is written last, so a folder without one is not
finished. `index.npz` beside it holds one row a sample and one row a caption.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from shards.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.npz"
FORMAT = 1

# The columns of `index.npz` in order of writing. "S" is a byte string as long as its longest value.
SAMPLE_COLUMNS = {
    "key": "S",
    "image_id": "S",
    "shard": "<i4",
    "split": "|i1",
    "meta_offset": "<i8",
    "meta_bytes": "<i8",
    "image_offset": "<i8",
    "image_bytes": "<i8",
    "twin": "<i8",
}
CAPTION_COLUMNS = {"audio_offset": "<i8", "audio_bytes": "<i8", "duration": "<f4"}
COLUMNS = {**SAMPLE_COLUMNS, "first_caption": "<i8", **CAPTION_COLUMNS}


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of the folder."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A finished folder of shards: S samples (pictures) with C captions, numbered in order of writing.

    The samples of a split are contiguous, and so are those of a shard.
    """

    folder: Path
    corpus: str
    hash: str  # sha256 over the shards' checksums and the index: the identity of the data set
    shards: tuple[ShardInfo, ...]
    splits: tuple[str, ...]
    key: np.ndarray  # bytes [S], the name of a sample's tar members
    image_id: np.ndarray  # utf-8 bytes [S]
    shard: np.ndarray  # int32 [S], index in `shards`
    split: np.ndarray  # int8 [S], index in `splits`
    meta_offset: np.ndarray  # int64 [S], where KEY.json begins in its tar, in bytes
    meta_bytes: np.ndarray  # int64 [S]
    image_offset: np.ndarray  # int64 [S]
    image_bytes: np.ndarray  # int64 [S]
    twin: np.ndarray  # int64 [S], sample number of the picture this one is the twin of; -1: none
    first_caption: np.ndarray  # int64 [S+1], caption rows of sample s: first_caption[s] to first_caption[s+1]
    audio_offset: np.ndarray  # int64 [C]
    audio_bytes: np.ndarray  # int64 [C]
    duration: np.ndarray  # float32 [C], seconds
    arguments: dict[str, Any] = field(default_factory=dict)  # what make_shards was asked for

    def rows(self, split: str) -> np.ndarray:
        """Sample numbers of a split, int64, ascending.

        Raises:
            UserError: there is no such split.
        """
        if split not in self.splits:
            raise UserError(f"no split {split!r} in {self.folder}: it has {', '.join(self.splits)}")
        return np.flatnonzero(self.split == self.splits.index(split))

    def captions(self, sample: int) -> range:
        """Caption rows of a sample."""
        return range(int(self.first_caption[sample]), int(self.first_caption[sample + 1]))


def load(folder: Path | str) -> Manifest:
    """Read the manifest of a folder and check that its index is the one it was written with.

    Raises:
        UserError: there is no manifest, or it or the index is damaged.
    """
    folder = Path(folder)
    try:
        head = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no shards in {folder} (no {MANIFEST}): make them with python toolkit/make_shards.py CORPUS --out {folder}"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): make the shards again") from None
    try:
        if head["format"] != FORMAT:
            raise UserError(f"{folder / MANIFEST} has format {head['format']}, this version reads {FORMAT}")
        columns = _load_index(folder / INDEX, head["index"]["sha256"])
        return Manifest(
            folder=folder,
            corpus=head["corpus"],
            hash=head["hash"],
            shards=tuple(ShardInfo(**shard) for shard in head["shards"]),
            splits=tuple(head["splits"]),
            arguments=head["arguments"],
            **columns,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error!r}): make the shards again") from None


def _load_index(path: Path, sha256: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} is missing: make the shards again")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is not the index that {MANIFEST} was written with: make the shards again")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in COLUMNS}


def save(
    folder: Path,
    corpus: str,
    shards: Sequence[ShardInfo],
    splits: Sequence[str],
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    arguments: Mapping[str, Any],
) -> Manifest:
    """Write `index.npz`, then `manifest.json`, each whole or not at all; the same content gives the same bytes.

    Args:
        folder: where the shards are.
        corpus: name of the corpus.
        shards: the tar files in order.
        splits: names that the column `split` indexes.
        columns: one sequence for every name in `COLUMNS`.
        arguments: JSON values that say what the shards were made from.
    """
    arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    with atomic(folder / INDEX) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    index = {"name": INDEX, "sha256": file_sha256(folder / INDEX)}
    listed = [asdict(shard) for shard in shards]
    identity = hashlib.sha256(json.dumps([listed, list(splits), index]).encode()).hexdigest()
    head = {
        "format": FORMAT,
        "corpus": corpus,
        "hash": identity,
        "arguments": dict(arguments),
        "splits": list(splits),
        "index": index,
        "shards": listed,
    }
    with atomic(folder / MANIFEST) as file:
        file.write(json.dumps(head, indent=1).encode() + b"\n")
    return Manifest(folder, corpus, identity, tuple(shards), tuple(splits), arguments=dict(arguments), **arrays)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it takes the name `path` only when all of it is on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # A rename is lasting only once the folder that holds the name is on disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Checksum of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
