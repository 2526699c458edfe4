"""Check a folder of shards: python toolkit/check_shards.py DIR.

Exit code 0: healthy; 1: a check failed; 2: a mistake on the command line.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main, whole_number
from shards.logs import add_log_level, setup_logging

if TYPE_CHECKING:
    from shards.checking.page import Section
    from shards.manifest import Manifest

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="check_shards.py",
        description="Check a folder of shards: checksums, tar structure, index, decodability, duplicates.",
        epilog="exit code: 0 healthy, 1 a check failed, 2 a mistake on the command line",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder written by make_shards")
    add("--decode", type=_decode, default=200, metavar="N|all", help="samples to decode, evenly spaced (default: 200)")
    add("--jobs", type=whole_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add(
        "--ranks",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="ranks of a training, for the advice on shard sizes (default: 8)",
    )
    add(
        "--workers",
        type=whole_number(1),
        default=4,
        metavar="W",
        help="loader workers a rank, for the same (default: 4)",
    )
    add("--html", type=Path, metavar="FILE", help="write a page with pictures, audio and histograms")
    add("--augment", metavar="NAME|FILE", help="with --html: show the augmentation of this training configuration")
    add("--json", action="store_true", help="print JSON instead of text")
    add_log_level(parser)
    return parser


def _decode(value: str) -> int | None:
    if value == "all":
        return None
    if value.isdecimal():
        return int(value)
    raise argparse.ArgumentTypeError(f"expected a number of samples or all, got {value!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the folder and print the result; exits with 1 if a check fails.

    Raises:
        UserError: A mistake on the command line, or no shards in the folder.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    augmentation = _augmentation(options)

    # Imported here, as --help should not wait for the dependencies.
    from shards.checking.check import check_folder
    from shards.reading.dry_run import advise

    result = check_folder(
        options.folder, options.decode, options.jobs, show_progress=not options.json and sys.stderr.isatty()
    )
    advice = advise(result.manifest, options.ranks, options.workers) if result.manifest else []
    if options.json:
        print(json.dumps({**result.as_json(), "advice": advice}, indent=1))
    else:
        print("\n".join([result.text(), *advice]))
    if options.html:
        from shards.checking.page import write_page

        try:
            write_page(options.html, result, advice, augmentation)
        except UserError as error:
            if result.healthy:
                raise
            logger.error("%s", error)
    if not result.healthy:
        sys.exit(1)


def _augmentation(options: argparse.Namespace) -> "Callable[[Manifest], Section] | None":
    """Return what makes the page's section about the augmentation of a configuration, if requested."""
    if options.augment is None:
        return None
    if options.html is None:
        raise UserError("--augment shows the augmentation on a page: add --html FILE")

    from shards.checking.augmented import Preview
    from toolkit.config.load import load_config

    config = load_config(["--config", options.augment, "--log-level", options.log_level])
    data = config.data
    if not data.augment.enabled:
        raise UserError(f"--augment {options.augment}: every probability of its data.augment is 0")
    return Preview(data.augment, data.train, data.image_size, data.resize, data.max_seconds, config.seed).section


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
