"""Check that a folder of shards matches its manifest and is fit for training.

Every byte is read once and nothing is extracted. A problem makes training wrong or impossible; a warning does not.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.checking.check_shard import ShardFindings, ShardTask, check_shard, task_of
from shards.checking.duplicates import find_duplicates, gather_digests
from shards.checking.finding import Finding, shortened
from shards.errors import UserError
from shards.files import file_sha256, listed
from shards.manifest import INDEX, MANIFEST, Manifest, load, stored_problem
from shards.progress import progress_bar
from shards.report import REPORT, load_report
from shards.worker_pool import run_tasks
from shards.writing.folder_lock import UNFINISHED
from shards.writing.sources import SOURCES, sources_problem


@dataclass
class CheckResult:
    """Result of `check_folder`."""

    folder: Path
    manifest: Manifest | None  # None: cannot be read
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    pictures: int = 0  # decoded
    audio_files: int = 0  # decoded

    @property
    def healthy(self) -> bool:
        """Whether there are no problems; warnings do not count."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The result in one line."""
        return "healthy" if self.healthy else f"NOT HEALTHY ({_count(len(self.problems), 'problem')})"

    def text(self) -> str:
        """Format the summary as text."""
        lines = [str(self.folder)]
        if self.manifest is not None:
            lines += [*_table(self.manifest), ""]
            lines.append(
                f"read: every byte of {_count(len(self.manifest.shards), 'shard')}, all headers; "
                f"decoded: {_count(self.pictures, 'picture')}, {_count(self.audio_files, 'audio file')}"
            )
        lines += [f"problem: {finding}" for finding in self.problems]
        lines += [f"warning: {finding}" for finding in self.warnings]
        return "\n".join([*lines, self.verdict])

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        m = self.manifest
        return {
            "folder": str(self.folder),
            "healthy": self.healthy,
            "problems": [str(finding) for finding in self.problems],
            "warnings": [str(finding) for finding in self.warnings],
            "decoded": {"pictures": self.pictures, "recordings": self.audio_files},
            "hash": m.hash if m else None,
            "shards": len(m.shards) if m else None,
            "bytes": sum(shard.bytes for shard in m.shards) if m else None,
            "splits": {row.pop("split"): row for row in split_rows(m)} if m else {},
        }


def check_folder(folder: Path, decode: int | None = 200, jobs: int = 1, show_progress: bool = False) -> CheckResult:
    """Check a folder of shards.

    Args:
        folder: A folder written by make_shards.
        decode: Number of samples to decode, evenly spaced; None: all. The headers of all samples are read.
        jobs: Number of processes.
        show_progress: Whether to show a progress bar.

    Raises:
        UserError: The folder does not exist or contains no shards.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    try:
        manifest = load(folder)
    except UserError as error:
        if not any(path.suffix == ".tar" or path.name in (MANIFEST, INDEX, UNFINISHED) for path in listed(folder)):
            raise
        return CheckResult(folder, None, [Finding(MANIFEST, str(error))])
    result = CheckResult(folder, manifest)
    chosen = _spread(len(manifest.key), decode)
    with progress_bar(len(manifest.key), "samples", show=show_progress, leave=False) as progress:
        findings = dict(run_tasks(check_shard, _Tasks(manifest, chosen), jobs, progress))
    for shard in manifest.shards:
        _add(result, shard.name, findings[shard.name])
    digests = gather_digests(findings[shard.name].digests for shard in manifest.shards)
    for lines, more in zip((result.problems, result.warnings), find_duplicates(manifest, digests), strict=True):
        lines += more
    if problem := stored_problem(folder):
        result.problems.append(Finding(MANIFEST, problem))
    _compare_report(result, manifest)
    _compare_sources(result, manifest)
    _add_report_warnings(result)
    _find_foreign(result, manifest)
    return result


class _Tasks(Mapping[str, ShardTask]):
    """The task of each shard by name, created when it starts."""

    def __init__(self, m: Manifest, decode: np.ndarray) -> None:
        self.m, self.decode = m, decode
        self.numbers = {shard.name: number for number, shard in enumerate(m.shards)}

    def __getitem__(self, name: str) -> ShardTask:
        return task_of(self.m, self.numbers[name], self.decode)

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def split_rows(m: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the contents of each split: split, pictures, captions, hours, shards, megabytes."""
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
    """Select `count` evenly spaced samples, bool [samples]."""
    if count is None:
        return np.ones(samples, bool)
    chosen = np.zeros(samples, bool)
    chosen[np.linspace(0, samples - 1, min(count, samples)).round().astype(int)] = True
    return chosen


