"""Re-ranking: the best k candidates of SIC are reordered by SIM's match logit, in both directions.

`evaluation.fuse` selects the score that orders the candidates:

    fitted      cosine + w * match logit, with w fitted on the development split and stored in the exported model
    sum         match logit + cosine of the embeddings, without temperature (BLIP: score + topk_sim)
    matching    match logit (ALBEF: itm_head(...)[:, 1])

Candidates beyond the best k keep their order and follow them. If the k-th and the next candidate have equal cosines,
their position decides which of them is re-ranked.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shards.errors import UserError
from shards.progress import progress_range
from toolkit.config import schema as config
from toolkit.evaluation.encode import Encodings, ProcessInfo
from toolkit.evaluation.recall import CorrectCandidates, RankCounts, Ranking, all_reduce_sum, rank_of_best
from toolkit.model.outputs import Encoded

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_CORRECT_ROWS = 1 << 16  # correct candidates that are ranked at once


@dataclass(frozen=True)
class ScoredCandidates:
    """The best k candidates of both directions with their scores; a pair that is a candidate in both is scored once."""

    similarity: Tensor  # float32 [M], cosines of the pairs
    logits: Tensor  # float32 [M], match logits
    pairs: tuple[Tensor, Tensor]  # int64 [Q, k] of each direction, positions among the pairs
    correct: tuple[Tensor, Tensor]  # bool [Q, k] of each direction, True for correct candidates
    seconds: float  # of one process, per query

    def fit_weight(self) -> float:
        """Fit the weight of the match logit to these candidates; see `fit_weight`."""
        return fit_weight(
            [(self.similarity[i], self.logits[i], r) for i, r in zip(self.pairs, self.correct, strict=True)]
        )

    def reorder(
        self,
        model: "SpeechImageModel",
        speech_to_image: Ranking,
        image_to_speech: Ranking,
        evaluation: config.Evaluation,
    ) -> tuple[Ranking, Ranking]:
        """Return both rankings with these candidates sorted by `evaluation.fuse`.

        Raises:
            UserError: `fuse` is fitted, and the model's weight is not.
        """
        scores = fuse_scores(model, self.similarity, self.logits, evaluation)
        by_speech, by_image = (scores[pairs] for pairs in self.pairs)
        return (
            reorder(speech_to_image, by_speech, self.correct[0]),
            reorder(image_to_speech, by_image, self.correct[1]),
        )


def score_candidates(
    model: "SpeechImageModel",
    encodings: Encodings,
    speech_to_image: Ranking,
    image_to_speech: Ranking,
    queries: Tensor,
    k: int,
    process: ProcessInfo,
) -> ScoredCandidates:
    """Score the best k candidates in both directions, from the encodings of both sides: no input is encoded again.

    Args:
        model: In evaluation mode.
        encodings: With tokens.
        speech_to_image: Ranking of the captions in the order of `encodings`.
        image_to_speech: Ranking of the pictures in the order of `queries`.
        queries: Int64 [Q], positions of the pictures that are queries.
        k: Candidates per query.
        process: This process.
    """
    started = time.monotonic()
    pictures, captions = speech_to_image.candidates[:, :k], image_to_speech.candidates[:, :k]
    # One integer per pair: caption * P + picture.
    size = len(encodings.images)
    forward = torch.arange(len(pictures))[:, None] * size + pictures
    backward = captions * size + queries[:, None]
    numbers = torch.unique(torch.cat([forward.flatten(), backward.flatten()]))
    pairs = torch.stack([numbers // size, numbers % size], dim=1)
    logits, similarity = match_pairs(model, encodings, pairs, process), cosines(encodings, pairs).cpu()
    indices = torch.searchsorted(numbers, forward), torch.searchsorted(numbers, backward)
    caption_picture = encodings.caption_picture
    correct = caption_picture[: len(pictures), None] == pictures, queries[:, None] == caption_picture[captions]
    seconds = (time.monotonic() - started) * process.world_size / (len(forward) + len(backward))
    return ScoredCandidates(similarity, logits, indices, correct, seconds)


def reorder(ranking: Ranking, scores: Tensor, correct: Tensor) -> Ranking:
    """Sort the first k candidates of each query by new scores.

    Args:
        ranking: The ranking of Q queries before.
        scores: [Q, k], new scores of the first k candidates.
        correct: Bool [Q, k], True for correct candidates.
    """
    old, k = ranking.rank_counts, scores.shape[1]
    inside = correct.any(dim=1)
    new = rank_of_best(scores, correct | ~inside[:, None])  # needs a True in each row, also in rows that are not used
    ahead = old.ahead.clamp(min=k)  # a correct candidate outside is behind all k, even those with its old score
    rank_counts = RankCounts(
        torch.where(inside, new.ahead, ahead),
        torch.where(inside, new.tied, (old.ahead + old.tied - ahead).clamp(min=0)),
        torch.where(inside, new.correct, old.correct),
    )
    order = scores.argsort(dim=1, descending=True, stable=True)
    candidates = torch.cat([ranking.candidates.gather(1, order), ranking.candidates[:, k:]], dim=1)
    reordered = (
        None if ranking.correct is None else _reorder_correct(ranking.correct, ranking.candidates[:, :k], scores)
    )
    return Ranking(rank_counts, candidates, reordered)


def _reorder_correct(correct: CorrectCandidates, candidates: Tensor, scores: Tensor) -> CorrectCandidates:
    """Rank the correct candidates anew: those among the first k by the new scores, the others behind all k."""
    k = candidates.shape[1]
    ahead = correct.ahead.clamp(min=k)
    tied = (correct.ahead + correct.tied - ahead).clamp(min=1)
    for rows in torch.arange(len(correct.query)).split(_CORRECT_ROWS):
        query = correct.query[rows]
        found, place = (candidates[query] == correct.candidate[rows, None]).nonzero().unbind(1)
        of_query = scores[query[found]]
        own = of_query.gather(1, place[:, None])
        ahead[rows[found]] = (~(of_query <= own)).sum(1)  # not `>`: a NaN on either side counts as ahead
        tied[rows[found]] = (of_query == own).sum(1).clamp(min=1)
    return CorrectCandidates(correct.query, correct.candidate, ahead, tied)


def fit_weight(directions: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    r"""Fit the weight w of match logits m relative to cosines c by maximum likelihood.

    With y(q) the correct candidates of query q, a and b maximize

    .. math:: \sum_q \log \frac{\sum_{n \in y(q)} \exp(a c_{qn} + b m_{qn})}{\sum_n \exp(a c_{qn} + b m_{qn})}

    over the queries with correct and incorrect candidates, and w = b / a; 0 if match logits do not help.

    Args:
        directions: Cosines [Q, k], match logits [Q, k] and correct candidates bool [Q, k] of each direction.
    """
    log_a, b = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
    b.requires_grad_()
    optimizer = torch.optim.LBFGS([log_a, b], max_iter=100, line_search_fn="strong_wolfe")
    rows = [(c.double(), m.double(), r) for c, m, r in directions]

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for cosine, logit, correct in rows:
            usable = correct.any(1) & ~correct.all(1)
            scores = (log_a.exp() * cosine + b * logit)[usable]
            likelihood = scores.masked_fill(~correct[usable], -torch.inf).logsumexp(1) - scores.logsumexp(1)
            total, count = total - likelihood.sum(), count + len(scores)
        mean = total / max(count, 1) + 1e-6 * (log_a.square() + b.square())  # finite on separable data
        mean.backward()
        return mean

    optimizer.step(loss)
    weight = (b / log_a.exp()).item()
    return max(weight, 0.0) if math.isfinite(weight) else 0.0


def fuse_scores(model: "SpeechImageModel", similarity: Tensor, logits: Tensor, evaluation: config.Evaluation) -> Tensor:
    """Combine cosines [M] and match logits [M] of pairs into scores [M].

    Raises:
        UserError: `fuse` is fitted, and the model's weight is not.
    """
    if evaluation.fuse == "matching":
        return logits
    if evaluation.fuse == "sum":
        return similarity + logits
    weight = model.config.match_weight
    if weight is None:
        raise UserError(
            "this model has no fitted weight of the match logit: evaluate with --evaluation.fuse sum or matching"
        )
    return similarity + weight * logits


def score_pairs(
    model: "SpeechImageModel", encodings: Encodings, pairs: Tensor, evaluation: config.Evaluation, process: ProcessInfo
) -> Tensor:
    """Score pairs int64 [M, 2] of caption and picture by `evaluation.fuse`: float32 [M] on the CPU."""
    logits = match_pairs(model, encodings, pairs, process)
    return fuse_scores(model, cosines(encodings, pairs).cpu(), logits, evaluation)


def match_pairs(model: "SpeechImageModel", encodings: Encodings, pairs: Tensor, process: ProcessInfo) -> Tensor:
    """Compute match logits of pairs, each on the rank that has the caption's tokens.

    Every rank makes the same number of model calls, as ZeRO-3 requires.

    Args:
        model: In evaluation mode.
        encodings: With tokens.
        pairs: Int64 [M, 2], positions of caption and picture; the same on all ranks.
        process: This process.

    Returns:
        Float32 [M] on the CPU, the same on all ranks.
    """
    tokens, device, ranks = encodings.tokens, encodings.images.device, process.world_size
    if tokens is None:
        raise ValueError("the encodings were made without tokens")
    batches = _split_into_calls(tokens.batch[pairs[:, 0]], tokens.sizes)
    own = [(number // ranks, rows) for number, rows in batches if number % ranks == process.rank]
    calls = torch.bincount(torch.tensor([number % ranks for number, _ in batches])).max()
    scores = torch.zeros(len(pairs), device=device)
    for call in progress_range(int(calls), "batches", "matching", process.show_progress):
        if call < len(own):
            number, rows = own[call]
            logits = _match(model, encodings, number, tokens.place[pairs[rows, 0]], pairs[rows, 1])
            scores[rows.to(device)] = logits
        else:  # a dummy call: this rank has no pairs left
            _match(model, encodings, 0, *torch.zeros(2, 1, dtype=torch.int64))
    return all_reduce_sum(scores, ranks).cpu()


def cosines(encodings: Encodings, pairs: Tensor) -> Tensor:
    """Compute cosines of pairs int64 [M, 2] of caption and picture: float32 [M], on the device."""
    captions, pictures = pairs.to(encodings.images.device).T
    return (encodings.speech[captions] * encodings.images[pictures]).sum(dim=1)


def _split_into_calls(batch: Tensor, sizes: list[int]) -> list[tuple[int, Tensor]]:
    """Group pairs by speech batch, in chunks of at most that batch's size; the same for any world size."""
    order = batch.argsort(stable=True)
    groups = order.split(batch.bincount().tolist())
    return [(number, rows) for number, group in enumerate(groups) if len(group) for rows in group.split(sizes[number])]


def _match(model: "SpeechImageModel", encodings: Encodings, number: int, places: Tensor, pictures: Tensor) -> Tensor:
    """Compute match logits [M] of captions (rows `places` of this rank's batch `number`) and pictures, int64 [M]."""
    assert encodings.tokens is not None
    device = encodings.images.device
    speech = encodings.tokens.speech[number][places]
    patches = encodings.tokens.images[pictures].to(device)
    patch_mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=device)
    speech_input = Encoded(speech.embedding.to(device), speech.tokens.to(device), speech.mask.to(device))
    image_input = Encoded(encodings.images[pictures.to(device)], patches, patch_mask)
    return model.match(speech_input, image_input)[:, 1].float()
