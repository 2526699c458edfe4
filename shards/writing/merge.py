"""Finish a folder whose shards are all written: write the index, the report, the sources and, last, the manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import manifest
from shards.errors import UserError
from shards.remote import is_url
from shards.report import Report
from shards.writing.folder_lock import UNFINISHED, remove_shard_files
from shards.writing.shard_record import ShardRecord, WritingPlan, gather, load_record
from shards.writing.sources import compare_files, save_sources

_MAX_NAMED = 5  # missing shards named in a message


@dataclass
class _Problems:
    """Shards of a plan that are missing or outdated."""

    missing: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)  # shard -> how its source files changed since it was written
    missing_sources: int = 0  # source files that do not exist any more


def close_folder(folder: Path, plan: WritingPlan) -> Report:
    """Write the files that describe all shards, from the record of each.

    Raises:
        UserError: A shard is missing or of another plan, a source file changed after it was read, or no sample is left.
    """
    problems = _Problems()
    gathered = gather(_records(folder, plan, problems))
    if problems.missing:
        raise UserError(_missing_message(problems.missing, plan))
    if problems.changed:
        raise UserError(_changed_message(problems.changed, plan))
    if not gathered.shards:
        raise UserError(f"no sample is left to write: {gathered.report.dropped[0].reason}")
    remove_shard_files(folder, {shard.name for shard in gathered.shards})
    gathered.report.dropped[:0] = plan.dropped
    gathered.report.missing_sources = problems.missing_sources
    report = gathered.report.save(folder)
    if (sources := gathered.sources(plan)) is not None:
        save_sources(folder, sources)
    manifest.save(folder, plan.corpus, gathered.shards, gathered.splits, gathered.columns(), plan.arguments, report)
    return gathered.report


def _records(folder: Path, plan: WritingPlan, problems: _Problems) -> Iterator[ShardRecord]:
    """Yield the existing records in the order of the plan; add missing and outdated shards to `problems`."""
    for name, lists in plan.shards.items():
        record = load_record(folder / UNFINISHED, name, lists, plan.skip_bad)
        if record is None:
            problems.missing.append(name)
            continue
        sources = [source for source in record.sources or () if not is_url(source.path)]
        paths = [source.path for source in sources]
        columns = np.array([source[1:] for source in sources], np.int64).reshape(-1, 3)
        differences = compare_files(paths, *columns.T)
        problems.missing_sources += differences.missing
        if differences:
            problems.changed[name] = str(differences)
        yield record


def _missing_message(names: Sequence[str], plan: WritingPlan) -> str:
    part_of_shard = _parts_by_shard(plan)
    named = ", ".join(f"{name} (part {part_of_shard[name]})" for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    what = f"{len(names)} of {len(plan.shards)} shards are missing or do not match the latest plan"
    return f"{what}: {named}{more}: {_how_to_repeat(names, plan)}"


def _changed_message(shards: dict[str, str], plan: WritingPlan) -> str:
    name, what = next(iter(shards.items()))
    more = f", and files of {len(shards) - 1} more shards changed" if len(shards) > 1 else ""
    return f"{what} since {name} was written{more}: {_how_to_repeat(list(shards), plan)}"


def _how_to_repeat(names: Sequence[str], plan: WritingPlan) -> str:
    """Return the command that writes some shards again."""
    if plan.parts == 1:
        return "run the same command again"
    part_of_shard = _parts_by_shard(plan)
    parts = sorted({part_of_shard[name] for name in names}, key=lambda part: int(part.split("/")[0]))
    return f"run --part {', '.join(parts)} again"


def _parts_by_shard(plan: WritingPlan) -> dict[str, str]:
    """Return the part that writes each shard."""
    return {name: f"{number % plan.parts + 1}/{plan.parts}" for number, name in enumerate(plan.shards)}
