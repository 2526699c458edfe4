"""The report of a run: curves, figures and retrieved examples in one HTML file without scripts or links.

It is made from `log.jsonl` and the newest file of examples that the log names.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shards.files import atomic_write, read_records

NAME = "report.html"
_POINTS = 400  # of a curve, at most
_EXAMPLES = re.compile(r"examples-\d{8}\.json")  # the only files that a log can have read
_MAX_EXAMPLES = 2 << 20  # bytes
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")  # the only source that a picture can have
_SIZE = (420, 150)  # of a chart

# Title, and the keys of the curves in it with their names.
_CHARTS = (
    ("Loss", {"loss": "sum"}),
    (
        "Objectives",
        {
            "contrastive": "SIC",
            "matching": "SIM",
            "matching_control": "SIM with another pair's tokens",
            "denoising": "CMD",
            "denoising_control": "CMD with another pair's tokens",
        },
    ),
    (
        "SIM: share of pairs classified correctly",
        {"matching_accuracy": "right tokens", "matching_control_accuracy": "another pair's tokens"},
    ),
    ("Temperature", {"temperature": "temperature"}),
    (
        "Recall on dev, %",
        {
            "dev/coarse/speech_to_image/R@1": "speech to image R@1",
            "dev/coarse/image_to_speech/R@1": "image to speech R@1",
            "dev/coarse/mean_R@10": "mean R@10",
            "dev/reranked/mean_R@1": "mean R@1 re-ranked",
        },
    ),
    ("Learning rate", {"lr": "learning rate"}),
    ("Pairs a second", {"pairs_per_second": "pairs a second"}),
    ("Model TFLOP/s a rank", {"tflops": "TFLOP/s"}),
    ("Waiting for data, share of the time", {"waiting": "waiting"}),
    ("Memory, GB", {"memory_gb": "largest rank"}),
    ("Skipped steps", {"skipped": "skipped so far"}),
)

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%s</title>
<style>
:root { --text: #1d2329; --soft: #616b75; --line: #dfe3e7; --back: #f5f6f8; --card: #fff;
  --c0: #2f6f9f; --c1: #b3352c; --c2: #2c7a4b; --c3: #8a6100 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7eb; --soft: #98a3ad; --line: #343c44; --back: #14181c;
  --card: #1c2228; --c0: #6fb0dd; --c1: #ee8378; --c2: #6bbf8a; --c3: #dcb25a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.5rem 0 .8rem }
h3 { font-size: .9rem; margin: 0 0 .3rem } p { margin: .3rem 0 } .soft { color: var(--soft) }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 500 }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%%), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem .9rem }
.name { display: inline-block; margin-right: .9rem; font-size: .85rem }
.answers { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 0 }
figure { margin: 0; text-align: center; font-size: .75rem; color: var(--soft) }
figure img { display: block; width: 96px; height: 96px; border: 3px solid transparent; border-radius: .3rem }
.right { color: var(--c2) } .right img { border-color: var(--c2) }
svg { display: block; width: 100%%; height: auto; overflow: visible }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round } line { stroke: var(--line) }
</style></head><body>
"""


