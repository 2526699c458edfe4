"""Write a corpus as shards: python toolkit/make_shards.py CORPUS --root DIR --out DIR."""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.corpora import CORPORA, Corpus, load, module
from shards.corpora.lists import ListFile, noted_lists
from shards.errors import Parser, UserError, run_main
from shards.media.audio import MAX_SECONDS

if TYPE_CHECKING:
    from shards.report import Report
    from shards.worker_pool import Progress
    from shards.writing.writer import Format

_LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal
_NOT_CONTENT = ("out", "jobs", "part", "restart", "dry_run")  # arguments that do not change what the shards hold
_MERGE = "merge"


def build_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand a corpus, each with the common options and its own."""
    parser = Parser(
        prog="make_shards.py",
        description="Write a corpus as shards: tar files of pictures with all their spoken captions. A run that was "
        "stopped goes on from its finished shards if the same command is given again.",
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
    merge = corpora.add_parser(_MERGE, help="finish a folder whose parts were written by runs with --part")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that the parts were written into")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write: new, empty, or unfinished")
    add("--jobs", type=_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--samples-per-shard", type=_number(1), default=500, metavar="N", help="pictures a tar (default: 500)")
    add("--short-side", type=_number(16), default=256, metavar="PX", help="larger pictures are shrunk (default: 256)")
    add("--quality", type=_number(1, 100), default=90, help="of the JPEGs (default: 90)")
    add("--codec", choices=("flac", "wav", "opus"), default="flac", help="of the audio (default: flac)")
    add("--max-seconds", type=_seconds, default=30.0, metavar="S", help="longer audio is bad input (default: 30)")
    add(
        "--skip-bad",
        action="store_true",
        help="drop and report what cannot be read, or comes twice, rather than end the run",
    )
    add(
        "--part",
        type=_part,
        metavar="I/N",
        help="write one of N parts, each by a run of its own, at once if you like; then make_shards.py merge --out DIR",
    )
    add("--restart", action="store_true", help="drop the shards that an earlier run has left in --out, finished or not")
    add("--dry-run", action="store_true", help="show what would be written, and write nothing")


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
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0 and at most {MAX_SECONDS:g}, got {text!r}")
    return seconds


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, as in 2/8, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the corpus's description, write the shards, print the report.

    Raises:
        UserError: a mistake on the command line or in the corpus.
    """
    options = build_parser().parse_args(arguments)
    if options.corpus == _MERGE:
        _merge(options.out)
        return
    if options.part and options.restart:
        raise UserError(f"--restart and --part: remove {options.out} instead, then start all parts")
    content = _content(options)
    if not options.dry_run and _finished(options, content):
        return
    with noted_lists() as lists:
        corpus = load(options.corpus, options)

    # Late, since the writer brings in what --help need not wait for.
    from shards.report import Report
    from shards.writing.writer import Format, going_on, outlook

    form = Format(
        options.samples_per_shard,
        options.short_side,
        options.quality,
        options.codec,
        options.max_seconds,
        options.skip_bad,
    )
    if options.dry_run:
        print(outlook(corpus.items, form))
        if corpus.dropped:
            print("\n".join(Report(dropped=corpus.dropped).losses()))
        return
    try:
        (_write_part if options.part else _write_all)(corpus, lists, form, content, options)
    except (KeyboardInterrupt, SystemExit):
        if kept := going_on(options.out):
            print(f"{options.out}: {kept}", file=sys.stderr)
        raise


def _write_all(
    corpus: Corpus, lists: Sequence[ListFile], form: "Format", content: dict[str, Any], options: argparse.Namespace
) -> None:
    from shards.writing.writer import write_shards

    start = time.monotonic()
    with _progress_bar(len(corpus.items)) as progress:
        report = write_shards(
            corpus.items,
            options.out,
            options.corpus,
            form,
            content,
            options.jobs,
            progress,
            options.restart,
            corpus.dropped,
            lists,
        )
    _print_report(options.out, report, start)


def _write_part(
    corpus: Corpus, lists: Sequence[ListFile], form: "Format", content: dict[str, Any], options: argparse.Namespace
) -> None:
    from shards.writing.folder_lock import Part
    from shards.writing.writer import plan_shards, write_part

    part = Part(*options.part)
    start = time.monotonic()
    work = plan_shards(corpus.items, options.corpus, form, content, part.of, corpus.dropped, lists)
    with _progress_bar(work.pictures(part)) as progress:
        written, kept = write_part(work, options.out, part, options.jobs, progress)
    seconds = time.monotonic() - start
    print(f"{options.out}: part {part}: {written} shards written in {seconds:.0f} s, {kept} kept from an earlier run")
    print(f"after the last part: make_shards.py {_MERGE} --out {options.out}")


