"""Show stored results: tables of runs, and comparisons of two of them."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.logs import setup_logging
from toolkit.config.load import SAVED
from toolkit.evaluation.results import format_results, load_results

if TYPE_CHECKING:
    import argparse


def show_stored(options: "argparse.Namespace", rest: list[str]) -> None:
    """Print a table of stored results, or the comparison of two runs.

    Raises:
        UserError: There are none, they do not belong together, or other options were given.
    """
    setup_logging(options.log_level)
    given = [name for name in ("config", "split", "rerank", "checkpoint", "datasets", "model", "out", "by")
             if getattr(options, name) is not None]  # fmt: skip
    wrong = [*rest, *(f"--{name}" for name in given), *(["--protocols"] if options.protocols else [])]
    if wrong or (options.results and options.compare):
        raise UserError(f"--results and --compare show stored results and take no other option ({wrong or 'each'})")
    results = [load_results(run) for run in options.results or options.compare]
    for run, each in zip(options.results or options.compare, results, strict=True):
        if not each and not (run / SAVED).is_file():
            raise UserError(f"{run} is neither a run folder (no {SAVED}) nor a folder of results")
        if not each:
            raise UserError(f"{run} holds no results: evaluate it first (python toolkit/evaluate.py --run {run})")
    if options.results:
        every = [result for each in results for result in each]
        print(json.dumps([one.report for one in every], indent=1) if options.json else format_results(every))
        return
    from toolkit.evaluation.summaries.significance import compare_results, format_comparison, matching_results

    given_files = all(path.is_file() for path in options.compare)
    pairs = [(results[0][0], results[1][0])] if given_files else matching_results(*results)
    compared = [(*pair, compare_results(*pair)) for pair in pairs]
    if options.json:
        lists: list[dict[str, Any]] = [
            {"first": str(one.path), "second": str(other.path), "differences": [asdict(each) for each in differences]}
            for one, other, differences in compared
        ]
        print(json.dumps(lists, indent=1))
    else:
        print("\n\n".join(format_comparison(*each) for each in compared))
