"""Write a corpus as shards: python toolkit/make_shards.py CORPUS --root DIR --out DIR."""

import argparse
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.corpora import CORPORA, Corpus, load, module
from shards.corpora.text_files import ListFile, noted_lists
from shards.errors import Parser, UserError, run_main, whole_number
from shards.logs import add_log_level, setup_logging
from shards.media.audio import MAX_SECONDS
from shards.progress import progress_bar

if TYPE_CHECKING:
    from shards.report import Report
    from shards.writing.writer import Format

logger = logging.getLogger(__name__)

# Arguments that do not change the contents of the shards.
_NOT_CONTENT = ("out", "jobs", "part", "restart", "dry_run", "log_level")
_MERGE, _INDEX = "merge", "index"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line: a subcommand per corpus, with common and specific options."""
    parser = Parser(
        prog="make_shards.py",
        description="Write a corpus as shards: tar files of pictures with all their spoken captions. To resume a run "
        "that was stopped, run the same command again; finished shards are kept.",
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
    add_log_level(merge)
    _add_index(corpora.add_parser(_INDEX, help="make an index over your own tars as they are, without rewriting them"))
    return parser


def _add_index(parser: argparse.ArgumentParser) -> None:
    from shards.tars.samples import add_layout

    add = parser.add_argument
    parser.description = (
        "Write manifest.json and index.npz into a folder of tars, which are read and checked once and not changed. "
        "They fit if each sample has one picture (JPEG, PNG or WebP) and captions at 16 kHz mono, keys are unique, and "
        "a tar has samples of one split. Others become shards by make_shards.py webdataset."
    )
    add("folder", type=Path, metavar="DIR", help="folder of the tars")
    add("--name", help="name of the data set (default: name of the folder)")
    add("--jobs", type=whole_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add("--skip-bad", action="store_true", help="leave samples that do not fit out of the index, and report them")
    add("--restart", action="store_true", help="replace an index made earlier")
    add_layout(parser)
    add_log_level(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write: new, empty, or unfinished")
    add("--jobs", type=whole_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add("--samples-per-shard", type=whole_number(1), default=500, metavar="N", help="pictures per tar (default: 500)")
    add(
        "--short-side",
        type=whole_number(16),
        default=256,
        metavar="PX",
        help="larger pictures are shrunk (default: 256)",
    )
    add("--quality", type=whole_number(1, 100), default=90, help="quality of the JPEGs (default: 90)")
    add("--codec", choices=("flac", "wav", "opus"), default="flac", help="codec of the audio (default: flac)")
    add(
        "--max-seconds",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="longer audio is an error, see --skip-bad (default: 30)",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="drop and report pictures and captions that cannot be read or are duplicates, rather than stop",
    )
    add(
        "--part",
        type=_part,
        metavar="I/N",
        help="write part I of N; parts can run concurrently; afterwards run make_shards.py merge --out DIR",
    )
    add("--restart", action="store_true", help="remove the shards that an earlier run wrote to --out, finished or not")
    add("--dry-run", action="store_true", help="show what would be written, and write nothing")
    add_log_level(parser)


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
    """Read the corpus, write the shards, and print the report.

    Raises:
        UserError: A mistake on the command line or in the corpus.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    if options.corpus == _MERGE:
        _merge(options.out)
        return
    if options.corpus == _INDEX:
        _index(options)
        return
    if options.part and options.restart:
        raise UserError(f"--restart and --part: remove {options.out} instead, then start all parts")
    content = _content(options)
    if not options.dry_run and _finished(options, content):
        return
    with noted_lists() as lists:
        corpus = load(options.corpus, options)

    # Imported here, as --help should not wait for the writer's dependencies.
    from shards.report import Report
    from shards.writing.writer import Format, estimate_sizes, resume_hint

    form = Format(**{one.name: getattr(options, one.name) for one in fields(Format)})
    if options.dry_run:
        print(estimate_sizes(corpus.items, form))
        if corpus.dropped:
            print("\n".join(Report(dropped=corpus.dropped).dropped_lines()))
        return
    try:
        (_write_part if options.part else _write_all)(corpus, lists, form, content, options)
    except (KeyboardInterrupt, SystemExit):
        if hint := resume_hint(options.out):
            logger.warning("%s: %s", options.out, hint)
        raise


def _write_all(
    corpus: Corpus, lists: Sequence[ListFile], form: "Format", content: dict[str, Any], options: argparse.Namespace
) -> None:
    from shards.writing.writer import write_shards

    start = time.monotonic()
    with progress_bar(len(corpus.items), "pictures") as progress:
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
    planned = plan_shards(corpus.items, options.corpus, form, content, part.of, corpus.dropped, lists)
    with progress_bar(planned.pictures(part), "pictures") as progress:
        written, kept = write_part(planned, options.out, part, options.jobs, progress)
    seconds = time.monotonic() - start
    print(f"{options.out}: part {part}: {written} shards written in {seconds:.0f} s, {kept} kept from an earlier run")
    print(f"after the last part: make_shards.py {_MERGE} --out {options.out}")