def _merge(out: Path) -> None:
    """Finish a folder of parts."""
    from shards.writing.writer import merge_shards

    if os.path.exists(out / "manifest.json"):
        _print_finished(out, "")
        return
    start = time.monotonic()
    _print_report(out, merge_shards(out), start)


def _print_report(out: Path, report: "Report", start: float) -> None:
    print(f"{out}: written in {time.monotonic() - start:.0f} s")
    print(report.text())


def _content(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what the shards hold, as JSON values."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _NOT_CONTENT
    }


def _finished(options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Whether `out` holds these shards already; a `UserError` if it holds others, or if their corpus changed since."""
    from shards.manifest import MANIFEST, load

    out = options.out
    if not os.path.exists(out / MANIFEST):
        return False
    made, content = load(out).arguments, json.loads(json.dumps(content))
    # An argument that is not there is of another version, which did the same as one does now without it.
    names = sorted(made.keys() | content.keys())
    other = [name for name in names if (made.get(name) or None) != (content.get(name) or None)]
    places = [name for name in other if made.get(name) and isinstance(getattr(options, name, None), Path)]
    if other != places:
        raise _other_shards(out, made, content, other)
    if options.restart and not other:
        return False
    changed, unknown = _look_at_corpus(options)
    if other and (options.restart or changed or unknown):
        raise _other_shards(out, made, content, other, changed)
    if changed:
        again = f"remove {out}" if options.part else "make it again with --restart"
        raise UserError(f"{out} is finished, but its corpus changed since: {changed}: give another --out, or {again}")
    how = f"made from the same files, then at {made[other[0]]}" if other else "made with the same arguments"
    _print_finished(out, f", {how}{unknown}")
    return True


def _other_shards(out: Path, made: Any, content: Any, names: Sequence[str], changed: str = "") -> UserError:
    name, more = names[0], f" ({changed})" if changed else ""
    line = f"{out} holds shards made with {name} {made.get(name)}, now {content.get(name)}{more}"
    return UserError(f"{line}: give another --out, or remove the folder")


def _look_at_corpus(options: argparse.Namespace) -> tuple[str, str]:
    """How the corpus differs from what the finished folder was made from, and what of that is not known."""
    from shards.writing.sources import compare, compare_lists, load_sources

    unknown = "whether it changed since is not known"
    try:
        recorded = load_sources(options.out)
    except UserError as error:
        return "", f"; what of their corpus was recorded cannot be read ({error}): {unknown}"
    if recorded is None:
        return "", f"; an earlier version did not record what their corpus was: {unknown}"
    # A file that is missing now is no reason not to look at the others.
    lenient = argparse.Namespace(**{**vars(options), "skip_bad": True})
    with noted_lists() as lists:
        try:
            items = load(options.corpus, lenient).items
        except UserError as error:
            changed = compare_lists(recorded.lists, lists, complete=False)
            return "; ".join(changed), f"; their corpus could not be looked at ({error}): {unknown}"
    differences = compare(recorded, lists, items)
    if not differences.gone:
        return str(differences), ""
    gone = f"{differences.gone:,} of the {len(recorded.bytes):,} files of their corpus are gone"
    return str(differences), f"; {gone} ({differences.gone_one}): whether these changed since is not known"


def _print_finished(out: Path, how: str) -> None:
    from shards.report import load_report
    from shards.writing.folder_lock import tidy

    tidy(out)
    print(f"{out}: finished already{how}")
    print(load_report(out).text())


@contextmanager
def _progress_bar(total: int) -> Iterator["Progress"]:
    """A bar in a terminal, else a line now and then, both with the time left."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=" pictures", dynamic_ncols=True) as bar:
            yield bar.update
        return
    last = time.monotonic()
    sum_done = last_done = 0

    def progress(done: int) -> None:
        """Count, and print a line if the last one is old."""
        nonlocal last, last_done, sum_done
        sum_done += done
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            # By the pace since the last line: shards kept from an earlier run were done in no time.
            left = (now - last) * (total - sum_done) / (sum_done - last_done)
            last, last_done = now, sum_done
            print(f"{sum_done:,} of {total:,} pictures, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)

    yield progress


def _end_in_order(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


def cli() -> None:
    """Entry point of the console command: print a `UserError` as one line, and exit with its code."""
    # SIGTERM, a scheduler's way to stop a job, is to leave nothing half-written, as Ctrl-C does.
    signal.signal(signal.SIGTERM, _end_in_order)
    # Each process resamples on one core; read before torch is imported, here and in the processes started from here.
    os.environ["OMP_NUM_THREADS"] = "1"
    run_main(main)


if __name__ == "__main__":
    cli()
