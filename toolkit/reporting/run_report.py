"""The report of a run: final result, curves, figures and retrieved examples in one HTML file without scripts or links.

It is made from `log.jsonl`, `recall.json` and the newest file of examples, while the run trains and once it is
evaluated.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.files import read_object
from shards.html.chart import line_chart
from shards.html.render import write_html
from toolkit.reporting.curves import CHARTS, Curve, curves_of, read_log
from toolkit.reporting.examples import read_examples
from toolkit.reporting.figures import RECALL_HEAD, final_rows, get, number
from toolkit.run_folder import RECALL

NAME = "report.html"


def write_report(run: Path) -> None:
    """Write `report.html` of a run folder, atomically.

    Raises:
        OSError: It cannot be written.
    """
    records = read_log(run)
    curves = curves_of(records)
    charts = [line_chart(title, {names[key]: curves[key] for key in names if key in curves}) for title, names in CHARTS]
    summary, stops = _summary(records)
    write_html(
        run / NAME,
        Path(__file__).with_name("run_report.html"),
        title=f"Run {run.name}",
        name=run.name,
        summary=summary,
        stops=stops,
        final=_final(read_object(run / RECALL)),
        charts=[chart for chart in charts if chart],
        dev=_dev_table(curves),
        examples=read_examples(run, records),
    )


def _summary(records: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return a line about the training, and a line for each time it was stopped."""
    steps = [r for r in records if "seconds" in r and "step" in r]
    if not steps:
        return "no steps yet", []
    last = steps[-1]
    parts = [f"step {last['step']}", f"{float(last['seconds']) / 3600:.2f} hours of training"]
    if last.get("skipped"):
        parts.append(f"{last['skipped']} steps skipped")
    restarts = sum(r.get("event") == "began" for r in records) - 1
    if restarts > 0:
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    unreadable = sum(r.get("bad_samples", r.get("faults", 0)) for r in steps)
    if unreadable:
        parts.append(f"{unreadable} unreadable samples replaced")
    stops = [r for r in records if str(r.get("event", "")).startswith("stopped")]
    return ", ".join(parts), [f"{r['event']} after step {r.get('at')}" for r in stops]


def _final(report: Mapping[str, Any]) -> dict[str, Any] | None:
    if not final_rows(report):
        return None
    size = f"{number(report.get('pictures'), 0)} images, {number(report.get('captions'), 0)} spoken captions"
    note = f"{report.get('split')}: {size}; checkpoint {report.get('checkpoint')}, step {report.get('step')}"
    intervals = "; in brackets: intervals of 95 %" if get(report, "intervals") else ""
    return {"note": f"{note}{intervals}", "head": ["", *RECALL_HEAD], "rows": final_rows(report)}


def _dev_table(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Recall on dev by evaluation."""
    ways = [f"dev/{stage}/{way}" for stage in ("coarse", "reranked") for way in ("speech_to_image", "image_to_speech")]
    columns = [f"{way}/R@{k}" for way in ways for k in (1, 5, 10) if f"{way}/R@{k}" in curves]
    steps = sorted({step for column in columns for step in curves[column]})
    names = [column.removeprefix("dev/").replace("_", " ").replace("/", " ") for column in columns]
    rows = [[str(step), *(number(curves[column].get(step)) for column in columns)] for step in steps]
    return {"head": ["step", *names], "rows": rows}
