"""Recall: rank every answer for every query by cosine similarity, and count the right ones among the first k.

Protocol of Flickr8k and SpokenCOCO: each spoken caption queries all distinct pictures of the split; each picture
queries all captions, and any of its own is a hit. Both are `rank_answers`, the picture being the identity of both
sides.

Ties are resolved in expectation: a right answer that shares its score with wrong ones stands at each of their places
with equal probability. So recall does not depend on the order of the answers, and a model that gives every pair the
same score gets exactly chance. A score that is not a number counts against the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)
_CELLS = 1 << 24  # scores held at once: 64 MB


@dataclass
class RankCounts:
    """Where the best right answer of each query stands; all int64 [Q]."""

    ahead: Tensor  # wrong answers with a better score
    tied: Tensor  # wrong answers with the same score
    right: Tensor  # right answers with the same score, itself included


@dataclass
class Ranking:
    """The result of one direction, on the CPU."""

    rank_counts: RankCounts  # [Q]
    candidates: Tensor  # int64 [Q, k], the best answers of each query, best first


def rank_of_best(scores: Tensor, right: Tensor) -> RankCounts:
    """Find where the best right answer stands.

    Args:
        scores: [Q, N], the higher the better.
        right: bool [Q, N], at least one True in each row.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    same = scores == best
    ahead = ~right & ~(scores <= best)  # not `>`: whatever is compared with a nan is ahead
    return RankCounts(ahead.sum(1), (~right & same).sum(1), (right & same).sum(1).clamp(min=1))


def recall_at(rank_counts: RankCounts, k: int) -> float:
    """Recall at k in per cent: the expected share of queries with a right answer among the first k."""
    return 100.0 * hits_at(rank_counts, k).mean().item()


def hits_at(rank_counts: RankCounts, k: int) -> Tensor:
    """Probability of each query that a right answer is among the first k, float64 [Q].

    With s = k - ahead places left for `tied` wrong and `right` right answers in random order, all s are wrong with
    probability prod_{j<s} (tied - j) / (tied + right - j).
    """
    miss = torch.ones(len(rank_counts.ahead), dtype=torch.float64)
    for place in range(k):
        wrong = (rank_counts.tied - place).clamp(min=0).double()
        taken = rank_counts.ahead + place < k
        miss = torch.where(taken, miss * wrong / (wrong + rank_counts.right), miss)
    return 1.0 - miss


def rank_answers(
    queries: Tensor,
    query_ids: Tensor,
    answers: Tensor,
    answer_ids: Tensor,
    k: int,
    rank: int = 0,
    world_size: int = 1,
    chunk: int | None = None,
) -> Ranking:
    """Rank all answers for all queries, the queries spread over the ranks in chunks; the result is whole on every rank.

    The chunks are cut alike for any number of ranks, so that the figures are the same bits for any number of ranks.

    Args:
        queries: unit embeddings [Q, D], the same on all ranks.
        query_ids: int64 [Q], identity of the picture that each query belongs to.
        answers: unit embeddings [N, D].
        answer_ids: int64 [N]. Every query id occurs among them.
        k: candidates kept for each query, at most N.
        rank: this process.
        world_size: number of processes.
        chunk: queries scored at once; by default as many as keep the scores within 64 MB.
    """
    chunk = chunk or max(1, _CELLS // len(answers))
    k = min(k, len(answers))
    counts = torch.zeros(3, len(queries), dtype=torch.int64, device=queries.device)
    candidates = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(rank * chunk, len(queries), world_size * chunk):
        rows = slice(start, start + chunk)
        similarity = queries[rows] @ answers.T
        rank_counts = rank_of_best(similarity, query_ids[rows, None] == answer_ids[None, :])
        counts[:, rows] = torch.stack([rank_counts.ahead, rank_counts.tied, rank_counts.right])
        candidates[rows] = similarity.topk(k, dim=1).indices
    return Ranking(RankCounts(*all_reduce_sum(counts, world_size).cpu()), all_reduce_sum(candidates, world_size).cpu())


def all_reduce_sum(part: Tensor, world_size: int) -> Tensor:
    """Put together a tensor of which every rank filled its own places and left zeros elsewhere; in place, exact."""
    if world_size > 1:
        torch.distributed.all_reduce(part)
    return part


def summarize_recall(speech_to_image: Ranking, image_to_speech: Ranking) -> dict[str, Any]:
    """R@1, R@5, R@10 of both directions and the mean of both R@1, in per cent."""
    directions = {"speech_to_image": speech_to_image, "image_to_speech": image_to_speech}
    report: dict[str, Any] = {}
    for name, ranking in directions.items():
        report[name] = {f"R@{k}": round(recall_at(ranking.rank_counts, k), 3) for k in CUTOFFS}
    mean = sum(recall_at(ranking.rank_counts, 1) for ranking in directions.values()) / 2
    return report | {"mean_R@1": round(mean, 3)}
