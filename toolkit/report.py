"""Report of one or several runs as one HTML file: `python toolkit/report.py RUN [RUN ...] [--out FILE.html]`.

RUN is a run folder, or a folder of runs such as that of a grid. The page holds the results beside published ones where
the test data are the same, configurations compared over seeds, training curves, the differences between configurations,
robustness, recall by group, what analyze.py inside found, and retrieved examples that can be played. It loads nothing
from the network.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main
from shards.logs import add_log_level, setup_logging

logger = logging.getLogger(__name__)

NAME = "results.html"  # in the first folder; report.html is the run's own, which training replaces


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of runs such as a grid's")
    add("--out", type=Path, metavar="FILE", help=f"the page (default: {NAME} in the first RUN)")
    add("--baseline", metavar="NAME", help="configuration that the others are compared with (default: the first)")
    add("--markdown", action="store_true", help="print the configurations compared over seeds as Markdown; no page")
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or print the comparison over seeds.

    Raises:
        UserError: A folder has no runs, a result cannot be read, or the page cannot be written.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    from toolkit.reporting.ablation import ablations
    from toolkit.reporting.runs import group_runs, load_runs

    configurations = group_runs(load_runs(options.runs))
    tables = ablations(configurations, options.baseline)
    if options.markdown:
        if not tables:
            raise UserError(f"{options.runs[0]}: no run was evaluated yet: python toolkit/evaluate.py --run RUN")
        print("\n\n".join(table.markdown() for table in tables))
    if options.out or not options.markdown:
        from toolkit.reporting.comparison import write_comparison

        out = options.out or options.runs[0] / NAME
        write_comparison(out, configurations, tables)
        logger.info("report: %s", out)


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
