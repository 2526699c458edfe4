"""Runs beside one another: which folders are runs, what was measured with each, and which differ by the seed only."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import read_object
from toolkit.config.load import SAVED
from toolkit.config.schema import Config
from toolkit.evaluation.results import Result, load_results
from toolkit.reporting.curves import read_log
from toolkit.reporting.figures import get
from toolkit.run_folder import LOG, RECALL, fingerprint, flatten, load_run, runs_below

_NOT_COMPARED = ("run", "seed", "launch.", "wandb.")  # prefixes of keys that do not make configurations different


@dataclass(frozen=True)
class RunEvaluation:
    """One evaluation of a run.

    Attributes:
        report: As in recall.json; see `toolkit.evaluation.retrieve.retrieve`.
        data: Name of the test data: corpus, split and checksum of the shards; of an evaluation that does not record
            them, split, sizes and location.
        final: Whether it is the final evaluation of the run.
        result: With the ranks of the queries; None: they were not stored.
    """

    report: dict[str, Any]
    data: str
    final: bool
    result: Result | None


@dataclass(frozen=True)
class Run:
    """A run and what is known of it.

    Attributes:
        folder: The run folder.
        name: Its name, unique among the runs.
        config: Its configuration.
        records: Of its log.
        evaluations: Of its model.
        baselines: By the name of the test data, results that are stored beside the model's own, of `analyze.py text`.
    """

    folder: Path
    name: str
    config: Config
    records: list[dict[str, Any]]
    evaluations: list[RunEvaluation]
    baselines: list[tuple[str, Result]]

    @property
    def final(self) -> RunEvaluation | None:
        """The final evaluation; None: there was none yet."""
        return next((one for one in self.evaluations if one.final), None)


@dataclass(frozen=True)
class Configuration:
    """Runs with the same settings and different seeds."""

    name: str
    runs: list[Run]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Load the runs in folders of runs or grids; those of a grid in the order of its submission.

    Raises:
        UserError: A folder does not exist or has no runs, or the configuration or a result of a run cannot be read.
    """
    found = list(dict.fromkeys(run for folder in folders for run in _find(folder)))
    names = [folder.resolve().name for folder in found]
    runs = []
    for folder, name in zip(found, names, strict=True):
        unique = name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        results = load_results(folder)
        own = [result for result in results if not result.is_baseline]
        baselines = [(_data_name(result), result) for result in results if result.is_baseline]
        runs.append(Run(folder, unique, load_run(folder), read_log(folder), _evaluations(folder, own), baselines))
    return runs


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder, or a folder of runs")
    found = [folder] if _is_run(folder) else list(runs_below(folder, _is_run))
    if not found:
        raise UserError(f"{folder} is not a run folder and contains none (no {SAVED} with a {LOG} or {RECALL})")
    order = _submitted(folder)
    return sorted(found, key=lambda run: order.get(run.name, len(order)))


def _is_run(folder: Path) -> bool:
    return (folder / SAVED).is_file() and any((folder / name).is_file() for name in (LOG, RECALL))


def _submitted(grid: Path) -> dict[str, int]:
    """Return the position of each member of a grid by its name, as its last submission recorded them."""
    for path in sorted(grid.glob("logs/*/submission.json"), reverse=True):
        members = get(read_object(path), "members")
        if isinstance(members, dict):
            indices = sorted(filter(str.isdecimal, members), key=int)
            return {Path(str(members[index])).parent.parent.name: int(index) for index in indices}
    return {}


def _evaluations(run: Path, results: Sequence[Result]) -> list[RunEvaluation]:
    """Return the stored results; the final one without ranks where it is older than they are."""
    final = read_object(run / RECALL)
    same = [result for result in results if _is_same(result, final)]
    evaluations = [
        RunEvaluation(result.report, _data_name(result), any(result is one for one in same[-1:]), result)
        for result in results
    ]
    if isinstance(get(final, "coarse", "mean_R@1"), int | float) and not same:
        evaluations.append(RunEvaluation(final, _unrecorded_data(final), True, None))
    return evaluations


def _is_same(result: Result, final: dict[str, Any]) -> bool:
    """Whether recall.json is this result."""
    keys = ("split", "checkpoint", "step", "coarse", "pictures", "captions")
    return all(result.report.get(key) == final.get(key) for key in keys) and (
        get(result.report, "reranked", "mean_R@1") == get(final, "reranked", "mean_R@1")
    )


def _data_name(result: Result) -> str:
    limit = get(result.report, "baseline", "limit")
    part = "" if limit is None else f", {limit} of its images"
    return f"{result.corpus} {result.split}, shards {result.manifest[:8]}{part}"


def _unrecorded_data(report: dict[str, Any]) -> str:
    sizes = f"{report.get('pictures')} images, {report.get('captions')} captions"
    return f"{report.get('split')} of {report.get('shards')} ({sizes}; checksum not recorded)"


def group_runs(runs: Iterable[Run]) -> list[Configuration]:
    """Group runs into configurations, by their settings without the seed, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(fingerprint(dataclasses.replace(run.config, seed=0)), []).append(run)
    names = [_name(members) for members in groups.values()]
    return [
        Configuration(name if names.count(name) == 1 else members[0].name, members)
        for name, members in zip(names, groups.values(), strict=True)
    ]


def _name(runs: Sequence[Run]) -> str:
    """Name of a configuration: the runs' without the seed if they agree, else the first run's."""
    names = {re.sub(r"[-_.]?seed[-_]?\d+$", "", run.name) for run in runs}
    return names.pop() or runs[0].name if len(names) == 1 else runs[0].name


def differences(configurations: Sequence[Configuration]) -> tuple[list[str], list[list[str]]]:
    """Return a table of the settings that differ between configurations.

    Returns:
        The head, and a row for each key.
    """
    flat = [flatten(dataclasses.asdict(each.runs[0].config)) for each in configurations]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if not key.startswith(_NOT_COMPARED)]
    rows = [
        [key, *values]
        for key in keys
        if len(set(values := [_text(one[key]) if key in one else "" for one in flat])) > 1
    ]
    return ["key", *(each.name for each in configurations)], rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
