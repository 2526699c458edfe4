"""What a run notes beside its shards: the plan, and a record of each finished shard. The manifest is made from them."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from shards.corpora.item import Item
from shards.corpora.lists import ListFile
from shards.files import atomic_write
from shards.manifest import COLUMNS, FORMAT, ShardInfo
from shards.report import Counts, Dropped, RecordingWarning, Report
from shards.writing.sources import SourceFile, Sources

PLAN = "plan.json"
# A shard in which nothing was bad is the same with and without it, so that a run may go on with the other choice.
_EITHER_WAY = "skip_bad"


@dataclass(frozen=True)
class Plan:
    """All shards of a folder and what they are made from; every part of a divided run plans the same."""

    corpus: str
    arguments: dict[str, Any]  # JSON values kept in the manifest
    form: dict[str, Any]  # how samples are stored
    shards: dict[str, str]  # name of a tar -> digest of what the corpus says of its samples
    parts: int = 1  # of the latest run
    dropped: tuple[Dropped, ...] = ()  # left out when the corpus was read
    lists: tuple[ListFile, ...] = ()  # of the corpus
    pictures: int = 0  # of the corpus
    captions: int = 0

    @property
    def skip_bad(self) -> bool:
        """Whether what cannot be read is left out."""
        return bool(self.form.get(_EITHER_WAY))

    def changed(self, earlier: "Plan") -> str | None:
        """What the two commands have different, as "NAME OLD, now NEW"; None if the later can go on from the earlier.

        The corpus itself may have changed: the digests of the shards tell which are still good.
        """
        old, new = ({"corpus": one.corpus, **one.form, **one.arguments} for one in (earlier, self))
        for name in sorted(old.keys() | new.keys()):
            # One that is not there is of another version, which did the same as one does now without it.
            if name != _EITHER_WAY and (old.get(name) or None) != (new.get(name) or None):
                return f"{name} {old.get(name)}, now {new.get(name)}"
        return None

    def save(self, notes: Path) -> None:
        """Write `plan.json`."""
        with atomic_write(notes / PLAN) as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")


def load_plan(notes: Path) -> Plan | None:
    """Read what `Plan.save` wrote; None if it is not there or damaged."""
    try:
        stored = json.loads((notes / PLAN).read_bytes())
        stored["dropped"] = tuple(Dropped(**one) for one in stored.get("dropped", ()))
        stored["lists"] = tuple(ListFile(*one) for one in stored.get("lists", ()))
        return Plan(**stored)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass
class Sample:
    """One written sample."""

    key: str
    image_id: str
    twin: str | None
    durations: list[float]  # seconds, a caption
    speakers: list[str | None]
    members: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes) of JSON, picture, captions' audio


@dataclass
class Record:
    """One finished shard; if all its samples were dropped, there is no tar."""

    name: str
    split: str
    lists: str  # digest of what the corpus says of its samples
    files: str  # digest of the sizes and times of the files they were read from
    samples: list[Sample] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[RecordingWarning] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    sources: list[SourceFile] | None = None  # what they were read from; None: an earlier version did not note it

    def save(self, notes: Path) -> None:
        """Write `NAME.json`; the tar has to be in its place."""
        with atomic_write(notes / f"{self.name}.json") as file:
            file.write(json.dumps(self, default=vars).encode())


def load_record(notes: Path, name: str, lists: str, skip_bad: bool) -> Record | None:
    """The record of a shard that is finished as planned, its tar as long as it was.

    Args:
        notes: folder of the records, in the folder of the shards.
        name: of the tar.
        lists: digest of what the corpus says of its samples now.
        skip_bad: whether a shard from which something was dropped will do.
    """
    try:
        stored = json.loads((notes / f"{name}.json").read_bytes())
        stored["samples"] = [Sample(**one) for one in stored["samples"]]
        stored["dropped"] = [Dropped(**one) for one in stored["dropped"]]
        if stored.get("sources") is not None:
            stored["sources"] = [SourceFile(*one) for one in stored["sources"]]
        stored["warnings"] = [RecordingWarning(**one) for one in stored.get("warnings", [])]
        record = Record(**stored)
        size = (notes.parent / name).stat().st_size if record.samples else 0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = record.lists == lists and record.bytes == size and (skip_bad or not record.dropped)
    return record if usable else None


def lists_digest(items: Sequence[Item], form: dict[str, Any]) -> str:
    """Digest of what a corpus says of some samples and how they are to be stored, from which their bytes follow."""
    kept = {name: value for name, value in form.items() if name != _EITHER_WAY}
    return _digest([FORMAT, kept, _described(items)])


def files_digest(stamps: Iterable[tuple[int, int]]) -> str:
    """Digest of the size and the time of change of every file that some samples are read from; see `sources.stamp`."""
    return _digest([one if one[0] >= 0 else None for one in stamps])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _described(value: Any) -> Any:
    """JSON that says the same in every process: functions by name, what they are called with by content."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return ["file", os.path.abspath(value)]
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [_name(type(value)), *(_described(getattr(value, one.name)) for one in fields(value) if one.compare)]
    if isinstance(value, partial):
        return ["call", *map(_described, (value.func, value.args, list(value.keywords.items())))]
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return ["function", _name(value)]
    return ["pickle", hashlib.sha256(pickle.dumps(value)).hexdigest()]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


