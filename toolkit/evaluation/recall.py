"""Recall at k: rank all candidates of each query by cosine similarity, and look for a correct one among the first k.

Protocol of Flickr8k and SpokenCOCO: each spoken caption queries all distinct pictures of the split; each picture
queries all captions, and any of its captions is correct.

Ties are resolved in expectation: a correct candidate with the same score as incorrect ones takes each of their ranks
with equal probability. Recall therefore does not depend on the order of the candidates, and a model that scores all
pairs equally gets exactly chance. NaN scores count against the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)


@dataclass
class RankCounts:
    """Numbers of candidates that determine the rank of each query's best correct candidate; all int64 [Q]."""

    ahead: Tensor  # incorrect candidates with a higher score
    tied: Tensor  # incorrect candidates with the same score
    correct: Tensor  # correct candidates with the same score, itself included


@dataclass
class CorrectCandidates:
    """Every correct candidate of every query and its rank; all int64 [M]."""

    query: Tensor  # position of the query
    candidate: Tensor  # position of the candidate
    ahead: Tensor  # candidates with a higher score, correct or not
    tied: Tensor  # candidates with the same score, correct or not, itself included


@dataclass
class Ranking:
    """Ranking in one direction, on the CPU."""

    rank_counts: RankCounts  # [Q]
    candidates: Tensor  # int64 [Q, k], the best candidates of each query, best first
    correct: CorrectCandidates | None = None  # None: only the best correct candidate of each query is known


def rank_of_best(scores: Tensor, correct: Tensor) -> RankCounts:
    """Count the candidates ahead of and tied with the best correct candidate of each query.

    Args:
        scores: [Q, N], higher is better.
        correct: Bool [Q, N], True for correct candidates; at least one per row.
    """
    best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
    same = scores == best
    ahead = ~correct & ~(scores <= best)  # not `>`: a NaN on either side counts as ahead
    return RankCounts(ahead.sum(1), (~correct & same).sum(1), (correct & same).sum(1).clamp(min=1))


def recall_at(rank_counts: RankCounts, k: int) -> float:
    """Recall at k in percent: expected fraction of queries with a correct candidate among the first k."""
    return 100.0 * hits_at(rank_counts, k).mean().item()


def hits_at(rank_counts: RankCounts, k: int) -> Tensor:
    """Probability, for each query, that a correct candidate is among the first k: float64 [Q].

    With s = k - ahead ranks left for `tied` incorrect and `correct` correct candidates in random order, all s are
    incorrect with probability prod_{j<s} (tied - j) / (tied + correct - j).
    """
    miss = torch.ones(len(rank_counts.ahead), dtype=torch.float64)
    for j in range(k):
        wrong = (rank_counts.tied - j).clamp(min=0).double()
        within = rank_counts.ahead + j < k
        miss = torch.where(within, miss * wrong / (wrong + rank_counts.correct), miss)
    return 1.0 - miss


def all_reduce_sum(part: Tensor, world_size: int) -> Tensor:
    """Sum a tensor over the ranks, in place; exact where only one rank is not zero."""
    if world_size > 1:
        torch.distributed.all_reduce(part)
    return part


def summarize_recall(speech_to_image: Ranking, image_to_speech: Ranking) -> dict[str, Any]:
    """R@1, R@5, R@10 of both directions and the mean of both R@1, in percent."""
    directions = {"speech_to_image": speech_to_image, "image_to_speech": image_to_speech}
    report: dict[str, Any] = {}
    for name, ranking in directions.items():
        report[name] = {f"R@{k}": round(recall_at(ranking.rank_counts, k), 3) for k in CUTOFFS}
    mean = sum(recall_at(ranking.rank_counts, 1) for ranking in directions.values()) / 2
    return report | {"mean_R@1": round(mean, 3)}
