"""Recall of groups of the test queries: by speaker, language, accent, duration, number of words."""

from collections.abc import Mapping, Sequence
from typing import Any

from shards.html.chart import bar_chart
from toolkit.reporting.figures import get
from toolkit.reporting.runs import Run

_SHOWN = 16  # largest groups of an attribute
_RUNS = 6  # beside one another
_ORDERED = ("duration", "words")  # attributes whose groups begin with a number

_Groups = Mapping[str, Mapping[str, Any]]  # attribute -> group -> {"captions", "speech_to_image": {"R@1", ...}, ...}


def groups_section(runs: Sequence[Run]) -> dict[str, Any]:
    """Return charts of R@1 by group, for each test set apart; of a run its newest result with groups counts."""
    by_data: dict[str, dict[str, _Groups]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            if isinstance(get(evaluation.report, "groups"), dict):
                by_data.setdefault(evaluation.data, {})[run.name] = evaluation.report["groups"]
    notes = []
    if not by_data:
        command = f"python toolkit/evaluate.py --run {runs[0].folder} --by speaker duration"
        notes.append(f"Not measured. Made by: {command}")
    if len(by_data) > 1:
        notes.append("Different test data: figures of one part do not compare with those of another.")
    if any(len(found) > _RUNS for found in by_data.values()):
        notes.append(f"Of the first {_RUNS} runs.")
    groups = [{"data": data, "charts": _charts(found)} for data, found in by_data.items()]
    return {"groups": groups, "notes": notes}


def _charts(found: Mapping[str, _Groups]) -> list[Any]:
    shown = dict(list(found.items())[:_RUNS])
    charts = []
    for attribute in dict.fromkeys(attribute for groups in shown.values() for attribute in groups):
        of_runs = {run: _rows(attribute, groups.get(attribute)) for run, groups in shown.items()}
        charts.append(bar_chart(f"Speech to image R@1 by {attribute}, %", of_runs))
    return [chart for chart in charts if chart]


def _rows(attribute: str, groups: Any) -> dict[str, float]:
    """Return R@1 of the largest groups by their name and size."""
    rows = list(groups.items())[:_SHOWN] if isinstance(groups, Mapping) else []
    if attribute in _ORDERED:
        rows.sort(key=lambda row: _leading_number(row[0]))
    figures = {f"{name} ({get(row, 'captions')})": get(row, "speech_to_image", "R@1") for name, row in rows}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def _leading_number(name: str) -> float:
    try:
        return float(name.split()[0])
    except (ValueError, IndexError):
        return float("inf")