@dataclass
class Gathered:
    """What the manifest and the report are made of, record by record in the order of the plan."""

    shards: list[ShardInfo] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    _rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    _twins: list[str | None] = field(default_factory=list)
    _sources: list[np.ndarray] | None = field(default_factory=list)  # [files, 3] each; None: not noted of all shards

    def add(self, record: Record) -> None:
        """Take in one shard."""
        self._add_sources(record.sources)
        counts = self.report.splits.setdefault(record.split, Counts())
        self.report.dropped += record.dropped
        self.report.warnings += record.warnings
        if not record.samples:
            return
        for sample in record.samples:
            counts.add(sample.durations, sample.speakers)
            self.report.add_durations(sample.durations)
        self.report.shards += 1
        self.report.bytes += record.bytes
        if record.split not in self.splits:
            self.splits.append(record.split)
        # As arrays at once: as lists of numbers a large corpus would fill the memory.
        self._rows.append(_rows(record, len(self.shards), self.splits.index(record.split)))
        self._twins += [sample.twin for sample in record.samples]
        self.shards.append(ShardInfo(record.name, record.bytes, record.sha256, len(record.samples)))

    def _add_sources(self, files: list[SourceFile] | None) -> None:
        if files is None or self._sources is None:
            self._sources = None
        else:
            self._sources.append(np.array([one[1:] for one in files], np.int64).reshape(-1, 3))

    def sources(self, plan: Plan) -> Sources | None:
        """What all shards were made from; None if an earlier version, which did not note it, has made some."""
        if self._sources is None:
            return None
        columns = np.concatenate([np.zeros((0, 3), np.int64), *self._sources]).T
        return Sources(plan.pictures, plan.captions, plan.lists, *columns)

    def columns(self) -> dict[str, np.ndarray]:
        """The manifest's columns; there is at least one sample."""
        columns = {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}
        columns["first_caption"] = np.concatenate([[0], np.cumsum(columns.pop("captions"))])
        columns["twin"] = np.full(len(self._twins), -1)
        if any(self._twins):
            number_of = {name.decode(): number for number, name in enumerate(columns["image_id"].tolist())}
            # The original of a twin may have been dropped.
            columns["twin"][:] = [number_of.get(twin, -1) if twin is not None else -1 for twin in self._twins]
        return columns


def _rows(record: Record, shard: int, split: int) -> dict[str, np.ndarray]:
    samples = record.samples
    first = np.array([sample.members[:2] for sample in samples], np.int64)  # [n, JSON or picture, offset or bytes]
    audio = np.array([member for sample in samples for member in sample.members[2:]], np.int64)
    return {
        "key": np.array([sample.key.encode() for sample in samples]),
        "image_id": np.array([sample.image_id.encode() for sample in samples]),
        "shard": np.full(len(samples), shard, COLUMNS["shard"]),
        "split": np.full(len(samples), split, COLUMNS["split"]),
        "meta_offset": first[:, 0, 0],
        "meta_bytes": first[:, 0, 1],
        "image_offset": first[:, 1, 0],
        "image_bytes": first[:, 1, 1],
        "captions": np.array([len(sample.durations) for sample in samples]),
        "audio_offset": audio[:, 0],
        "audio_bytes": audio[:, 1],
        "duration": np.array([seconds for sample in samples for seconds in sample.durations], COLUMNS["duration"]),
    }


def gather(records: Iterable[Record]) -> Gathered:
    """Take in all shards, one at a time."""
    gathered = Gathered()
    for record in records:
        gathered.add(record)
    return gathered
