"""Recall in both directions from blockwise products and counting, against a full argsort with loops: time and memory.

    python tests/benchmarks/recall.py [--json] [--pictures P] [--captions N] [--dim D] [--repeats R] [--threads T]

The alternatives take the embeddings and return R@1, 5 and 10 of both directions, which must equal ours to 9 decimals:

    argsort     as in SpeechCLIP's evaluation: the similarities of all pairs, `torch.argsort` in both directions, and a
                loop over queries that sorts the image ids of the candidates (N captions per picture)
    sort_loop   as in ALBEF's evaluation: the same similarities, and for each query `numpy.argsort` and a search for
                each of its correct candidates
    products    a lower bound: only the matrix products of both directions, in blocks

Ours also selects the best 10 candidates of each query and ranks every correct one. Time: measurements alternate, and
the figure is the ratio of the medians. Memory: each runs in its own process, and the figure is the peak growth of its
resident memory above that of the embeddings. One thread by default. Exit code 1: a bound is missed.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from memory import memory_growth, memory_growth_in_subprocess
from table import Figure, build_parser, print_figures

from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import recall_at

CUTOFFS = (1, 5, 10)
NAMES = ("ours", "argsort", "sort_loop", "products")


class Inputs:
    """Random embeddings of pictures, and of captions close to their picture's."""

    def __init__(self, pictures: int, captions: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = F.normalize(torch.randn(pictures, dim, generator=generator), dim=1)
        self.owner = torch.arange(pictures).repeat_interleave(captions)
        self.speech = F.normalize(torch.randn(len(self.owner), dim, generator=generator), dim=1)
        for rows in torch.arange(len(self.owner)).split(1000):  # in blocks, without a second array of this size
            self.speech[rows] = F.normalize(self.images[self.owner[rows]] + 5.5 * self.speech[rows], dim=1)

    def ours(self) -> list[float]:
        """Compute recall with the toolkit."""
        rankings = rank_both(self.speech, self.images, self.owner, 10)
        return [recall_at(ranking.rank_counts, k) for ranking in rankings for k in CUTOFFS]

    def argsort(self) -> list[float]:
        """Compute recall as in SpeechCLIP's evaluation."""
        scores = self.speech @ self.images.T
        figures = []
        directions = (
            (scores, self.owner, torch.arange(len(self.images))),
            (scores.T, torch.arange(len(self.images)), self.owner),
        )
        for matrix, query_ids, candidate_ids in directions:
            order = torch.argsort(matrix, dim=1, descending=True)
            ids = candidate_ids.repeat(len(query_ids), 1)
            for row in range(len(query_ids)):
                ids[row] = ids[row, order[row]]
            correct_candidates = ids == query_ids[:, None]
            figures += [100 * correct_candidates[:, :k].any(dim=1).double().mean().item() for k in CUTOFFS]
        return figures

    def sort_loop(self) -> list[float]:
        """Compute recall as in ALBEF's evaluation."""
        scores = (self.speech @ self.images.T).numpy()
        captions = [np.flatnonzero(self.owner.numpy() == picture) for picture in range(len(self.images))]
        correct = [[[picture] for picture in self.owner.tolist()], captions]
        figures = []
        for matrix, targets in zip((scores, scores.T), correct, strict=True):
            ranks = np.zeros(len(matrix))
            for query, row in enumerate(matrix):
                order = np.argsort(row)[::-1]
                ranks[query] = min(np.where(order == target)[0][0] for target in targets[query])
            figures += [100 * float((ranks < k).mean()) for k in CUTOFFS]
        return figures

    def products(self) -> list[float]:
        """Compute the two matrix products and discard their results."""
        for queries, candidates in ((self.speech, self.images), (self.images, self.speech)):
            for rows in queries.split(max(1, (1 << 24) // len(candidates))):
                rows @ candidates.T
        return []


def median_seconds(inputs: Inputs, repeats: int) -> dict[str, float]:
    """Return the median seconds of each, measured alternately; checks that all return the same recalls."""
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    expected: list[float] = []
    for _ in range(repeats):
        for name, taken in times.items():
            begin = time.perf_counter()
            figures = getattr(inputs, name)()
            taken.append(time.perf_counter() - begin)
            expected = expected or figures
            if figures and [round(value, 9) for value in figures] != [round(value, 9) for value in expected]:
                raise SystemExit(f"{name} returns {figures}, ours {expected}")
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=3, threads=1)
    parser.add_argument("--pictures", type=int, default=5000, help="number of pictures (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=5, help="captions per picture (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=768, help="embedding dimension (default: %(default)s)")
    parser.add_argument("--memory-of", choices=NAMES, help="print the memory growth of one variant in bytes and exit")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = Inputs(options.pictures, options.captions, options.dim)
    if options.memory_of:
        getattr(Inputs(8, 2, 4), options.memory_of)()  # warm-up: libraries allocate their threads and buffers
        print(memory_growth(getattr(inputs, options.memory_of)))
        return 0
    what = f"{options.pictures:,} pictures, {len(inputs.owner):,} captions, embedding dimension {options.dim}"
    times = median_seconds(inputs, options.repeats)
    figures = []
    for name, bound in (("argsort", 10.0), ("sort_loop", 2.5), ("products", 0.9)):
        ratio = times[name] / times["ours"]
        figures.append(Figure(f"recall_{name}", times["ours"], times[name], "s", ratio, what, at_least=bound))
    ours, theirs = (memory_growth_in_subprocess(name) / 2**20 for name in ("ours", "argsort"))
    peak = f"peak memory above the embeddings: {what}"
    figures.append(Figure("recall_memory", ours, theirs, "MiB", ours / theirs, peak, at_most=0.2))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
