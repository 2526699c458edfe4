"""Index images or audio files: python toolkit/index.py --model RUN --pictures DIR --out INDEX.

A second run encodes only new and changed files, and drops those that no longer exist; a killed run continues.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main, whole_number
from shards.logs import add_log_level, setup_logging

if TYPE_CHECKING:
    from toolkit.indexing.items import ItemSource

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="index.py",
        description="Make an index of images or audio files, or bring it up to date, for search.py.",
        epilog="example: python toolkit/index.py --model runs/quickstart --pictures photos --out photos.index",
    )
    add = parser.add_argument
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pictures", metavar="DIR", help="folder of images, with its subfolders")
    source.add_argument("--audio", metavar="DIR", help="folder of audio files, with its subfolders")
    source.add_argument("--shards", metavar="DIR", help="folder or URL of shards; needs --split")
    add("--split", help="split of the shards")
    add("--captions", action="store_true", help="index the audio of the shards instead of the images")
    add("--out", type=Path, required=True, metavar="INDEX", help="folder of the index")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of a new index (default: float16)")
    add(
        "--approximate-from",
        type=whole_number(1),
        default=1_000_000,
        metavar="N",
        help="number of items from which on an approximate index is made too, with faiss (default: 1,000,000)",
    )
    add("--dry-run", action="store_true", help="print how many items would be encoded and dropped, and write nothing")
    add_log_level(parser)
    return parser


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of the model and its speed."""
    add = parser.add_argument
    source = "run folder, exported folder or hub id" + ("" if required else " (default: the index's)")
    add("--model", required=required, metavar="MODEL", help=source)
    add("--checkpoint", metavar="best|last|DIR", help="exported model of a run (default: best, else last)")
    add("--device", help="device of torch (default: the GPU if there is one)")
    add("--workers", type=whole_number(1), metavar="N", help="threads that decode (default: one per core, at most 8)")
    if required:
        add("--batch-size", type=whole_number(1), default=32, metavar="N", help="items encoded at once (default: 32)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make or update an index.

    Raises:
        UserError: A mistake on the command line, or an index of another model or source.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    if bool(options.shards) != bool(options.split):
        raise UserError("--shards and --split go together: pass both or neither")
    if options.captions and not options.shards:
        raise UserError("--captions is for --shards: for a folder of audio files, pass it as --audio")

    from toolkit.indexing.encoder import find_model
    from toolkit.indexing.update import UNITS, plan, update

    model, source = find_model(options.model, options.checkpoint), open_items(options)
    if options.dry_run:
        _, changes, _ = plan(options.out, source, model)
        print(f"{options.out}: {changes}; {len(changes.to_encode):,} to encode")
        return
    result = update(
        options.out, source, model, options.batch_size, options.workers, options.device, options.dtype,
        options.approximate_from,
    )  # fmt: skip
    logger.info("%s: %s", options.out, result.changes)
    if result.unreadable:
        logger.warning("%s of the items cannot be used and were left out", f"{len(result.unreadable):,}")
    print(f"{options.out}: {result.rows:,} {UNITS[source.modality]}")


def open_items(options: argparse.Namespace) -> "ItemSource":
    """Open the source named on the command line.

    Raises:
        UserError: There is no such folder, or there are no such shards.
    """
    from shards.remote import is_url
    from toolkit.indexing.items import FileSource, ShardSource

    if options.shards:
        location = options.shards if is_url(options.shards) else str(Path(options.shards).resolve())
        return ShardSource(location, options.split, "audio" if options.captions else "image")
    folder = Path(options.pictures or options.audio)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    return FileSource(str(folder.resolve()), "image" if options.pictures else "audio")


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
