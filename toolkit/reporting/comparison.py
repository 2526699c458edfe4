"""One page about one or several runs: results, ablation, curves, configurations, robustness, groups, examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shards.errors import UserError
from shards.html.chart import line_chart
from shards.html.render import data_url, write_html
from toolkit.evaluation.results import Result, describe_protocol
from toolkit.reporting.ablation import GAIN_COLUMNS, RECALL_COLUMNS, Ablation
from toolkit.reporting.curves import CHARTS, curves_of
from toolkit.reporting.examples import read_examples
from toolkit.reporting.figures import RECALL_HEAD, checkpoint_text, get, number, recall_cells, stage_name
from toolkit.reporting.groups import groups_section
from toolkit.reporting.inside import inside_section
from toolkit.reporting.published import Published, published_results
from toolkit.reporting.robustness import robustness_section
from toolkit.reporting.runs import Configuration, Run, RunEvaluation, differences

_MAX_RUNS = 4  # runs of which examples are shown
_MAX_PICTURE = 2 << 20  # bytes
BASELINE_HEAD = ["run", "text", "text-image model", "word errors, %", *RECALL_HEAD]
_CONTENTS = {
    "results": "Results",
    "ablation": "Configurations over seeds",
    "curves": "Curves",
    "configurations": "Differences",
    "robustness": "Robustness",
    "groups": "Groups",
    "inside": "Inside",
    "retrieved": "Retrieved",
}
# Title and key of the charts in which several runs are shown over one another.
_COMPARED = (
    ("Loss", "loss"),
    ("SIC", "contrastive"),
    ("SIM", "matching"),
    ("CMD", "denoising"),
    ("Speech to image R@1 on dev, %", "dev/coarse/speech_to_image/R@1"),
    ("Image to speech R@1 on dev, %", "dev/coarse/image_to_speech/R@1"),
    ("Mean R@1 on dev, re-ranked, %", "dev/reranked/mean_R@1"),
    ("Temperature", "temperature"),
    ("Learning rate", "lr"),
    ("Pairs a second", "pairs_per_second"),
    ("Memory, GB", "memory_gb"),
)


def write_comparison(path: Path, configurations: Sequence[Configuration], ablations: Sequence[Ablation]) -> None:
    """Write the page atomically.

    Args:
        path: The file to write.
        configurations: The runs by configuration.
        ablations: The configurations compared over seeds.

    Raises:
        UserError: The page cannot be written, or a result of a run cannot be read.
    """
    runs = [run for each in configurations for run in each.runs]
    head, rows = differences(configurations)
    try:
        write_html(
            path,
            Path(__file__).with_name("comparison.html"),
            title=f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs",
            contents=list(_CONTENTS.items()),
            runs=[_run_row(run, each) for each in configurations for run in each.runs],
            results=_results(runs),
            ablation=_ablation(configurations, ablations),
            curves=_curves(configurations),
            differences={"head": head, "rows": rows},
            robustness=robustness_section(runs),
            groups=groups_section(runs),
            inside=inside_section(runs),
            retrieved=_retrieved(configurations),
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _run_row(run: Run, configuration: Configuration) -> list[str]:
    steps = [record for record in run.records if isinstance(record.get("step"), int) and "seconds" in record]
    seconds = steps[-1]["seconds"] if steps else None
    hours = number(seconds / 3600, 2) if isinstance(seconds, int | float) else ""
    report = run.final.report if run.final else {}
    mean = number(get(report, "reranked", "mean_R@1") or get(report, "coarse", "mean_R@1"))
    step = f"{steps[-1]['step']:,}" if steps else ""
    return [run.name, configuration.name, str(run.config.seed), step, hours, mean or "not evaluated"]


def _results(runs: Sequence[Run]) -> dict[str, Any]:
    """Tables of all evaluations, one for each test set, with the published results on it, and tables of baselines."""
    by_data: dict[str, list[tuple[Run, RunEvaluation]]] = {}
    baselines: dict[str, list[list[str]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            by_data.setdefault(evaluation.data, []).append((run, evaluation))
        for data, result in run.baselines:
            baselines.setdefault(data, []).append(_baseline_row(run, result))
    notes = []
    if len({**by_data, **baselines}) > 1:
        notes.append("These tables are of different test data: figures of one do not compare with those of another.")
    without = [run for run in runs if not any(one.result for one in run.evaluations)]
    if without:
        names = ", ".join(run.name for run in without)
        command = f"python toolkit/evaluate.py --run {without[0].folder}"
        notes.append(f"Without stored results, and so without intervals and tests: {names}. Made by: {command}")
    groups = [
        {**_results_table(data, by_data.get(data, [])), "baselines": baselines.get(data, [])}
        for data in {**by_data, **baselines}
    ]
    head = ["run", "checkpoint", "ranking", *RECALL_HEAD]
    return {"head": head, "baseline_head": BASELINE_HEAD, "groups": groups, "notes": notes}


def _baseline_row(run: Run, result: Result) -> list[str]:
    baseline, folder = result.report["baseline"], str(get(result.report, "baseline", "clip"))
    text, rate = get(baseline, "text"), number(get(baseline, "word_error_rate"))
    cells = recall_cells(result.report["coarse"], get(result.report, "intervals", "coarse"))
    return [run.name, str(text), Path(folder).name, rate, *cells]


def _results_table(data: str, found: Sequence[tuple[Run, RunEvaluation]]) -> dict[str, Any]:
    rows = []
    for run, evaluation in found:
        report, result = evaluation.report, evaluation.result
        for stage in [stage for stage in ("coarse", "reranked") if get(report, stage)]:
            ranking = describe_protocol(result.protocol, stage) if result else stage_name(report, stage)
            cells = recall_cells(report[stage], get(report, "intervals", stage))
            rows.append([run.name, checkpoint_text(report), ranking, *cells])
    measured = len(rows)
    first = found[0][1] if found else None
    notes: list[str] = []
    if first and first.result:
        published = published_results(first.result.corpus, first.result.split, first.report.get("pictures"))
        rows += [[one.name, "published", "", *recall_cells(one.recall)] for one in published]
        notes = [f"Published, not measured here ({source})." for source in dict.fromkeys(map(_source, published))]
    return {"data": data, "rows": rows, "published": range(measured, len(rows)), "notes": notes}


def _source(one: Published) -> str:
    return f"{one.source}: {one.protocol}"


def _ablation(configurations: Sequence[Configuration], ablations: Sequence[Ablation]) -> dict[str, Any]:
    notes = []
    if len(configurations) == 1 and len(configurations[0].runs) == 1:
        command = "python launch/submit.py --config NAME --run FOLDER --grid slurm/grids/ablation.yaml"
        notes.append(f"One run: the ablation over seeds is made by {command}, then python toolkit/report.py FOLDER")
        ablations = []
    if len(ablations) > 1:
        notes.append("These tables are of different test data: figures of one do not compare with those of another.")
    tables = [
        {"data": one.data, "recall": one.recall, "gains": [gain.cells() for gain in one.gains], "notes": one.notes}
        for one in ablations
    ]
    return {"tables": tables, "notes": notes, "recall_columns": RECALL_COLUMNS, "gain_columns": GAIN_COLUMNS}


def _curves(configurations: Sequence[Configuration]) -> dict[str, Any]:
    """Charts of one run, or of several over one another, with one color for each configuration."""
    configuration_of = {run.name: each.name for each in configurations for run in each.runs}
    curves = {run.name: curves_of(run.records) for each in configurations for run in each.runs}
    charts: list[Markup] = []
    if len(curves) == 1:
        (own,) = curves.values()
        charts = [line_chart(title, {names[key]: own[key] for key in names if key in own}) for title, names in CHARTS]
    else:
        colors = configuration_of if len(configuration_of) > len(configurations) else None
        for title, key in _COMPARED:
            charts.append(
                line_chart(title, {name: one[key] for name, one in curves.items() if key in one}, groups=colors)
            )
    missing = [name for name, own in curves.items() if not own]
    notes = [f"Without a log of training: {', '.join(missing)}."] if missing else []
    return {"charts": [chart for chart in charts if chart], "notes": notes}


def _retrieved(configurations: Sequence[Configuration]) -> dict[str, Any]:
    """Examples of the first run of each configuration that has any."""
    shown: list[Mapping[str, Any]] = []
    notes = []
    for configuration in configurations:
        for run in configuration.runs:
            examples, picture = read_examples(run.folder, run.records), _picture(run.folder / "retrieved.png")
            if (examples or picture) and len(shown) < _MAX_RUNS:
                shown.append({"name": run.name, "examples": examples, "picture": picture})
                break
    if len(configurations) > _MAX_RUNS:
        notes.append(f"Of the first {_MAX_RUNS} configurations.")
    silent = [
        one for one in shown if one["examples"] and not any(query["audio"] for query in one["examples"]["queries"])
    ]
    if silent or not shown:
        folder = configurations[0].runs[0].folder
        notes.append(
            f"Examples of the final evaluation, with sound, are written by python toolkit/evaluate.py --run {folder}"
        )
    return {"runs": shown, "notes": notes}


def _picture(path: Path) -> str | None:
    """Read a PNG as a data URL; None: it is missing, too large, or another file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PICTURE + 1)
    except OSError:
        return None
    return data_url("image/png", data) if data.startswith(b"\x89PNG") and len(data) <= _MAX_PICTURE else None
