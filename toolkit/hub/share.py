"""Write the model card of a trained model, and push it to the hub: python toolkit/hub/share.py RUN --push OWNER/NAME.

Only the exported model, its processor files and the card are uploaded: no checkpoint, log, audio or image.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from shards.errors import Parser, UserError, run_main
from shards.logs import add_log_level, setup_logging

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="share.py",
        description="Write the model card of a trained model into its exported folder, and push the model to the hub.",
        epilog="example: python toolkit/hub/share.py runs/quickstart --push me/spoken-scenes --private",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder or exported folder")
    add("--checkpoint", metavar="best|last|DIR", help="exported model of a run (default: best, else last)")
    add("--push", metavar="OWNER/NAME", help="upload to this repository of the hub, which is created if there is none")
    add("--private", action="store_true", help="create the repository as private")
    add(
        "--license",
        metavar="ID",
        help="license of the model as the hub names it, such as cc-by-4.0 (default: not stated)",
    )
    add("--dry-run", action="store_true", help="print the files, their sizes and the card; write and upload nothing")
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the card, and push the model.

    Raises:
        UserError: A mistake on the command line, no complete model, or a refusal of the hub.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    if options.private and not options.push:
        raise UserError("--private goes with --push OWNER/NAME")

    from shards.files import atomic_write
    from toolkit.hub.card import CARD, current_card
    from toolkit.hub.push import contents, exported_files, push

    export, run = find_folders(options.model, options.checkpoint)
    exported_files(export)  # before the card is made
    card = current_card(export, run, options.push or (run or export.resolve()).name, options.license)
    files = contents(export, card)
    if options.dry_run:
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in files.items()}
        print(f"{card}\n{options.push or export}:")
        for name, size in sizes.items():
            print(f"{size:>15,} {name}")
        print(f"{sum(sizes.values()):>15,} bytes in {len(sizes)} files")
        return
    for name, content in files.items():
        if isinstance(content, bytes):
            try:
                with atomic_write(export / name) as file:
                    file.write(content)
            except OSError as error:
                raise UserError(f"{export / name} cannot be written: {error.strerror}") from None
    print(f"{export / CARD}: the model card")
    if options.push:
        print(push(files, options.push, options.private))


def find_folders(model: str, checkpoint: str | None) -> tuple[Path, Path | None]:
    """Return the exported folder, and its run folder; None if it is not in one.

    Raises:
        UserError: There is no such folder.
    """
    from toolkit.config.load import SAVED
    from toolkit.indexing.encoder import find_model

    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        raise UserError(f"{model}: no such folder; pass a run folder or an exported folder")
    export = find_model(str(folder), checkpoint)
    parents = export.resolve().parents
    run = parents[1] if len(parents) > 1 and parents[0].name == "export" else None
    return export, run if run and (run / SAVED).is_file() else None


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
