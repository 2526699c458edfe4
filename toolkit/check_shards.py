"""Examine a folder of shards: python toolkit/check_shards.py DIR.

Exit code 0: healthy; 1: not healthy; 2: a mistake on the command line.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main

if TYPE_CHECKING:
    from shards.worker_pool import Progress


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="check_shards.py",
        description="Examine a folder of shards: checksums, tar structure, index, decodability, duplicates.",
        epilog="exit code: 0 healthy, 1 not healthy, 2 a mistake on the command line",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="what make_shards wrote")
    add("--decode", type=_decode, default=200, metavar="N|all", help="samples to decode, spread out (default: 200)")
    add("--jobs", type=_number, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--ranks", type=_number, default=8, metavar="N", help="advise for so many ranks (default: 8)")
    add("--workers", type=_number, default=4, metavar="W", help="and so many loader workers each (default: 4)")
    add("--html", type=Path, metavar="FILE", help="write a page with pictures, recordings and histograms")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def _number(value: str) -> int:
    if value.isdecimal() and 1 <= int(value) <= 10**6:
        return int(value)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {value!r}")


def _decode(value: str) -> int | None:
    if value == "all":
        return None
    if value.isdecimal():
        return int(value)
    raise argparse.ArgumentTypeError(f"expected a number of samples or all, got {value!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine the folder and print what was found; the process ends with exit code 1 if it is not healthy.

    Raises:
        UserError: a mistake on the command line, or no shards there.
    """
    options = build_parser().parse_args(arguments)

    # Late, since the doctor brings in what --help need not wait for.
    from shards.checking.check import check_folder
    from shards.reading.dry_run import advise

    with _progress_bar(options) as progress:
        health = check_folder(options.folder, options.decode, options.jobs, progress)
    advice = advise(health.manifest, options.ranks, options.workers) if health.manifest else []
    if options.json:
        print(json.dumps({**health.as_json(), "advice": advice}, indent=1))
    else:
        print("\n".join([health.text(), *advice]))
    if options.html:
        from shards.checking.page import write_page

        try:
            write_page(options.html, health, advice)
        except UserError as error:
            if health.healthy:
                raise
            print(f"error: {error}", file=sys.stderr)
    if not health.healthy:
        sys.exit(1)


@contextmanager
def _progress_bar(options: Any) -> Iterator["Progress"]:
    """A bar in a terminal, else nothing."""
    if options.json or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(unit=" samples", dynamic_ncols=True, leave=False) as bar:
        yield bar.update


def cli() -> None:
    """Entry point of the console command: print a `UserError` as one line, and exit with its code."""
    run_main(main)


if __name__ == "__main__":
    cli()
