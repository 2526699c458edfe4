"""Write a corpus as shards: python toolkit/make_shards.py CORPUS --root DIR --out DIR."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.corpora import CORPORA, module
from shards.errors import UserError, run_main

if TYPE_CHECKING:
    from shards.pool import Progress

_LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal
_NOT_CONTENT = ("out", "jobs")  # arguments that do not change what the shards hold


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand a corpus, each with the common options and its own."""
    parser = _Parser(
        prog="make_shards.py",
        description="Write a corpus as shards: tar files of pictures with all their spoken captions.",
        epilog="make_shards.py CORPUS --help shows a corpus's layout on disk and its options.",
    )
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    for name, line in CORPORA.items():
        one = corpora.add_parser(
            name,
            help=line,
            description=module(name).__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(one)
        module(name).add_arguments(one)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add("--jobs", type=_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--samples-per-shard", type=_number(1), default=500, metavar="N", help="pictures a tar (default: 500)")
    add("--short-side", type=_number(16), default=256, metavar="PX", help="larger pictures are shrunk (default: 256)")
    add("--quality", type=_number(1, 100), default=90, help="of the JPEGs (default: 90)")
    add("--codec", choices=("flac", "wav", "opus"), default="flac", help="of the audio (default: flac)")
    add("--max-seconds", type=_seconds, default=30.0, metavar="S", help="longer audio is bad input (default: 30)")
    add("--skip-bad", action="store_true", help="drop and report what cannot be read, rather than end the run")


def _number(low: int, high: int = 10**9) -> Any:
    def number(text: str) -> int:
        if text.isdecimal() and low <= int(text) <= high:
            return int(text)
        bounds = f"from {low} to {high}" if high < 10**9 else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0 and at most 3600, got {text!r}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the corpus's description, write the shards, print the report.

    Raises:
        UserError: a mistake on the command line or in the corpus.
    """
    options = build_parser().parse_args(arguments)
    content = _content(options)
    if _finished(options.out, content):
        return
    items = module(options.corpus).read(options)

    # Late, since the writer brings in what --help need not wait for.
    from shards.write import Format, write_shards

    form = Format(
        options.samples_per_shard,
        options.short_side,
        options.quality,
        options.codec,
        options.max_seconds,
        options.skip_bad,
    )
    start = time.monotonic()
    with _progress_bar(len(items)) as progress:
        report = write_shards(items, options.out, options.corpus, form, content, options.jobs, progress)
    print(f"{options.out}: written in {time.monotonic() - start:.0f} s")
    print(report.text())


def _content(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what the shards hold, as JSON values."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _NOT_CONTENT
    }


def _finished(out: Path, content: dict[str, Any]) -> bool:
    """Whether `out` holds these shards already; a `UserError` if it holds others."""
    from shards.manifest import MANIFEST, load
    from shards.report import load_report

    if not (out / MANIFEST).exists():
        return False
    made = load(out)
    if made.arguments != json.loads(json.dumps(content)):
        names = sorted(made.arguments.keys() | content.keys())
        name = next(one for one in names if made.arguments.get(one) != content.get(one))
        raise UserError(
            f"{out} holds shards made with {name} {made.arguments.get(name)}, now {content.get(name)}: "
            "give another --out, or remove the folder"
        )
    print(f"{out}: finished already, made with the same arguments")
    print(load_report(out).text())
    return True


@contextmanager
def _progress_bar(total: int) -> Iterator["Progress"]:
    """A bar in a terminal, else a line now and then, both with the time left."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=" pictures", dynamic_ncols=True) as bar:
            yield bar.update
        return
    start = last = time.monotonic()
    sum_done = 0

    def progress(done: int) -> None:
        nonlocal last, sum_done
        sum_done += done
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            left = (now - start) * (total - sum_done) / sum_done
            print(f"{sum_done:,} of {total:,} pictures, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)

    yield progress


def _end_in_order(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    # SIGTERM, a scheduler's way to stop a job, is to leave nothing half-written, as Ctrl-C does.
    signal.signal(signal.SIGTERM, _end_in_order)
    # Each process resamples on one core; read before torch is imported, here and in the processes started from here.
    os.environ["OMP_NUM_THREADS"] = "1"
    run_main(main)
