"""Figures of results for tables: recall in both directions, and the final evaluation of a run."""

from collections.abc import Mapping
from typing import Any

DIRECTION_LABELS = {"speech_to_image": "S>I", "image_to_speech": "I>S"}
CUTOFFS = ("R@1", "R@5", "R@10")
RECALL_HEAD = [*(f"{short} {cutoff}" for short in DIRECTION_LABELS.values() for cutoff in CUTOFFS), "mean R@1"]


def get(tree: Any, *keys: str) -> Any:
    """Return a nested value; None where a key is missing or something is not a mapping."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(value: Any, decimals: int = 1) -> str:
    """Format a figure; empty if it is not a number."""
    return f"{value:.{decimals}f}" if isinstance(value, int | float) and abs(value) < 1e15 else ""


def checkpoint_text(report: Mapping[str, Any]) -> str:
    """Name the checkpoint of a result, with its step where it is known."""
    step = report.get("step")
    return f"{report.get('checkpoint')} @ {step:,}" if isinstance(step, int) else str(report.get("checkpoint"))


def recall_cells(recall: Any, intervals: Any = None) -> list[str]:
    """Return the cells of `RECALL_HEAD`: figures in percent, with their intervals of 95 % where there are any."""
    paths = [(direction, cutoff) for direction in DIRECTION_LABELS for cutoff in CUTOFFS]
    return [_with_interval(get(recall, *path), get(intervals, *path)) for path in [*paths, ("mean_R@1",)]]


def _with_interval(value: Any, interval: Any) -> str:
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        return number(value)
    low, high = map(number, interval)
    return f"{number(value)} [{low}, {high}]"


def stage_name(report: Mapping[str, Any], stage: str) -> str:
    """Name a stage of a result: coarse, or how many candidates were re-ranked."""
    return "coarse" if stage == "coarse" else f"best {get(report, 'reranked', 'k')} re-ranked"


def final_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a result: its stages with their recall."""
    stages = [stage for stage in ("coarse", "reranked") if get(report, stage)]
    return [
        [stage_name(report, stage), *recall_cells(report[stage], get(report, "intervals", stage))] for stage in stages
    ]
