"""Tables of runs: their states, and the results of a sweep."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.status.state import RunState

_WAYS = ("speech_to_image", "image_to_speech")


def status_table(states: Sequence[RunState]) -> str:
    """Return a row for each run, and below them why runs failed."""
    head = ["run", "job", "state", "step", "left", "restarts", "R@1", "last log", "log"]
    rows = []
    for state in states:
        job = state.recorded.submission.id if state.recorded else ""
        split = "" if state.recall is None else f"{_split(state)} {state.recall:.1f}"
        last_log = "" if state.last_log is None else f"{duration(max(0.0, time.time() - state.last_log))} ago"
        left = "" if state.eta is None else duration(state.eta)
        row = [state.run, job, _state_text(state), _step(state), left, state.restarts, split, last_log, state.log or ""]
        rows.append([str(each) for each in row])
    return "\n".join([_columns([head, *rows]), *_failures(states)])


def status_values(state: RunState) -> dict[str, Any]:
    """Return the state of a run as JSON values."""
    return {
        "run": str(state.run),
        "job": state.recorded.submission.id if state.recorded else None,
        "state": state.state,
        "reason": state.reason,
        "step": state.step,
        "steps": state.steps,
        "seconds_left": state.eta,
        "restarts": state.restarts,
        "split": _split(state) or None,
        "mean_R@1": state.recall,
        "last_log": state.last_log,
        "log": str(state.log) if state.log else None,
        "failure": _failure(state),
    }


def result_table(states: Sequence[RunState], grid: Path) -> str:
    """Return a row for each member of a sweep: coarse recall in both directions, mean with and without re-ranking."""
    head = ["member", "state", "step", "split", "S>I R@1", "R@10", "I>S R@1", "R@10", "mean R@1", "re-ranked"]
    rows = []
    for state in states:
        values = result_values(state, grid)
        figures = [values[f"{way} {k}"] for way in _WAYS for k in ("R@1", "R@10")]
        figures += [values["mean_R@1"], values["reranked mean_R@1"]]
        numbers = ["" if figure is None else f"{figure:.1f}" for figure in figures]
        rows.append([values["member"], _state_text(state), _step(state), values["split"] or "", *numbers])
    ended = [state.state for state in states]
    counts = ", ".join(f"{ended.count(each)} {each}" for each in dict.fromkeys(ended))
    lines = [_columns([head, *rows]), f"{len(states)} members: {counts}; recall in per cent, S speech, I image"]
    if ended.count("done") > 1:
        lines.append(f"mean over seeds, deviation and significance: python toolkit/report.py {grid} --markdown")
    return "\n".join([*lines, *_failures(states)])


def result_values(state: RunState, grid: Path) -> dict[str, Any]:
    """Return one member's row as JSON values."""
    report = state.final or state.dev or {}
    coarse, reranked = report.get("coarse") or {}, report.get("reranked") or {}
    recall = {f"{way} {k}": (coarse.get(way) or {}).get(k) for way in _WAYS for k in ("R@1", "R@5", "R@10")}
    return {
        "member": _name(state.run, grid),
        "state": state.state,
        "reason": state.reason,
        "step": state.step,
        "steps": state.steps,
        "split": _split(state) or None,
        **recall,
        "mean_R@1": coarse.get("mean_R@1"),
        "reranked mean_R@1": reranked.get("mean_R@1"),
        "failure": _failure(state),
    }


def duration(seconds: float) -> str:
    """Format seconds as 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _state_text(state: RunState) -> str:
    """Return the state, and why a run waits or stopped; why it failed is below the table."""
    explained = state.reason and state.state in ("waiting", "stopped")
    return f"{state.state} ({state.reason})" if explained else state.state


def _step(state: RunState) -> str:
    return "" if state.step is None else f"{state.step}/{'?' if state.steps is None else state.steps}"


def _split(state: RunState) -> str:
    return str((state.final or state.dev or {}).get("split") or ("dev" if state.dev else ""))


def _failures(states: Sequence[RunState]) -> list[str]:
    lines = []
    for state in states:
        if state.state not in ("failed", "cancelled"):
            continue
        lines.append(f"\n{state.run} {state.state}: {state.reason or 'reason unknown'}")
        if state.failure and state.failure.user_error:
            lines.append(f"    {state.failure.user_error}")
        elif state.failure:
            lines += [f"    {line}" for line in state.failure.lines]
            lines.append(f"    the complete log is {state.failure.log}")
    return lines


def _failure(state: RunState) -> dict[str, Any] | None:
    if state.failure is None:
        return None
    failure = state.failure
    lines = [failure.user_error] if failure.user_error else failure.lines
    return {"rank": failure.rank, "code": failure.code, "lines": lines, "log": str(failure.log)}


def _name(run: Path, grid: Path) -> str:
    run, grid = run.resolve(), grid.resolve()
    return str(run.relative_to(grid)) if run.is_relative_to(grid) and run != grid else run.name


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Align columns; those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [
        all(not row[place] or row[place][0].isdigit() for row in rows[1:]) and any(row[place] for row in rows[1:])
        for place in range(len(widths))
    ]
    lines = []
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if at_right else cell.ljust(width) for cell, width, at_right in cells))
    return "\n".join(line.rstrip() for line in lines)