def _add(result: CheckResult, name: str, findings: ShardFindings) -> None:
    result.problems += [Finding(name, line) for line in findings.problems]
    result.warnings += [Finding(name, line) for line in findings.warnings]
    result.pictures += findings.pictures
    result.audio_files += findings.audio_files


def _compare_report(result: CheckResult, m: Manifest) -> None:
    """Compare the report with its checksum in the manifest or, if an earlier version wrote none, with the index."""
    if m.report is not None:
        _compare_checksum(result, m.report)
        return
    result.warnings.append(Finding(REPORT, "an earlier version wrote no checksum of it: not every change is detected"))
    try:
        report = load_report(result.folder)
    except UserError as error:
        result.warnings.append(Finding(REPORT, str(error)))
        return
    for row in split_rows(m):
        counts = report.splits.get(row["split"])
        reported = (counts.pictures, counts.captions) if counts else (0, 0)
        if reported != (row["pictures"], row["captions"]):
            line = f"it counts {reported[0]:,} pictures and {reported[1]:,} captions in {row['split']}, the index has "
            result.problems.append(Finding(REPORT, f"{line}{row['pictures']:,} and {row['captions']:,}"))


def _compare_checksum(result: CheckResult, expected: str) -> None:
    path = result.folder / REPORT
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # reading a pipe would block
        problem = None if regular and file_sha256(path) == expected else "its checksum differs from the manifest"
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    if problem:
        result.problems.append(Finding(REPORT, f"{problem}: make the shards again, or restore it from a copy"))


def _compare_sources(result: CheckResult, m: Manifest) -> None:
    """Check that the record of the source files is unchanged; earlier versions did not write it."""
    if os.path.lexists(result.folder / SOURCES):
        if problem := sources_problem(result.folder):
            result.problems.append(Finding(SOURCES, f"{problem}: remove it, or restore it from a copy"))
    elif m.report is not None and not m.indexed:
        line = "is missing: make_shards cannot detect whether the corpus changed"
        result.warnings.append(Finding(SOURCES, line))


def _add_report_warnings(result: CheckResult) -> None:
    """Add the report's warnings, which cover all audio files, for those that were not decoded here."""
    if any(finding.where == REPORT for finding in result.problems):
        return
    try:
        report = load_report(result.folder)
    except UserError:
        return
    present = {(finding.where, finding.what.partition(":")[0]) for finding in result.warnings}
    reported = ((one.shard, f"{one.sample}, caption {one.caption}", one.what) for one in report.warnings)
    missing = [Finding(shard, f"{where}: {what}") for shard, where, what in reported if (shard, where) not in present]
    result.warnings += shortened(missing, len(missing))


def _find_foreign(result: CheckResult, m: Manifest) -> None:
    """Report files of the folder that do not belong to the data set."""
    expected = {MANIFEST, INDEX, REPORT, SOURCES, *(shard.name for shard in m.shards)}
    foreign = sorted(path.name for path in listed(result.folder) if path.name not in expected)
    tars = [name for name in foreign if name.endswith(".tar")]
    line = "is not in the manifest, but programs that read *.tar would read it: remove it"
    result.problems += shortened((Finding(name, line) for name in tars), len(tars))
    rest = [name for name in foreign if name not in tars]
    result.warnings += shortened((Finding(name, _describe_foreign(name)) for name in rest), len(rest))


def _describe_foreign(name: str) -> str:
    if name == UNFINISHED or name.endswith(".tmp"):
        return "was left by an unfinished run: it can be removed"
    return "does not belong to the data set"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
