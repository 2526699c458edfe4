"""Compute embeddings of files: python toolkit/embed.py --model RUN photos --out photos.npy.

Inputs are files, one folder, one table (CSV or JSON lines with a column image or audio), or shards. A killed run
continues.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main
from shards.logs import add_log_level, setup_logging
from toolkit.index import add_model

if TYPE_CHECKING:
    from toolkit.indexing.items import ItemSource

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # appended to the name of the output, until it is complete


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="embed.py",
        description="Compute embeddings of images or audio files: float32 [N, D] in .npy and names in .csv, or Parquet",
        epilog="example: python toolkit/embed.py --model runs/quickstart photos --modality image --out photos.npy",
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, one folder, or one table (.csv, .tsv, .jsonl)")
    add("--shards", metavar="DIR", help="folder or URL of shards instead; needs --split")
    add("--split", help="split of the shards")
    add("--modality", choices=("image", "audio"), default="image", help="images or audio (default: image)")
    add("--out", type=Path, required=True, metavar="FILE", help="FILE.npy or FILE.parquet")
    add("--dry-run", action="store_true", help="print how many would be encoded, and write nothing")
    add_model(parser)
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and write embeddings.

    Raises:
        UserError: A mistake on the command line, no such files, or nothing that can be decoded.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    if bool(options.inputs) == bool(options.shards) or bool(options.shards) != bool(options.split):
        raise UserError("expected files, a folder or a table, or --shards DIR with --split SPLIT")

    from toolkit.indexing.encoder import find_model
    from toolkit.indexing.export import check_output, write_embeddings
    from toolkit.indexing.store import Index
    from toolkit.indexing.update import UNITS, plan, update

    check_output(options.out)
    model, source = find_model(options.model, options.checkpoint), open_inputs(options)
    work = options.out.with_name(options.out.name + UNFINISHED)
    if options.dry_run:
        _, changes, listed = plan(work, source, model)
        print(f"{options.out}: {len(changes.to_encode):,} of {len(listed):,} {UNITS[source.modality]} to encode")
        return
    result = update(work, source, model, options.batch_size, options.workers, options.device, "float32")
    if not result.rows:
        shutil.rmtree(work)
        raise UserError(f"none of the {UNITS[source.modality]} can be used: nothing was written")
    files = write_embeddings(Index.open(work), options.out, getattr(source, "names", None))
    shutil.rmtree(work)
    left_out = f", {len(result.unreadable):,} left out" if result.unreadable else ""
    print(f"{', '.join(map(str, files))}: {result.rows:,} {UNITS[source.modality]}{left_out}")


def open_inputs(options: argparse.Namespace) -> "ItemSource":
    """Open the inputs named on the command line.

    Raises:
        UserError: There is no such file, or several folders or tables are given.
    """
    from shards.remote import is_url
    from toolkit.indexing.items import TABLES, FileSource, ShardSource, read_table

    if options.shards:
        location = options.shards if is_url(options.shards) else str(Path(options.shards).resolve())
        return ShardSource(location, options.split, options.modality)
    paths = [Path(name) for name in options.inputs]
    special = [path for path in paths if path.is_dir() or path.suffix in TABLES]
    if special and len(paths) > 1:
        raise UserError(f"{special[0]}: pass one folder or one table alone, or files only")
    if not special:
        return FileSource("", options.modality, options.inputs)
    if special[0].is_dir():
        return FileSource(str(special[0].resolve()), options.modality)
    return FileSource(os.path.dirname(special[0]), options.modality, read_table(special[0], options.modality))


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
