"""The shard doctor: is a folder of shards what its manifest says, and fit to train on?

Every byte is read once and nothing is extracted. A problem is what makes training wrong or impossible; a warning is
what someone should know.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.checking.check_shard import Found, Task, check_shard, task_of
from shards.checking.duplicates import find_duplicates, gather_digests
from shards.checking.finding import Finding, shortened
from shards.errors import UserError
from shards.files import file_sha256, listed
from shards.manifest import INDEX, MANIFEST, Manifest, load, stored_problem
from shards.report import REPORT, load_report
from shards.worker_pool import Progress, run_tasks
from shards.writing.folder_lock import UNFINISHED
from shards.writing.sources import SOURCES, sources_problem


@dataclass
class Health:
    """What the doctor found."""

    folder: Path
    manifest: Manifest | None  # None: it cannot be read
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    pictures: int = 0  # decoded
    recordings: int = 0

    @property
    def healthy(self) -> bool:
        """Whether there is no problem; warnings do not count."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """In a word, or with the number of problems."""
        return "healthy" if self.healthy else f"NOT HEALTHY ({_count(len(self.problems), 'problem')})"

    def text(self) -> str:
        """The summary for people."""
        lines = [str(self.folder)]
        if self.manifest is not None:
            lines += [*_table(self.manifest), ""]
            lines.append(
                f"read: every byte of {_count(len(self.manifest.shards), 'shard')}, all headers; "
                f"decoded: {_count(self.pictures, 'picture')}, {_count(self.recordings, 'recording')}"
            )
        lines += [f"problem: {finding}" for finding in self.problems]
        lines += [f"warning: {finding}" for finding in self.warnings]
        return "\n".join([*lines, self.verdict])

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        m = self.manifest
        return {
            "folder": str(self.folder),
            "healthy": self.healthy,
            "problems": [str(finding) for finding in self.problems],
            "warnings": [str(finding) for finding in self.warnings],
            "decoded": {"pictures": self.pictures, "recordings": self.recordings},
            "hash": m.hash if m else None,
            "shards": len(m.shards) if m else None,
            "bytes": sum(shard.bytes for shard in m.shards) if m else None,
            "splits": {row.pop("split"): row for row in split_rows(m)} if m else {},
        }


def check_folder(
    folder: Path, decode: int | None = 200, jobs: int = 1, progress: Progress = lambda done: None
) -> Health:
    """Examine a folder of shards.

    Args:
        folder: what make_shards wrote.
        decode: samples to decode, spread over the folder; None: all. The headers of all are read.
        jobs: processes.
        progress: told how many samples were done since the last call.

    Raises:
        UserError: there is no such folder, or nothing of shards in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    try:
        manifest = load(folder)
    except UserError as error:
        if not any(path.suffix == ".tar" or path.name in (MANIFEST, INDEX, UNFINISHED) for path in listed(folder)):
            raise
        return Health(folder, None, [Finding(MANIFEST, str(error))])
    health = Health(folder, manifest)
    chosen = _spread(len(manifest.key), decode)
    found = dict(run_tasks(check_shard, _Tasks(manifest, chosen), jobs, progress))
    for shard in manifest.shards:
        _add(health, shard.name, found[shard.name])
    digests = gather_digests(found[shard.name].digests for shard in manifest.shards)
    for lines, more in zip((health.problems, health.warnings), find_duplicates(manifest, digests), strict=True):
        lines += more
    _compare_manifest(health)
    _compare_report(health, manifest)
    _compare_sources(health, manifest)
    _pass_on_warnings(health)
    _find_foreign(health, manifest)
    return health


class _Tasks(Mapping[str, Task]):
    """A task for each shard by its name, made when it is its turn."""

    def __init__(self, m: Manifest, decode: np.ndarray) -> None:
        self.m, self.decode = m, decode
        self.numbers = {shard.name: number for number, shard in enumerate(m.shards)}

    def __getitem__(self, name: str) -> Task:
        return task_of(self.m, self.numbers[name], self.decode)

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def split_rows(m: Manifest) -> Iterator[dict[str, Any]]:
    """What each split holds: split, pictures, captions, hours, shards, megabytes."""
    captions = np.diff(m.first_caption)
    seconds = np.add.reduceat(np.append(m.duration, 0.0), m.first_caption[:-1]) if len(captions) else np.zeros(0)
    seconds = np.where(captions > 0, seconds, 0.0)
    for split in m.splits:
        rows = m.rows(split)
        shards = np.unique(m.shard[rows])
        yield {
            "split": split,
            "pictures": len(rows),
            "captions": int(captions[rows].sum()),
            "hours": round(float(seconds[rows].sum()) / 3600, 4),
            "shards": len(shards),
            "megabytes": round(sum(m.shards[n].bytes for n in shards) / 1e6, 3),
        }


