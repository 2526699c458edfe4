"""The manifest: the contents of a folder of shards, as columns; a million samples load in well under a second.

`manifest.json` lists the shards with sizes and checksums and is written last, so a folder without one is unfinished.
`index.npz` beside it has one row per sample and one row per caption.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.files import atomic_write, file_sha256
from shards.remote import Remote, is_url

MANIFEST = "manifest.json"
INDEX = "index.npz"
FORMAT = 1
INDEXED = "index"  # argument `corpus` of a folder whose tars were indexed as they are
# Keys of `manifest.json`. Earlier versions did not write `report` and `sha256`, the checksum of the file itself.
_KEYS = {"format", "corpus", "hash", "arguments", "splits", "index", "shards"}

# The columns of `index.npz` in order of writing. "S" is a byte string of the length of its longest value.
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

SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")  # no path, no hidden file
_SHA256 = re.compile(r"[0-9a-f]{64}")
SPLIT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardInfo:
    """One shard of the folder."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A finished folder of shards: S samples (pictures) with C captions, numbered in order of writing.

    The samples of a split are contiguous, and so are those of a shard, which contains samples of one split.
    """

    folder: Path  # for remote shards only a name; see `url`
    corpus: str
    hash: str  # SHA-256 of the shards' checksums and the index: the identity of the data set
    shards: tuple[ShardInfo, ...]
    splits: tuple[str, ...]
    key: np.ndarray  # bytes [S], the stem of a sample's tar members
    image_id: np.ndarray  # utf-8 bytes [S]
    shard: np.ndarray  # int32 [S], index in `shards`
    split: np.ndarray  # int8 [S], index in `splits`
    meta_offset: np.ndarray  # int64 [S], offset of KEY.json in its tar, in bytes; of an indexed tar also KEY.txt
    meta_bytes: np.ndarray  # int64 [S]; 0: none, in an indexed tar
    image_offset: np.ndarray  # int64 [S]
    image_bytes: np.ndarray  # int64 [S]
    twin: np.ndarray  # int64 [S], sample number of the picture of which this is the twin; -1: none
    first_caption: np.ndarray  # int64 [S+1], caption rows of sample s: first_caption[s] to first_caption[s+1]
    audio_offset: np.ndarray  # int64 [C]
    audio_bytes: np.ndarray  # int64 [C]
    duration: np.ndarray  # float32 [C], seconds
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of make_shards
    url: str | None = None  # of remote shards
    report: str | None = None  # SHA-256 of the report; None: written by an earlier version

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""
        return self.url or str(self.folder)

    @property
    def indexed(self) -> bool:
        """Whether the tars were written by another program and only indexed; see `shards/tars/index.py`."""
        return self.arguments.get("corpus") == INDEXED

    def rows(self, split: str) -> np.ndarray:
        """Return the sample numbers of a split, int64, ascending.

        Raises:
            UserError: There is no such split.
        """
        if split not in self.splits:
            raise UserError(f"no split {split!r} in {self.location}: it has {', '.join(self.splits)}")
        return np.flatnonzero(self.split == self.splits.index(split))

    def captions(self, sample: int) -> range:
        """Return the caption rows of a sample."""
        return range(int(self.first_caption[sample]), int(self.first_caption[sample + 1]))


def load(folder: Path | str) -> Manifest:
    """Read the manifest of a folder, and validate it and its index.

    Args:
        folder: A folder, or a URL that fsspec understands.

    Raises:
        UserError: There is no manifest, or it or the index is damaged.
    """
    remote = Remote(str(folder)) if is_url(folder) else None
    folder = Path(folder)
    location = remote.url if remote else str(folder)
    if not remote and os.path.exists(folder / MANIFEST) and not os.path.isfile(folder / MANIFEST):
        raise UserError(
            f"{folder / MANIFEST} is not a regular file: make the shards again"
        )  # reading a pipe would block
    try:
        head = json.loads(remote.read(MANIFEST) if remote else (folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no shards in {folder} (no {MANIFEST}): make them with python toolkit/make_shards.py CORPUS --out {folder}"
        ) from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}/{MANIFEST} is damaged ({error}): make the shards again") from None
    try:
        if head["format"] != FORMAT:
            raise UserError(f"{location}/{MANIFEST} has format {head['format']!r}, this version reads {FORMAT}")
        columns = _load_index(remote.read(INDEX) if remote else folder / INDEX, location, head["index"]["sha256"])
        manifest = Manifest(
            folder=folder,
            corpus=head["corpus"],
            hash=head["hash"],
            shards=tuple(ShardInfo(**shard) for shard in head["shards"]),
            splits=tuple(head["splits"]),
            arguments=head["arguments"],
            url=remote.url if remote else None,
            report=head["report"]["sha256"] if "report" in head else None,
            **columns,
        )
        problem = _problem_of(manifest) or _problem_of_head(head)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{location}/{MANIFEST} is damaged ({error!r}): make the shards again") from None
    if problem:
        raise UserError(f"{location}/{problem}: make the shards again")
    return manifest


def _load_index(source: Path | bytes, location: str, sha256: str) -> dict[str, np.ndarray]:
    name = f"{location}/{INDEX}"
    if isinstance(source, Path) and not os.path.isfile(source):
        raise UserError(f"{name} is missing: make the shards again")
    try:
        digest = file_sha256(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if digest != sha256:
        raise UserError(f"{name} is not the index that {MANIFEST} was written with: make the shards again")
    try:
        with np.load(source if isinstance(source, Path) else io.BytesIO(source), allow_pickle=False) as stored:
            if any(member.compress_type != zipfile.ZIP_STORED for member in stored.zip.infolist()):
                raise ValueError("a column is compressed")  # it could fill the memory
            return {column: stored[column] for column in COLUMNS}
    except (ValueError, OSError, EOFError, MemoryError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} is damaged ({error}): make the shards again") from None


def stored_problem(folder: Path) -> str | None:
    """Return how the bytes of a `manifest.json` accepted by `load` differ from those that `save` writes, or None.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    head = json.loads(data)
    unknown = sorted(head.keys() - {*_KEYS, "report", "sha256"})
    if unknown or ("report" in head and "sha256" not in head) or data != encoded(head):
        return "its bytes changed since it was written" + (f": unknown key {unknown[0]!r}" if unknown else "")
    return None


