"""Tables of evaluations, as `toolkit/evaluate.py` prints them."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.evaluation.results import DIRECTIONS, Result, describe_protocol, format_results
from toolkit.evaluation.summaries.groups import format_groups


def format_evaluations(results: Sequence[Result], protocols: bool) -> str:
    """Format the results of one command: of one or several data sets, with groups, or protocols side by side."""
    if protocols:
        manifests = dict.fromkeys((result.manifest, result.split) for result in results)
        return "\n\n".join(
            format_protocols([result.report for result in results if (result.manifest, result.split) == each])
            for each in manifests
        )
    parts = [format_results(results)] if len(results) > 1 else [format_report(results[0])]
    for result in results:
        if result.report["groups"]:
            title = f"{result.corpus} {result.split}, {result.stages[-1]}\n" if len(results) > 1 else ""
            parts.append(title + format_groups(result.report["groups"]))
    return "\n\n".join(parts)


def format_report(result: Result) -> str:
    """Format one result as a table, with minimal pairs."""
    report = result.report
    step = "" if result.step is None else f" (step {result.step:,})"
    size = f"{report['pictures']:,} pictures, {report['captions']:,} spoken captions"
    lines = [
        f"{result.corpus} {result.split}, checkpoint {result.checkpoint}{step}: {size}",
        f"{'percent':<18}{'speech to image':>23}{'image to speech':>25}{'mean':>9}{'95 %':>16}",
        f"{'':<18}{'R@1':>7}{'R@5':>8}{'R@10':>8}{'R@1':>9}{'R@5':>8}{'R@10':>8}{'R@1':>9}",
    ]
    reranked = report["reranked"]
    for stage in result.stages:
        recall, (low, high) = report[stage], report["intervals"][stage]["mean_R@1"]
        name = "coarse" if stage == "coarse" else f"best {reranked['k']} re-ranked"
        s2i, i2s = recall["speech_to_image"].values(), recall["image_to_speech"].values()
        widths = zip((*s2i, *i2s, recall["mean_R@1"]), (7, 8, 8, 9, 8, 8, 9), strict=True)
        cells = "".join(f"{value:>{width}.1f}" for value, width in widths)
        lines.append(f"{name:<18}{cells}{f'{low:.1f} to {high:.1f}':>16}")
    if reranked:
        lines.append(f"re-ranking time: {1000 * reranked['seconds_per_query']:.1f} ms per query and rank")
    if pairs := report["twins"]:
        accuracies = {"all": pairs} | {f"  {kind}": accuracy for kind, accuracy in pairs["kinds"].items()}
        lines.append(f"\n{'minimal pairs':<20}{'coarse':>8}{'re-ranked':>11}   accuracy, chance 50.0")
        for kind, accuracy in accuracies.items():
            reranked = "" if accuracy["matching"] is None else f"{accuracy['matching']:.1f}"
            lines.append(f"{kind:<20}{accuracy['coarse']:>8.1f}{reranked:>11}")
    return "\n".join(lines)


def format_protocols(reports: Sequence[Mapping[str, Any]]) -> str:
    """Format evaluations of one split under several protocols and measures side by side."""
    first = reports[0]
    lines = [
        f"{first['corpus']} {first['split']}, checkpoint {first['checkpoint']}; R@k: any hit, as in papers (mteb's "
        "hit_rate_at_k); rec@k: found of all correct (mteb's recall_at_k)",
        f"{'percent':<44}{'speech to image':>26}{'image to speech':>54}",
    ]
    cells = [f"{name:>8}" for name in ("R@1", "R@5", "R@10", "nDCG@10", "R@1", "R@5", "R@10")]
    lines.append(" " * 44 + "".join(cells) + "".join(f"{f'rec@{k}':>8}" for k in (1, 5, 10)) + f"{'nDCG@10':>8}")
    for label, (recall, measures) in _protocol_rows(reports).items():
        by_speech, by_image = (measures[direction] for direction in DIRECTIONS)
        figures = [*recall[DIRECTIONS[0]].values(), by_speech["nDCG@10"], *recall[DIRECTIONS[1]].values()]
        figures += [*(by_image[f"recall_at_{k}"] for k in (1, 5, 10)), by_image["nDCG@10"]]
        lines.append(f"{label:<44}" + "".join(f"{value:>8.1f}" for value in figures))
    return "\n".join(lines)


def _protocol_rows(reports: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Recall and measures of each stage of each protocol; the coarse stage does not depend on the re-ranking."""
    names = {"fitted": "", "sum": " (BLIP)", "matching": " (ALBEF)"}
    rows = {}
    for report in reports:
        for stage, measures in report["measures"].items():
            label = describe_protocol(report["protocol"], stage)
            source = names[report["protocol"]["fuse"]] if stage == "reranked" else ""
            rows[label + source] = report[stage], measures
    return rows