def _merge(out: Path) -> None:
    """Finish a folder whose parts are all written."""
    from shards.writing.writer import merge_shards

    if os.path.exists(out / "manifest.json"):
        _print_finished(out, "")
        return
    start = time.monotonic()
    _print_report(out, merge_shards(out), start)


def _index(options: argparse.Namespace) -> None:
    """Index a folder of tars as they are."""
    from shards.tars.index import IndexOptions, index_folder
    from shards.tars.samples import layout_of

    start, folder = time.monotonic(), options.folder
    chosen = IndexOptions(layout_of(options), tuple(options.split), options.skip_bad)
    report = index_folder(folder, options.name or folder.resolve().name, chosen, options.jobs, options.restart)
    print(f"{folder}: indexed in {time.monotonic() - start:.0f} s")
    print(report.text())


def _print_report(out: Path, report: "Report", start: float) -> None:
    print(f"{out}: written in {time.monotonic() - start:.0f} s")
    print(report.text())


def _content(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that determine the contents of the shards, as JSON values."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _NOT_CONTENT
    }


def _finished(options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Return whether `out` holds these shards; raise an error if it holds others, or if their corpus changed."""
    from shards.manifest import MANIFEST, load

    out = options.out
    if not os.path.exists(out / MANIFEST):
        return False
    made, content = load(out).arguments, json.loads(json.dumps(content))
    # An argument that is missing belongs to another version, in which the default had the same effect.
    names = sorted(made.keys() | content.keys())
    different = [name for name in names if (made.get(name) or None) != (content.get(name) or None)]
    places = [name for name in different if made.get(name) and isinstance(getattr(options, name, None), Path)]
    if different != places:
        raise _other_shards(out, made, content, different)
    if options.restart and not different:
        return False
    changed, unknown = _corpus_changes(options)
    if different and (options.restart or changed or unknown):
        raise _other_shards(out, made, content, different, changed)
    if changed:
        again = f"remove {out}" if options.part else "make it again with --restart"
        raise UserError(f"{out} is finished, but its corpus changed since: {changed}: give another --out, or {again}")
    how = f"made from the same files, then at {made[different[0]]}" if different else "made with the same arguments"
    _print_finished(out, f", {how}{unknown}")
    return True


def _other_shards(out: Path, made: Any, content: Any, names: Sequence[str], changed: str = "") -> UserError:
    name, more = names[0], f" ({changed})" if changed else ""
    line = f"{out} contains shards made with {name} {made.get(name)}, now {content.get(name)}{more}"
    return UserError(f"{line}: give another --out, or remove the folder")


def _corpus_changes(options: argparse.Namespace) -> tuple[str, str]:
    """Return how the corpus differs from the sources of the finished folder, and a remark if this is unknown."""
    from shards.writing.sources import compare, compare_lists, load_sources

    unknown = "whether it changed since is unknown"
    try:
        recorded = load_sources(options.out)
    except UserError as error:
        return "", f"; the record of their corpus cannot be read ({error}): {unknown}"
    if recorded is None:
        return "", f"; an earlier version did not record their corpus: {unknown}"
    # A missing file should not prevent the comparison of the others.
    lenient = argparse.Namespace(**{**vars(options), "skip_bad": True})
    with noted_lists() as lists:
        try:
            items = load(options.corpus, lenient).items
        except UserError as error:
            changed = compare_lists(recorded.lists, lists, complete=False)
            return "; ".join(changed), f"; their corpus could not be read ({error}): {unknown}"
    differences = compare(recorded, lists, items)
    if not differences.missing:
        return str(differences), ""
    missing = f"{differences.missing:,} of the {len(recorded.bytes):,} files of their corpus are missing"
    return str(differences), f"; {missing} ({differences.missing_example}): whether these changed since is unknown"


def _print_finished(out: Path, how: str) -> None:
    from shards.report import load_report
    from shards.writing.folder_lock import remove_leftovers

    remove_leftovers(out)
    print(f"{out}: finished already{how}")
    print(load_report(out).text())


def cli() -> None:
    """Entry point of the console command: print a `UserError` as one line, and exit with its code."""
    # On SIGTERM, which schedulers send, clean up as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Each process resamples on one core. torch reads this at import, here and in child processes.
    os.environ["OMP_NUM_THREADS"] = "1"
    run_main(main)


if __name__ == "__main__":
    cli()
