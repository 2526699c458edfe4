"""Search in an index of synthetic embeddings: query time, memory, and approximate against exact search.

    python tests/benchmarks/searching.py [--json] [--items N] [--dim D] [--approximate N] [--repeats R] [--threads T]

The embeddings are drawn around random centers and stored as float16. Exact search is measured by processor time per
query, without encoding, and by the memory growth of a new process relative to the size of the embedding file. The
approximate index (extra [index]) is built from `--approximate` items and searched with queries that are not among them.
Exit code 1: a bound is missed.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from memory import memory_growth
from table import Figure, build_parser, print_figures

from tests.toolkit.indexing.write_index import write_index
from toolkit.indexing.approximate import ApproximateIndex, build
from toolkit.indexing.nearest import nearest
from toolkit.indexing.store import Index

TOP, QUERIES = 10, 50


def make_embeddings(count: int, dim: int, seed: int, centers: int = 2000) -> np.ndarray:
    """Return unit embeddings, float32 [count, dim], around random centers that are the same for every seed."""
    center_points = np.random.default_rng(0).standard_normal((centers, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    points = center_points[rng.integers(0, centers, count)]
    points += rng.standard_normal((count, dim), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def processor_ms(search: Callable[[torch.Tensor], object], queries: torch.Tensor, repeats: int) -> float:
    """Return the median processor time of one query in milliseconds."""
    times = []
    for query in queries[:repeats]:
        begin = time.process_time()
        search(query[None])
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def open_and_search(folder: Path, queries: torch.Tensor) -> float:
    """Return the bytes by which the memory of a new process grows at most when it opens an index and searches it."""
    torch.mm(torch.zeros(8, 8), torch.zeros(8, 8))  # warm-up: excludes the allocations of the first product

    def search() -> None:
        index = Index.open(folder)
        for query in queries:
            nearest(index, query[None], TOP)

    return memory_growth(search)


def measure_exact(index: Index, queries: torch.Tensor, repeats: int) -> list[Figure]:
    """Measure query time against 50 ms, and memory growth against the size of the embedding file."""
    size = (index.folder / index.head.embeddings_name).stat().st_size
    ours = processor_ms(lambda query: nearest(index, query, TOP), queries, repeats)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(open_and_search, (index.folder, queries[:5]))
    matrix = index.embeddings.astype(np.float32)

    def plain(query: torch.Tensor) -> np.ndarray:
        scores = matrix @ query[0].numpy()
        best = np.argpartition(-scores, TOP)[:TOP]
        return best[np.argsort(-scores[best])]

    theirs = processor_ms(plain, queries, repeats)
    what = f"{len(index):,} x {index.head.dim}, best {TOP}"
    limit = f"processor time of a query without encoding, against the limit of 50 ms: {what}; numpy: {theirs:.1f} ms"
    memory = f"memory growth of a new process that searches, against the size of the embedding file: {what}"
    return [
        Figure("exact", ours, 50.0, "ms", ours / 50, limit, at_most=1),
        Figure("memory", grown / 1e6, size / 1e6, "MB", grown / size, memory, at_most=1),
    ]


def measure_approximate(index: Index, queries: torch.Tensor, repeats: int) -> list[Figure]:
    """Measure query time against exact search, and the recall of the exact best 10."""
    begin = time.monotonic()
    folder = index.folder / index.head.approximate_name
    measured = build(index, folder)
    seconds, approximate = time.monotonic() - begin, ApproximateIndex(folder, index)
    expected = nearest(index, queries, TOP)[1]
    found = approximate.nearest(queries, TOP)[1]
    recall = float((expected[:, :, None] == found[:, None, :]).any(dim=2).float().mean())
    ours = processor_ms(lambda query: approximate.nearest(query, TOP), queries, repeats)
    theirs = processor_ms(lambda query: nearest(index, query, TOP), queries, min(repeats, 5))
    measure = f"recall@{TOP} of {len(queries)} queries that are not in the index"
    what = f"{len(index):,} x {index.head.dim}, {measured.probes} of {measured.lists:,} lists, built in {seconds:.0f} s"
    return [
        Figure("approximate", ours, theirs, "ms", theirs / ours, f"against exact search: {what}", at_least=5),
        Figure("recall", recall, 1.0, "", recall, f"{measure}: {what}", at_least=0.95),
    ]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, threads=1)
    parser.add_argument("--items", type=int, default=100_000, help="items of exact search (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="embedding dimension (default: %(default)s)")
    parser.add_argument(
        "--approximate", type=int, default=1_000_000, help="items of approximate search; 0: skip (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed queries (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    queries, figures = torch.from_numpy(make_embeddings(QUERIES, options.dim, 1)), []
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder) / "exact", make_embeddings(options.items, options.dim, 2))
        figures += measure_exact(Index.open(Path(folder) / "exact"), queries, options.repeats)
        if options.approximate:
            index = write_index(Path(folder) / "large", make_embeddings(options.approximate, options.dim, 3))
            figures += measure_approximate(index, queries, options.repeats)
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
