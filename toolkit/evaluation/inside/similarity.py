"""Distribution of cosines and ranks, the modality gap, and the hardest queries of both directions."""

from typing import Any

import torch
from torch import Tensor

from toolkit.evaluation.recall import Ranking

_BINS = 80  # of the cosines, from -1 to 1
_CHUNK = 1024  # captions at once
_EDGES = (1, 2, 3, 4, 5, 6, 11, 21, 51, 101, 201, 501, 1001)
FOUND = 5  # candidates shown of each hard query


def similarities(
    speech: Tensor, images: Tensor, caption_picture: Tensor
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Measure the modality gap, and count the cosines of right and wrong pairs.

    Args:
        speech: Unit embeddings [C, D].
        images: Unit embeddings [P, D].
        caption_picture: Int64 [C], position of each caption's picture.

    Returns:
        `Inside.gap` and `Inside.similarity`.
    """
    caption_picture = caption_picture.to(speech.device)
    right = torch.zeros(_BINS, dtype=torch.float64)
    every = torch.zeros(_BINS, dtype=torch.float64)
    total = right_total = 0.0
    for start in range(0, len(speech), _CHUNK):
        cosines = (speech[start : start + _CHUNK] @ images.T).clamp(-1, 1).float().cpu()
        own = cosines.gather(1, caption_picture[start : start + _CHUNK, None].cpu())
        every += torch.histc(cosines, _BINS, -1, 1).double()
        right += torch.histc(own, _BINS, -1, 1).double()
        total, right_total = total + float(cosines.double().sum()), right_total + float(own.double().sum())
    captions, wrong = len(speech), len(speech) * (len(images) - 1)
    gap = {
        "centroids": float((speech.double().mean(0) - images.double().mean(0)).norm()),
        "right": right_total / captions,
        "wrong": (total - right_total) / max(1, wrong),
    }
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64).tolist()
    return gap, {"edges": edges, "right": right.tolist(), "wrong": (every - right).tolist()}


def rank_histogram(ranking: Ranking) -> dict[str, list[int]]:
    """Count the ranks of the best correct candidates; of equal scores half of the incorrect ones are ahead."""
    ranks = _ranks(ranking)
    edges = [edge for edge in _EDGES if edge <= int(ranks.max())]
    edges.append(next((edge for edge in _EDGES if edge > edges[-1]), int(ranks.max()) + 1))
    bins = torch.bucketize(ranks, torch.tensor(edges), right=True) - 1
    return {"edges": edges, "counts": torch.bincount(bins, minlength=len(edges) - 1).tolist()}


def _ranks(ranking: Ranking) -> Tensor:
    return 1 + ranking.rank_counts.ahead + ranking.rank_counts.tied // 2


def hardest(
    ranking: Ranking, queries: Tensor, query_ids: Tensor, candidates: Tensor, candidate_ids: Tensor, count: int
) -> list[dict[str, Any]]:
    """List the queries whose best correct candidate has the highest rank.

    Args:
        ranking: Of the Q queries.
        queries: Unit embeddings [Q, D].
        query_ids: Int64 [Q], picture of each query.
        candidates: Unit embeddings [N, D].
        candidate_ids: Int64 [N], picture of each candidate.
        count: Number of queries.

    Returns:
        {"query": position, "rank", "similarity": cosine of the best correct candidate, "answer": its position,
        "found": positions of the best candidates, "found_similarity": their cosines}.
    """
    ranks = _ranks(ranking)
    chosen = ranks.argsort(descending=True, stable=True)[:count]
    listed = []
    for query in chosen.tolist():
        cosines = (candidates @ queries[query]).cpu()
        answer = int(cosines.masked_fill(candidate_ids.cpu() != int(query_ids[query]), -2).argmax())
        found = ranking.candidates[query, :FOUND]
        listed.append(
            {
                "query": query,
                "rank": int(ranks[query]),
                "similarity": float(cosines[answer]),
                "answer": answer,
                "found": found.tolist(),
                "found_similarity": cosines[found].tolist(),
            }
        )
    return listed