def _table(m: Manifest) -> list[str]:
    names = ("pictures", "captions", "hours", "shards", "MB")
    lines = ["split       " + "".join(f"{name:>10}" for name in names)]
    for row in split_rows(m):
        numbers = f"{row['pictures']:>10,}{row['captions']:>10,}{row['hours']:>10.2f}{row['shards']:>10,}"
        lines.append(f"{row['split']:<12}{numbers}{row['megabytes']:>10,.1f}")
    return lines


def _spread(samples: int, count: int | None) -> np.ndarray:
    """Mark `count` of the samples at even distances, bool [samples]."""
    if count is None:
        return np.ones(samples, bool)
    chosen = np.zeros(samples, bool)
    chosen[np.linspace(0, samples - 1, min(count, samples)).round().astype(int)] = True
    return chosen


def _add(health: Health, name: str, found: Found) -> None:
    health.problems += [Finding(name, line) for line in found.problems]
    health.warnings += [Finding(name, line) for line in found.warnings]
    health.pictures += found.pictures
    health.recordings += found.recordings


def _compare_manifest(health: Health) -> None:
    """See that the manifest, all of which `load` understands, is also what was written, to the byte."""
    if problem := stored_problem(health.folder):
        health.problems.append(Finding(MANIFEST, problem))


def _compare_report(health: Health, m: Manifest) -> None:
    """Hold the report against its checksum in the manifest; if an earlier version noted none, against the index."""
    if m.report is not None:
        _compare_checksum(health, m.report)
        return
    health.warnings.append(Finding(REPORT, "an earlier version wrote no checksum of it: not every change is noticed"))
    try:
        report = load_report(health.folder)
    except UserError as error:
        health.warnings.append(Finding(REPORT, str(error)))
        return
    for row in split_rows(m):
        counts = report.splits.get(row["split"])
        told = (counts.pictures, counts.captions) if counts else (0, 0)
        if told != (row["pictures"], row["captions"]):
            line = f"it counts {told[0]:,} pictures and {told[1]:,} captions in {row['split']}, the index has "
            health.problems.append(Finding(REPORT, f"{line}{row['pictures']:,} and {row['captions']:,}"))


def _compare_checksum(health: Health, expected: str) -> None:
    path = health.folder / REPORT
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # reading a pipe would wait for ever
        problem = None if regular and file_sha256(path) == expected else "its checksum is not the manifest's"
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    if problem:
        health.problems.append(Finding(REPORT, f"{problem}: make the shards again, or restore it from a copy"))


def _compare_sources(health: Health, m: Manifest) -> None:
    """See that what the shards were made from is as it was written; an earlier version did not write it."""
    if os.path.lexists(health.folder / SOURCES):
        if problem := sources_problem(health.folder):
            health.problems.append(Finding(SOURCES, f"{problem}: remove it, or restore it from a copy"))
    elif m.report is not None:
        line = "is missing: make_shards cannot see whether the corpus changed since"
        health.warnings.append(Finding(SOURCES, line))


def _pass_on_warnings(health: Health) -> None:
    """Name the recordings of which the report warns, which knows all of them, as far as they were not decoded here."""
    if any(finding.where == REPORT for finding in health.problems):
        return
    try:
        report = load_report(health.folder)
    except UserError:
        return
    known = {(finding.where, finding.what.partition(":")[0]) for finding in health.warnings}
    places = ((one.shard, f"{one.sample}, caption {one.caption}", one.what) for one in report.warnings)
    left = [Finding(shard, f"{place}: {what}") for shard, place, what in places if (shard, place) not in known]
    health.warnings += shortened(left, len(left))


def _find_foreign(health: Health, m: Manifest) -> None:
    """Name what is in the folder and is not of the data set."""
    ours = {MANIFEST, INDEX, REPORT, SOURCES, *(shard.name for shard in m.shards)}
    foreign = sorted(path.name for path in listed(health.folder) if path.name not in ours)
    tars = [name for name in foreign if name.endswith(".tar")]
    line = "is not in the manifest, but whatever reads *.tar would read it: remove it"
    health.problems += shortened((Finding(name, line) for name in tars), len(tars))
    rest = [name for name in foreign if name not in tars]
    health.warnings += shortened((Finding(name, _why_there(name)) for name in rest), len(rest))


def _why_there(name: str) -> str:
    if name == UNFINISHED or name.endswith(".tmp"):
        return "was left by a run that did not end: it can be removed"
    return "is not of the data set"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
