"""Search an index: python toolkit/search.py INDEX query.wav --top 10 --rerank 32.

An index of images is searched by audio files, an index of audio files by images; with --serve by a page in a browser.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main, whole_number
from shards.logs import add_log_level, setup_logging
from toolkit.config.schema import Fuse
from toolkit.index import add_model

if TYPE_CHECKING:
    from toolkit.indexing.search import Searcher

logger = logging.getLogger(__name__)

PAGE_RERANK = 32


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="search.py",
        description="Find the images that a spoken query describes, or the audio files that describe an image.",
        epilog="example: python toolkit/search.py photos.index query.wav --top 10 --rerank 32",
    )
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX", help="folder written by index.py")
    add("queries", nargs="*", metavar="QUERY", help="audio files, or images for an index of audio files")
    add("--serve", type=int, metavar="PORT", help="serve a page to record, upload and search, in place of QUERY")
    add("--host", metavar="ADDRESS", help="address for --serve, protected by a token (default: 127.0.0.1, no token)")
    add("--top", type=whole_number(1), default=10, metavar="N", help="results per query (default: 10)")
    add(
        "--rerank",
        type=int,
        metavar="K",
        help="best candidates to re-rank by the match logit (default: 0; with --serve: 32)",
    )
    add(
        "--fuse",
        choices=get_args(Fuse),
        default="fitted",
        help="score of re-ranked candidates, as evaluation.fuse (default: fitted)",
    )
    add("--exact", action="store_true", help="search all embeddings, also where the index has an approximate index")
    add_model(parser, required=False)
    add("--json", action="store_true", help="print JSON, one object per query")
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results of each query.

    Raises:
        UserError: A mistake on the command line, a damaged index, another model, or a query that cannot be decoded.
    """
    options = build_parser().parse_intermixed_args(arguments)  # options may stand between the queries
    setup_logging(options.log_level)
    check(options)

    from toolkit.indexing.approximate import open_approximate
    from toolkit.indexing.encoder import Encoder, find_model, model_checksum
    from toolkit.indexing.items import printable
    from toolkit.indexing.search import Searcher
    from toolkit.indexing.store import Index
    from toolkit.indexing.update import check_model

    index = Index.open(options.index)
    if (
        not options.model and not Path(index.head.model_folder).is_dir()
    ):  # never a hub id: an index may be from anywhere
        raise UserError(f"the model of {options.index} is not in {index.head.model_folder}: pass it as --model")
    model = find_model(options.model or index.head.model_folder, options.checkpoint)
    check_model(index.head, model_checksum(model), options.index)
    approximate = None if options.exact else open_approximate(index)
    if approximate:
        logger.warning("%s; --exact searches all", approximate.measured)
    find = approximate.nearest if approximate else None
    searcher = Searcher(index, Encoder.load(model, options.device), options.fuse, options.workers, find)
    if options.serve is not None:
        from toolkit.indexing.answers import PageAnswers
        from toolkit.indexing.serve import serve

        serve(
            PageAnswers(searcher, options.top, page_rerank(searcher, options.rerank)),
            options.index,
            options.serve,
            options.host,
        )
        return
    results = searcher.search_files(options.queries, options.top, options.rerank or 0)
    for query, hits in zip(options.queries, results, strict=True):
        if options.json:
            print(json.dumps({"query": query, "results": [asdict(hit) for hit in hits]}), flush=True)
            continue
        if len(options.queries) > 1:
            print(f"{printable(query)}:")
        for rank, hit in enumerate(hits, 1):
            print(f"{rank:>4}  {hit.score:.4f}  {printable(hit.path)}", flush=True)


def check(options: argparse.Namespace) -> None:
    """Check the command line.

    Raises:
        UserError: Options that do not go together, or a value that is not possible.
    """
    if (options.rerank or 0) < 0:
        raise UserError(f"--rerank {options.rerank}: expected a number of candidates, or 0")
    if options.serve is None and not options.queries:
        raise UserError("no QUERY: pass files to search with, or --serve PORT for a page")
    if options.serve is None and options.host is not None:
        raise UserError("--host is for --serve: pass a port too")
    if options.serve is not None and (options.queries or options.json):
        raise UserError("--serve takes no QUERY and no --json: queries come from the page")
    if options.serve is not None and not 0 <= options.serve < 65536:
        raise UserError(f"--serve {options.serve}: expected a port, 0 to 65535")


def page_rerank(searcher: "Searcher", rerank: int | None) -> int:
    """Number of candidates that the page re-ranks: by default 32 if the model's scores can be fused.

    Raises:
        UserError: Re-ranking is asked for, and they cannot be.
    """
    problem = searcher.fusion_problem()
    if rerank and problem:
        raise UserError(problem)
    if rerank is None and problem:
        logger.warning("results are not re-ranked: %s", problem)
        return 0
    return PAGE_RERANK if rerank is None else rerank


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
