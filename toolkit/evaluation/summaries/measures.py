r"""Measures of other codebases, from the ranking of which this project reports recall.

They differ where a query has several correct candidates, as a picture has captions. With y(q) the correct candidates of
query q and r_j the rank of candidate j:

    R@k, hit_rate_at_k   any of y(q) is among the first k (papers on speech-image retrieval; mteb's hit_rate)
    recall_at_k          the fraction of y(q) among the first k (mteb, trec_eval): at most k / |y(q)|
    nDCG@10              sum over j in y(q) with r_j <= 10 of 1 / log2(1 + r_j), over its maximum (mteb's main score)

Ties are resolved in expectation: a candidate takes each of the ranks of the candidates with its score with equal
probability. mteb and trec_eval order them by their identifiers.
"""

import torch
from torch import Tensor

from toolkit.evaluation.recall import CUTOFFS, Ranking, hits_at

DEPTH = 10  # of nDCG


def measure_queries(ranking: Ranking) -> dict[str, Tensor]:
    """Measure each query: fractions, float64 [Q].

    Args:
        ranking: With the ranks of all correct candidates.
    """
    found = {f"recall_at_{k}": expected_recall(ranking, k) for k in CUTOFFS}
    hits = {f"hit_rate_at_{k}": hits_at(ranking.rank_counts, k) for k in CUTOFFS}
    return {f"nDCG@{DEPTH}": expected_ndcg(ranking), **found, **hits}


def measure(ranking: Ranking) -> dict[str, float]:
    """Means over the queries, in percent."""
    return {name: round(100 * values.mean().item(), 3) for name, values in measure_queries(ranking).items()}


def expected_recall(ranking: Ranking, k: int) -> Tensor:
    """Expected fraction of each query's correct candidates among the first k: float64 [Q]."""
    return _sum_by_query(ranking, (torch.arange(1, k + 1) > 0).double()) / _correct_counts(ranking)


def expected_ndcg(ranking: Ranking) -> Tensor:
    """Expected normalized discounted cumulative gain of each query, with binary relevance: float64 [Q]."""
    discounts = 1 / torch.log2(torch.arange(2, DEPTH + 2, dtype=torch.float64))
    best = discounts.cumsum(0)[_correct_counts(ranking).clamp(max=DEPTH) - 1]
    return _sum_by_query(ranking, discounts) / best


def _correct_counts(ranking: Ranking) -> Tensor:
    assert ranking.correct is not None
    return torch.bincount(ranking.correct.query, minlength=len(ranking.rank_counts.ahead))


def _sum_by_query(ranking: Ranking, gains: Tensor) -> Tensor:
    """Sum over each query's correct candidates of the expected gain: float64 [Q].

    Args:
        ranking: With the ranks of all correct candidates.
        gains: Float64 [depth], the gain at rank 1, 2, ...; 0 behind them.
    """
    correct = ranking.correct
    assert correct is not None
    sums = torch.nn.functional.pad(gains.cumsum(0), (1, 0))  # of the first n ranks
    first, last = correct.ahead.clamp(max=len(gains)), (correct.ahead + correct.tied).clamp(max=len(gains))
    expected = (sums[last] - sums[first]) / correct.tied
    return torch.zeros(len(ranking.rank_counts.ahead), dtype=torch.float64).index_add_(0, correct.query, expected)
