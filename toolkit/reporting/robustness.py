"""Robustness of runs: recall over the strength of each perturbation, and a table of all conditions."""

import json
import math
from collections.abc import Sequence
from typing import Any

from shards.html.chart import bar_chart, line_chart
from toolkit.evaluation.perturbations.kinds import KINDS
from toolkit.evaluation.robustness import CLEAN, Condition, Robustness, describe_augmentation, load_robustness
from toolkit.reporting.runs import Run

_Results = dict[str, Robustness]  # by name of the run


def robustness_section(runs: Sequence[Run]) -> dict[str, Any]:
    """Return charts and tables, for each test set and protocol apart.

    Raises:
        UserError: A file of the robustness suite cannot be read.
    """
    by_data: dict[str, _Results] = {}
    for run in runs:
        for result in load_robustness(run.folder):
            size = f"{result.pictures:,} images, {result.captions:,} captions"
            data = f"{result.corpus} {result.split}, shards {result.manifest[:8]}: {size}"
            step = "" if result.step is None else f" @ {result.step:,}"
            key = json.dumps([data, result.protocol], sort_keys=True)
            by_data.setdefault(key, {})[f"{run.name} {result.checkpoint}{step}"] = result
    notes = [] if by_data else [f"Not measured. Made by: python toolkit/analyze.py robustness --run {runs[0].folder}"]
    if len(by_data) > 1:
        notes.append("Different test data or protocols: figures of one part do not compare with those of another.")
    groups = [{"data": json.loads(key)[0], **_group(results)} for key, results in by_data.items()]
    return {"groups": groups, "notes": notes}


def _group(results: _Results) -> dict[str, Any]:
    notes = [
        f"{name} was trained with augmentation: {describe_augmentation(one.augmentation)}"
        for name, one in results.items()
    ]
    conditions = {(one.kind, one.level, one.unit): one for result in results.values() for one in result.conditions}
    kinds: dict[str, list[Condition]] = {}
    for one in conditions.values():
        kinds.setdefault(one.kind, []).append(one)
    charts = [_curves(kind, levels, results) for kind, levels in kinds.items() if len(levels) > 1]
    single = [levels[0] for levels in kinds.values() if len(levels) == 1]
    if len(single) > 1:
        bars = {
            name: {_label(one): mean for one in single if (mean := _mean(result, one)) is not None}
            for name, result in results.items()
        }
        charts.insert(0, bar_chart("Mean R@1, %", bars))
    rows = [
        [_label(one), one.modality or "", *(_change(result, one) for result in results.values())]
        for levels in kinds.values()
        for one in levels
    ]
    return {
        "notes": notes,
        "charts": [chart for chart in charts if chart],
        "head": ["condition", "of", *results],
        "rows": rows,
    }


def _curves(kind: str, levels: Sequence[Condition], results: _Results) -> Any:
    title = f"{kind} ({levels[0].modality}): {'R@1' if len(results) == 1 else 'mean R@1'}, %"
    unit = levels[0].unit or "level"
    if len(results) > 1:
        curves = {name: _by_level(result, kind, "mean") for name, result in results.items()}
    else:
        (result,) = results.values()
        ways = {"speech to image": "speech_to_image", "image to speech": "image_to_speech"}
        curves = {name: _by_level(result, kind, way) for name, way in ways.items()}
    # In groups of their own: the legend names no value of the largest level, which may be the mildest.
    return line_chart(title, curves, unit, groups={name: name for name in curves})


def _by_level(result: Robustness, kind: str, figure: str) -> dict[float, float]:
    """Return a figure by level, with that of clean where the kind has a level at which nothing changes."""
    measured = [(one.level, one) for one in result.conditions if one.kind == kind and one.level is not None]
    if measured and result.clean_condition and kind in KINDS:
        measured.append((KINDS[kind].clean_level, result.clean_condition))
    return {
        float(level): one.mean if figure == "mean" else getattr(one, figure)["R@1"]
        for level, one in measured
        if math.isfinite(level)
    }


def _mean(result: Robustness, like: Condition) -> float | None:
    return next((one.mean for one in result.conditions if (one.kind, one.level) == (like.kind, like.level)), None)


def _change(result: Robustness, like: Condition) -> str:
    mean, clean = _mean(result, like), result.clean_condition
    if mean is None:
        return ""
    return f"{mean:.1f}" if clean is None or like.kind == CLEAN else f"{mean:.1f} ({mean - clean.mean:+.1f})"


def _label(one: Condition) -> str:
    return one.kind if one.level is None else f"{one.kind} {one.level:g} {one.unit}".rstrip()