def encoded(head: Mapping[str, Any]) -> bytes:
    """Return the bytes of `manifest.json`."""
    return json.dumps(head, indent=1).encode() + b"\n"


def _identity(shards: Any, splits: Any, index: Any) -> str:
    return hashlib.sha256(json.dumps([shards, splits, index]).encode()).hexdigest()


def sign(head: dict[str, Any]) -> None:
    """Set the checksums in the head of a manifest: `hash` of the data, and `sha256` of the head."""
    head["hash"] = _identity(head["shards"], head["splits"], head["index"])
    head["sha256"] = _head_sha256(head)


def _head_sha256(head: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the head without the checksum itself."""
    rest = {name: value for name, value in head.items() if name != "sha256"}
    return hashlib.sha256(encoded(rest)).hexdigest()


def _problem_of_head(head: Mapping[str, Any]) -> str | None:
    """Compare the head with the checksums in it; earlier versions wrote only the first."""
    if head["hash"] != _identity(head["shards"], head["splits"], head["index"]):
        return f"{MANIFEST} was changed: its hash does not match its shards"
    if "sha256" in head and head["sha256"] != _head_sha256(head):
        return f"{MANIFEST} was changed: its checksum does not match its contents"
    return None


def _problem_of(m: Manifest) -> str | None:
    """Return what is invalid in a manifest from an untrusted source; None if it is valid."""
    if not all(isinstance(value, str) for value in (m.corpus, m.hash)) or not isinstance(m.arguments, dict):
        return f"{MANIFEST} does not name the corpus and its arguments"
    if not all(isinstance(split, str) and SPLIT.fullmatch(split) for split in m.splits):
        return f"{MANIFEST} names an invalid split: expected letters, digits, _ and -"
    names = [shard.name for shard in m.shards]
    if len(set(m.splits)) < len(m.splits):
        return f"{MANIFEST} names a split twice"
    for shard in m.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            return f"{MANIFEST} names a shard {shard.name!r}: expected a plain file name that ends in .tar"
        if not _SHA256.fullmatch(shard.sha256) or type(shard.bytes) is not int or not 0 <= shard.bytes < 2**62:
            return f"{MANIFEST} has an invalid size or checksum of shard {shard.name}"
    if len(set(names)) < len(names):
        return f"{MANIFEST} names a shard twice"
    for name, dtype in COLUMNS.items():
        column = getattr(m, name)
        if column.ndim != 1 or (column.dtype.kind != "S" if dtype == "S" else column.dtype != np.dtype(dtype)):
            return f"{INDEX}: column {name} is not of type {dtype}"
    return _problem_of_rows(m)


def _problem_of_rows(m: Manifest) -> str | None:
    samples, captions = len(m.key), len(m.duration)
    for names, length in ((SAMPLE_COLUMNS, samples), (CAPTION_COLUMNS, captions), (("first_caption",), samples + 1)):
        for name in names:
            if len(getattr(m, name)) != length:
                return f"{INDEX}: column {name} has {len(getattr(m, name))} rows, expected {length}"
    first = m.first_caption
    if first[0] != 0 or first[-1] != captions or (first[1:] < first[:-1]).any():
        return f"{INDEX}: first_caption does not match the number of captions"
    for name, low, high in (("shard", 0, len(m.shards)), ("split", 0, len(m.splits)), ("twin", -1, samples)):
        column = getattr(m, name)
        if ((column < low) | (column >= high)).any():
            return f"{INDEX}: column {name} contains a number out of range"
    if not np.isfinite(m.duration).all() or (m.duration < 0).any():
        return f"{INDEX}: durations must be finite and at least 0"
    return _problem_of_shards(m)


def _problem_of_shards(m: Manifest) -> str | None:
    counts = np.bincount(m.shard, minlength=len(m.shards)).tolist()
    if counts != [shard.samples for shard in m.shards] or (m.shard[1:] < m.shard[:-1]).any():
        return f"{INDEX}: its samples do not match the shards in {MANIFEST}"
    changes = m.split[1:] != m.split[:-1]
    splits = len(np.flatnonzero(np.bincount(m.split)))
    if (changes & (m.shard[1:] == m.shard[:-1])).any() or int(changes.sum()) >= max(1, splits):
        return f"{INDEX}: the samples of a split or a shard are not contiguous"
    size = np.array([shard.bytes for shard in m.shards], np.int64)
    of_captions = np.repeat(m.shard, np.diff(m.first_caption))
    for what, shard in (("meta", m.shard), ("image", m.shard), ("audio", of_captions)):
        offset, length = getattr(m, f"{what}_offset"), getattr(m, f"{what}_bytes")
        # The difference of two nonnegative numbers cannot overflow.
        outside = (offset < 0) | (length < 0) | (length > size[shard]) | (offset > size[shard] - length)
        if outside.any():
            name = m.shards[shard[int(np.argmax(outside))]].name
            return f"{INDEX}: a member ({what}) lies outside of shard {name}"
    return None


def save(
    folder: Path,
    corpus: str,
    shards: Sequence[ShardInfo],
    splits: Sequence[str],
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    arguments: Mapping[str, Any],
    report: str | None = None,
) -> Manifest:
    """Write `index.npz`, then `manifest.json`, each atomically; the same content gives the same bytes.

    Args:
        folder: Folder of the shards.
        corpus: Name of the corpus.
        shards: The tar files in order.
        splits: Names indexed by the column `split`.
        columns: One sequence for every name in `COLUMNS`.
        arguments: Arguments of make_shards, as JSON values.
        report: SHA-256 of the report in the folder; None: there is none.
    """
    arrays: dict[str, Any] = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    with atomic_write(folder / INDEX) as file:
        np.savez(file, **arrays)
    index = {"name": INDEX, "sha256": file_sha256(folder / INDEX)}
    shard_list = [asdict(shard) for shard in shards]
    head: dict[str, Any] = {
        "format": FORMAT,
        "corpus": corpus,
        "hash": "",
        "arguments": dict(arguments),
        "splits": list(splits),
        "index": index,
        "shards": shard_list,
    }
    if report is not None:
        head["report"] = {"sha256": report}
    sign(head)
    with atomic_write(folder / MANIFEST) as file:
        file.write(encoded(head))
    return Manifest(
        folder, corpus, head["hash"], tuple(shards), tuple(splits), arguments=dict(arguments), report=report, **arrays
    )
