"""What was found inside the models: distributions of similarities and ranks, and denoising."""

from collections.abc import Sequence
from typing import Any

from shards.errors import UserError
from toolkit.evaluation.inside.page import PAGE, denoising_charts, distribution_charts
from toolkit.evaluation.inside.result import FILE, Inside, describe_gap, load_inside
from toolkit.reporting.runs import Run

_SHOWN = 4  # results with their charts


def inside_section(runs: Sequence[Run]) -> dict[str, Any]:
    """Return charts of each result of `analyze.py inside`; attention and hardest queries are on its own page.

    Raises:
        UserError: A result cannot be read.
    """
    found = [(run, result) for run in runs for result in load_inside(run.folder)]
    notes = [] if found else [f"Not measured. Made by: python toolkit/analyze.py inside --run {runs[0].folder}"]
    if len(found) > _SHOWN:
        notes.append(f"The first {_SHOWN} of {len(found)} results.")
    return {"results": [_show(run, result) for run, result in found[:_SHOWN]], "notes": notes}


def _show(run: Run, result: Inside) -> dict[str, Any]:
    try:
        notes = [f"{describe_gap(result)}.", f"Attention and hardest queries: {result.folder / PAGE}"]
        if "reason" in result.denoising:
            notes.append(f"Denoising was not measured: {result.denoising['reason']}")
        data = f"{result.corpus} {result.split}, shards {result.manifest[:8]}: {result.pictures:,} images"
        charts = [chart for chart in (*distribution_charts(result), *denoising_charts(result)) if chart]
        return {"name": f"{run.name} {result.checkpoint}, {data}", "notes": notes, "charts": charts}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{result.folder / FILE} is damaged ({error}): repeat analyze.py inside") from None
