"""Search in an index of made-up embeddings: a query after encoding, memory, and approximate against exact search.

    python tests/benchmarks/searching.py [--json] [--items N] [--dim D] [--approximate N] [--repeats R] [--threads T]

The embeddings are drawn around random centers and stored as float16. Exact search is measured by processor time, and by
how much a new process grows against the size of the file of embeddings. The approximate index (extra [index]) is built
of `--approximate` items, and searched with queries that are not among them. Exit code 1: a bound is missed.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from table import Figure, print_figures

from tests.toolkit.indexing.made_up import made_up
from toolkit.indexing.approximate import ApproximateIndex, build
from toolkit.indexing.nearest import nearest
from toolkit.indexing.store import Index

TOP, QUERIES = 10, 50


def embeddings(count: int, dim: int, seed: int, centers: int = 2000) -> np.ndarray:
    """Unit embeddings float32 [count, dim] around the same random centers for each seed."""
    middle = np.random.default_rng(0).standard_normal((centers, dim)).astype(np.float32)
    chance = np.random.default_rng(seed)
    points = middle[chance.integers(0, centers, count)]
    points += chance.standard_normal((count, dim), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def processor_ms(search: Callable[[torch.Tensor], object], queries: torch.Tensor, repeats: int) -> float:
    """Median processor time of one query, in ms."""
    times = []
    for query in queries[:repeats]:
        begin = time.process_time()
        search(query[None])
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def peak() -> int:
    """Most memory that this process ever had, in bytes; unlike `ru_maxrss` not that of the process that started it."""
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])


def growth(folder: Path, queries: torch.Tensor) -> int:
    """Bytes by which a new process grows when it opens an index and searches."""
    torch.mm(torch.zeros(8, 8), torch.zeros(8, 8))  # what the first product allocates does not belong to the index
    before = peak()
    index = Index.open(folder)
    for query in queries:
        nearest(index, query[None], TOP)
    return peak() - before


def exact(index: Index, queries: torch.Tensor, repeats: int) -> list[Figure]:
    """A query under 50 ms, and memory below the size of the file."""
    size = (index.folder / index.head.embeddings_name).stat().st_size
    ours = processor_ms(lambda query: nearest(index, query, TOP), queries, repeats)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(growth, (index.folder, queries[:5]))
    matrix = index.embeddings.astype(np.float32)

    def plain(query: torch.Tensor) -> np.ndarray:
        scores = matrix @ query[0].numpy()
        best = np.argpartition(-scores, TOP)[:TOP]
        return best[np.argsort(-scores[best])]

    theirs = processor_ms(plain, queries, repeats)
    what = f"{len(index):,} x {index.head.dim}, best {TOP}"
    limit = f"processor time of a query after encoding against the limit of 50 ms: {what}; numpy: {theirs:.1f} ms"
    memory = f"growth of memory of a new process that searches, against the file of embeddings: {what}"
    return [
        Figure("exact", ours, 50.0, "ms", ours / 50, limit, at_most=1),
        Figure("memory", grown / 1e6, size / 1e6, "MB", grown / size, memory, at_most=1),
    ]


def approximate(index: Index, queries: torch.Tensor, repeats: int) -> list[Figure]:
    """Time of a query against exact search, and the share of the exact best 10 that is found."""
    begin = time.monotonic()
    folder = index.folder / index.head.approximate_name
    measured = build(index, folder)
    seconds, found = time.monotonic() - begin, ApproximateIndex(folder, index)
    right = nearest(index, queries, TOP)[1]
    got = found.nearest(queries, TOP)[1]
    recall = float((right[:, :, None] == got[:, None, :]).any(dim=2).float().mean())
    ours = processor_ms(lambda query: found.nearest(query, TOP), queries, repeats)
    theirs = processor_ms(lambda query: nearest(index, query, TOP), queries, min(repeats, 5))
    others = f"recall@{TOP} of {len(queries)} other queries"
    what = f"{len(index):,} x {index.head.dim}, {measured.probes} of {measured.lists:,} lists, built in {seconds:.0f} s"
    return [
        Figure("approximate", ours, theirs, "ms", theirs / ours, f"against exact search: {what}", at_least=5),
        Figure("recall", recall, 1.0, "", recall, f"{others}: {what}", at_least=0.95),
    ]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--items", type=int, default=100_000, help="of exact search (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="size of an embedding (default: %(default)s)")
    parser.add_argument("--approximate", type=int, default=1_000_000, help="items; 0: none (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="queries that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    queries, figures = torch.from_numpy(embeddings(QUERIES, options.dim, 1)), []
    with tempfile.TemporaryDirectory() as folder:
        made_up(Path(folder) / "exact", embeddings(options.items, options.dim, 2))
        figures += exact(Index.open(Path(folder) / "exact"), queries, options.repeats)
        if options.approximate:
            index = made_up(Path(folder) / "large", embeddings(options.approximate, options.dim, 3))
            figures += approximate(index, queries, options.repeats)
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
