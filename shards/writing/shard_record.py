"""The plan of a run and the record of each finished shard, stored beside the shards; the manifest is made from them."""

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
from shards.corpora.text_files import ListFile
from shards.files import atomic_write
from shards.manifest import COLUMNS, FORMAT, ShardInfo
from shards.report import AudioWarning, Dropped, Report, SplitCounts
from shards.writing.sources import SourceFile, Sources

PLAN = "plan.json"
# A shard without bad input is the same with and without this option, so a run may be resumed with the other choice.
_SKIP_BAD = "skip_bad"


@dataclass(frozen=True)
class WritingPlan:
    """All shards of a folder and their inputs; every part of a divided run has the same plan."""

    corpus: str
    arguments: dict[str, Any]  # JSON values stored in the manifest
    form: dict[str, Any]  # how samples are stored
    shards: dict[str, str]  # name of a tar -> digest of its samples' description; see `lists_digest`
    parts: int = 1  # of the latest run
    dropped: tuple[Dropped, ...] = ()  # while the corpus was read
    lists: tuple[ListFile, ...] = ()  # list files of the corpus
    pictures: int = 0  # in the corpus
    captions: int = 0

    @property
    def skip_bad(self) -> bool:
        """Whether unreadable input is dropped."""
        return bool(self.form.get(_SKIP_BAD))

    def difference(self, earlier: "WritingPlan") -> str | None:
        """Return how two commands differ, as "NAME OLD, now NEW"; None if this one can resume the earlier one.

        The corpus itself may have changed; the digests of the shards show which are still valid.
        """
        old, new = ({"corpus": plan.corpus, **plan.form, **plan.arguments} for plan in (earlier, self))
        for name in sorted(old.keys() | new.keys()):
            # A missing name belongs to another version, in which the default had the same effect.
            if name != _SKIP_BAD and (old.get(name) or None) != (new.get(name) or None):
                return f"{name} {old.get(name)}, now {new.get(name)}"
        return None

    def save(self, notes: Path) -> None:
        """Write `plan.json`."""
        with atomic_write(notes / PLAN) as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")


def load_plan(notes: Path) -> WritingPlan | None:
    """Read `plan.json`; None if it is missing or damaged."""
    try:
        stored = json.loads((notes / PLAN).read_bytes())
        stored["dropped"] = tuple(Dropped(**one) for one in stored.get("dropped", ()))
        stored["lists"] = tuple(ListFile(*one) for one in stored.get("lists", ()))
        return WritingPlan(**stored)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass
class SampleRecord:
    """One written sample."""

    key: str
    image_id: str
    twin: str | None
    durations: list[float]  # seconds, per caption
    speakers: list[str | None]
    members: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes) of JSON, picture, captions' audio


@dataclass
class ShardRecord:
    """One finished shard; if all its samples were dropped, there is no tar."""

    name: str
    split: str
    lists: str  # digest of its samples' description; see `lists_digest`
    files: str  # digest of the sizes and times of its source files; see `files_digest`
    samples: list[SampleRecord] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[AudioWarning] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    sources: list[SourceFile] | None = None  # None: written by an earlier version

    def save(self, notes: Path) -> None:
        """Write `NAME.json`, after the tar is complete."""
        with atomic_write(notes / f"{self.name}.json") as file:
            file.write(json.dumps(self, default=vars).encode())


def load_record(notes: Path, name: str, lists: str, skip_bad: bool) -> ShardRecord | None:
    """Read the record of a shard; None unless it is finished as planned and its tar has the recorded size.

    With `skip_bad`, a shard from which input was dropped is accepted.
    """
    try:
        stored = json.loads((notes / f"{name}.json").read_bytes())
        stored["samples"] = [SampleRecord(**one) for one in stored["samples"]]
        stored["dropped"] = [Dropped(**one) for one in stored["dropped"]]
        if stored.get("sources") is not None:
            stored["sources"] = [SourceFile(*one) for one in stored["sources"]]
        stored["warnings"] = [AudioWarning(**one) for one in stored.get("warnings", [])]
        record = ShardRecord(**stored)
        size = (notes.parent / name).stat().st_size if record.samples else 0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = record.lists == lists and record.bytes == size and (skip_bad or not record.dropped)
    return record if usable else None


def lists_digest(items: Sequence[Item], form: dict[str, Any]) -> str:
    """Return the digest of the description and the format of some samples, which determine a shard's bytes."""
    relevant = {name: value for name, value in form.items() if name != _SKIP_BAD}
    return _digest([FORMAT, relevant, _as_json(items)])


def files_digest(stamps: Iterable[tuple[int, int]]) -> str:
    """Return the digest of size and time of modification of the source files of some samples; see `sources.stamp`."""
    return _digest([one if one[0] >= 0 else None for one in stamps])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """Return a JSON value that is the same in every process: functions by name, their arguments by content."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return ["file", os.path.abspath(value)]
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = [(one, getattr(value, one.name)) for one in fields(value) if one.compare]
        # A field that earlier versions did not have counts if it is set, so that their shards are kept.
        counted = [part for one, part in parts if part is not None or "later" not in one.metadata]
        return [_name(type(value)), *map(_as_json, counted)]
    if isinstance(value, partial):
        return ["call", *map(_as_json, (value.func, value.args, list(value.keywords.items())))]
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return ["function", _name(value)]
    return ["pickle", hashlib.sha256(pickle.dumps(value)).hexdigest()]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


@dataclass
class GatheredRecords:
    """The contents of the manifest and the report, gathered from the records in the order of the plan."""

    shards: list[ShardInfo] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    _rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    _twins: list[str | None] = field(default_factory=list)
    _sources: list[np.ndarray] | None = field(default_factory=list)  # [files, 3] each; None: some shards have none

    def add(self, record: ShardRecord) -> None:
        """Add one shard."""
        self._add_sources(record.sources)
        counts = self.report.splits.setdefault(record.split, SplitCounts())
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
        # Converted to arrays at once, as lists of numbers of a large corpus would fill the memory.
        self._rows.append(_rows(record, len(self.shards), self.splits.index(record.split)))
        self._twins += [sample.twin for sample in record.samples]
        self.shards.append(ShardInfo(record.name, record.bytes, record.sha256, len(record.samples)))

    def _add_sources(self, files: list[SourceFile] | None) -> None:
        if files is None or self._sources is None:
            self._sources = None
        else:
            self._sources.append(np.array([one[1:] for one in files], np.int64).reshape(-1, 3))

    def sources(self, plan: WritingPlan) -> Sources | None:
        """Return the sources of all shards; None if some shards were written by an earlier version without them."""
        if self._sources is None:
            return None
        columns = np.concatenate([np.zeros((0, 3), np.int64), *self._sources]).T
        return Sources(plan.pictures, plan.captions, plan.lists, *columns)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the manifest; there must be at least one sample."""
        columns = {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}
        columns["first_caption"] = np.concatenate([[0], np.cumsum(columns.pop("captions"))])
        columns["twin"] = np.full(len(self._twins), -1)
        if any(self._twins):
            number_of = {name.decode(): number for number, name in enumerate(columns["image_id"].tolist())}
            # The original of a twin may have been dropped.
            columns["twin"][:] = [number_of.get(twin, -1) if twin is not None else -1 for twin in self._twins]
        return columns


def _rows(record: ShardRecord, shard: int, split: int) -> dict[str, np.ndarray]:
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


def gather(records: Iterable[ShardRecord]) -> GatheredRecords:
    """Gather the records of all shards, one at a time."""
    gathered = GatheredRecords()
    for record in records:
        gathered.add(record)
    return gathered