def write_report(run: Path) -> None:
    """Write `report.html` of a run folder, atomically.

    Raises:
        OSError: It cannot be written.
    """
    records = list(read_records(run / "log.jsonl"))
    curves = _curves(records)
    page = [_HEAD % escape(f"Run {run.name}"), f"<h1>{escape(run.name)}</h1>", *_summary(records)]
    charts = [_chart(title, {names[key]: curves[key] for key in names if key in curves}) for title, names in _CHARTS]
    page += ["<h2>Curves over steps</h2>", f'<div class="grid">{"".join(charts)}</div>', *_table(curves)]
    page += _examples(run, records)
    with atomic_write(run / NAME) as file:
        file.write(("\n".join(page) + "\n</body></html>\n").encode(errors="backslashreplace"))


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten the numbers of a record; nested ones are named `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Collect values by key and step. Of steps that were repeated after a restart, the last values count."""
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            for key, value in flat(record).items():
                if math.isfinite(value):
                    curves.setdefault(key, {})[record["step"]] = value
    return {key: dict(sorted(curve.items())) for key, curve in curves.items()}


def _summary(records: Sequence[dict[str, Any]]) -> list[str]:
    steps = [r for r in records if "seconds" in r and "step" in r]
    if not steps:
        return ['<p class="soft">no steps yet</p>']
    last = steps[-1]
    parts = [f"step {last['step']}", f"{float(last['seconds']) / 3600:.2f} hours of training"]
    parts += [f"{last[key]} {words}" for key, words in (("skipped", "steps skipped"),) if last.get(key)]
    restarts = sum(r.get("event") == "began" for r in records) - 1
    if restarts > 0:
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    unreadable = sum(r.get("bad_samples", r.get("faults", 0)) for r in steps)
    if unreadable:
        parts.append(f"{unreadable} unreadable samples replaced")
    stops = [r for r in records if str(r.get("event", "")).startswith("stopped")]
    lines = [f"<li>{escape(str(r['event']))} after step {escape(str(r.get('at')))}</li>" for r in stops]
    return [f"<p>{escape(', '.join(parts))}</p>", *(["<ul>", *lines, "</ul>"] if lines else [])]


def _chart(title: str, curves: dict[str, dict[int, float]]) -> str:
    """A card with curves on one scale; empty if there are none."""
    if not curves:
        return ""
    width, height = _SIZE
    points = [point for curve in curves.values() for point in curve.items()]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = width / max(1, right - left), height / ((high - low) or 1.0)
    drawn, names = [], []
    for number, (name, curve) in enumerate(curves.items()):
        every = -(-len(curve) // _POINTS)
        kept = [*list(curve.items())[:-1:every], list(curve.items())[-1]]
        path = " ".join(f"{(x - left) * across:.1f},{height - (y - low) * up:.1f}" for x, y in kept)
        ink = f"var(--c{number % 4})"
        dot_x, dot_y = path.rpartition(" ")[2].split(",")
        drawn.append(f'<polyline points="{path}" style="stroke: {ink}"/>')
        drawn.append(f'<circle cx="{dot_x}" cy="{dot_y}" r="2.5" style="fill: {ink}"/>')
        names.append(f'<span class="name" style="color: {ink}">{escape(name)} {kept[-1][1]:.4g}</span>')
    frame = f'<line x1="0" y1="{height}" x2="{width}" y2="{height}"/><line x1="0" y1="0" x2="{width}" y2="0"/>'
    marks = (
        f'<text x="0" y="-4">{high:.4g}</text><text x="0" y="{height - 4}">{low:.4g}</text>'
        f'<text x="0" y="{height + 14}">{left}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{right}</text>'
    )
    picture = f'<svg viewBox="0 -16 {width} {height + 34}" role="img">{frame}{"".join(drawn)}{marks}</svg>'
    return f'<div class="card"><h3>{escape(title)}</h3>{picture}{"".join(names)}</div>'


def _table(curves: dict[str, dict[int, float]]) -> list[str]:
    """Recall on dev by evaluation."""
    ways = [f"dev/{stage}/{way}" for stage in ("coarse", "reranked") for way in ("speech_to_image", "image_to_speech")]
    columns = [f"{way}/R@{k}" for way in ways for k in (1, 5, 10) if f"{way}/R@{k}" in curves]
    steps = sorted({step for column in columns for step in curves[column]})
    if not steps:
        return []
    head = "".join(
        f"<th>{escape(column.removeprefix('dev/').replace('_', ' ').replace('/', ' '))}" for column in columns
    )
    rows = [
        f"<tr><td>{step}" + "".join(f"<td>{curves[c][step]:.1f}" if step in curves[c] else "<td>" for c in columns)
        for step in steps
    ]
    return [
        "<h2>Recall on dev, %</h2>",
        f"<table><tr><th>step{head}</tr>",
        *(f"{row}</tr>" for row in rows),
        "</table>",
    ]


def _examples(run: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """Examples of the last evaluation whose file exists."""
    for record in reversed(records):
        name = record.get("examples")
        if isinstance(name, str) and _EXAMPLES.fullmatch(name):
            found = _read_examples(run / name)
            if found:
                cards = "".join(_query(query) for query in found["queries"] if isinstance(query, dict))
                how = "re-ranked" if found.get("reranked") else "by the global embeddings"
                note = (
                    f"Step {record.get('step')}, {found.get('split')}, {how}: spoken queries drawn once by the run's "
                    "seed, whatever is found for them, and the pictures found, best first. Framed: the right one."
                )
                return ["<h2>Retrieved</h2>", f'<p class="soft">{escape(note)}</p><div class="grid">{cards}</div>']
    return []


def _read_examples(path: Path) -> dict[str, Any] | None:
    """Read a file of examples; None: it is missing, too large or not valid."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_EXAMPLES))  # a truncated file is not valid JSON
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("queries"), list) else None


def _query(query: dict[str, Any]) -> str:
    """A card: the caption, the rank of the right picture, and the retrieved pictures."""
    answers = query.get("answers")
    figures = [
        _figure(number, answer)
        for number, answer in enumerate(answers if isinstance(answers, list) else [], start=1)
        if isinstance(answer, dict) and _PICTURE.fullmatch(str(answer.get("picture")))
    ]
    return (
        f'<div class="card"><h3>\u201c{escape(str(query.get("text")))}\u201d</h3>'
        f'<p class="soft">right picture: number {escape(str(query.get("rank")))}</p>'
        f'<div class="answers">{"".join(figures)}</div></div>'
    )


def _figure(number: int, answer: dict[str, Any]) -> str:
    right = bool(answer.get("right"))
    caption = f"{number}, right" if right else f"{number}"
    image = f'<img src="{answer["picture"]}" alt="picture found as number {caption}">'
    return f"<figure{' class=right' if right else ''}>{image}{caption}</figure>"
