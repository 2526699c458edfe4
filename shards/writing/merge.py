"""Close a folder whose shards are all written: the index, the report, what they were made from, last the manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import manifest
from shards.errors import UserError
from shards.report import Report
from shards.writing.folder_lock import UNFINISHED, sweep
from shards.writing.shard_record import Plan, Record, gather, load_record
from shards.writing.sources import compare_files, save_sources

_NAMED = 5  # missing shards that a message shows


@dataclass
class _Seen:
    """What is wrong with the shards of a plan."""

    missing: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)  # shard -> what of its sources is other than when it was made
    gone: int = 0  # source files that are not there any more


def close_folder(folder: Path, plan: Plan) -> Report:
    """Write what belongs to all shards, from the records of each.

    Raises:
        UserError: A shard is missing or not of this plan, a file changed after it was read, or no sample is left.
    """
    seen = _Seen()
    gathered = gather(_records(folder, plan, seen))
    if seen.missing:
        raise UserError(_still_missing(seen.missing, plan))
    if seen.changed:
        raise UserError(_changed(seen.changed, plan))
    if not gathered.shards:
        raise UserError(f"no sample is left to write: {gathered.report.dropped[0].reason}")
    sweep(folder, {shard.name for shard in gathered.shards})
    gathered.report.dropped[:0] = plan.dropped
    gathered.report.gone = seen.gone
    report = gathered.report.save(folder)
    if (sources := gathered.sources(plan)) is not None:
        save_sources(folder, sources)
    manifest.save(folder, plan.corpus, gathered.shards, gathered.splits, gathered.columns(), plan.arguments, report)
    return gathered.report


def _records(folder: Path, plan: Plan, seen: _Seen) -> Iterator[Record]:
    """Yield the records that are there, in the order of the plan, and note in `seen` what is wrong."""
    for name, lists in plan.shards.items():
        record = load_record(folder / UNFINISHED, name, lists, plan.skip_bad)
        if record is None:
            seen.missing.append(name)
            continue
        paths = [one.path for one in record.sources or ()]
        columns = np.array([one[1:] for one in record.sources or ()], np.int64).reshape(-1, 3)
        differences = compare_files(paths, *columns.T)
        seen.gone += differences.gone
        if differences:
            seen.changed[name] = str(differences)
        yield record


def _still_missing(names: Sequence[str], plan: Plan) -> str:
    part_of_shard = _parts_by_shard(plan)
    named = ", ".join(f"{name} (part {part_of_shard[name]})" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    what = f"{len(names)} of {len(plan.shards)} shards are missing, or not as planned last"
    return f"{what}: {named}{more}: {_again(names, plan)}"


def _changed(shards: dict[str, str], plan: Plan) -> str:
    name, what = next(iter(shards.items()))
    more = f", and files of {len(shards) - 1} more shards changed" if len(shards) > 1 else ""
    return f"{what} since {name} was written{more}: {_again(list(shards), plan)}"


def _again(names: Sequence[str], plan: Plan) -> str:
    """How to write some shards again."""
    if plan.parts == 1:
        return "run the same command again"
    part_of_shard = _parts_by_shard(plan)
    parts = sorted({part_of_shard[name] for name in names}, key=lambda part: int(part.split("/")[0]))
    return f"run --part {', '.join(parts)} again"


def _parts_by_shard(plan: Plan) -> dict[str, str]:
    """Which part writes each shard."""
    return {name: f"{number % plan.parts + 1}/{plan.parts}" for number, name in enumerate(plan.shards)}
