"""Re-ranking: SIM's matching score reorders the best k answers of SIC, in both directions.

The new score of a candidate is, by `evaluation.fuse`,

    fitted      cosine + w * match logit, with the weight w that fits dev best; kept in the exported model
    sum         match logit + cosine of the global embeddings, without temperature (BLIP: score + topk_sim)
    matching    match logit (ALBEF: itm_head(...)[:, 1])

Only the best k change places; the rest stay behind them in SIC's order. Where equal cosines meet at the border of the
best k, position decides who is a candidate.
"""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shards.errors import UserError
from toolkit.config import schema as config
from toolkit.evaluation.encode import Encodings, ProcessInfo, progress
from toolkit.evaluation.recall import RankCounts, Ranking, all_reduce_sum, rank_of_best
from toolkit.model.outputs import Encoded

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel


def rerank(
    model: "SpeechImageModel",
    encodings: Encodings,
    speech_to_image: Ranking,
    image_to_speech: Ranking,
    queries: Tensor,
    k: int,
    evaluation: config.Evaluation,
    process: ProcessInfo,
    fit: bool = False,
) -> tuple[Ranking, Ranking, float]:
    """Reorder both directions' best k; a pair that is a candidate in both is matched once.

    Args:
        model: In evaluation mode.
        encodings: With tokens.
        speech_to_image: Captions in the order of `encodings`.
        image_to_speech: Pictures in the order of `queries`.
        queries: int64, positions of the pictures that are queries.
        k: Candidates a query.
        evaluation: `fuse` chooses the score.
        process: This process.
        fit: Fit the weight of the match logit to these answers first, into the model's configuration.

    Returns:
        Both directions reordered, and the seconds that one rank takes for one query.
    """
    started = time.monotonic()
    pictures, captions = speech_to_image.candidates[:, :k], image_to_speech.candidates[:, :k]
    # One number a pair: caption * P + picture.
    size = len(encodings.images)
    forward = torch.arange(len(pictures))[:, None] * size + pictures
    backward = captions * size + queries[:, None]
    numbers = torch.unique(torch.cat([forward.flatten(), backward.flatten()]))
    pairs = torch.stack([numbers // size, numbers % size], dim=1)
    logits, similarity = match_pairs(model, encodings, pairs, process), cosines(encodings, pairs).cpu()
    places = [torch.searchsorted(numbers, wanted) for wanted in (forward, backward)]
    owner = encodings.picture
    right = [owner[: len(pictures), None] == pictures, queries[:, None] == owner[captions]]
    if fit:
        model.config.match_weight = fit_weight(
            [(similarity[p], logits[p], r) for p, r in zip(places, right, strict=True)]
        )
    scores = join(model, similarity, logits, evaluation)

    spoken = reorder(speech_to_image, scores[places[0]], right[0])
    shown = reorder(image_to_speech, scores[places[1]], right[1])
    seconds = (time.monotonic() - started) * process.world_size / (len(forward) + len(backward))
    return spoken, shown, seconds


def reorder(ranking: Ranking, scores: Tensor, right: Tensor) -> Ranking:
    """Put the best k candidates in the order of new scores.

    Args:
        ranking: The old order, Q queries.
        scores: [Q, k], the first k candidates' new scores.
        right: bool [Q, k], which of them are right answers.
    """
    old, k = ranking.rank_counts, scores.shape[1]
    inside = right.any(dim=1)
    new = rank_of_best(scores, right | ~inside[:, None])  # a row without right answers is not used, but has to have one
    ahead = old.ahead.clamp(min=k)  # outside, all k are ahead, even those of the same old score
    rank_counts = RankCounts(
        torch.where(inside, new.ahead, ahead),
        torch.where(inside, new.tied, (old.ahead + old.tied - ahead).clamp(min=0)),
        torch.where(inside, new.right, old.right),
    )
    order = scores.argsort(dim=1, descending=True, stable=True)
    candidates = torch.cat([ranking.candidates.gather(1, order), ranking.candidates[:, k:]], dim=1)
    return Ranking(rank_counts, candidates)


def fit_weight(directions: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    r"""The weight w of match logits m beside cosines c that fits right answers best.

    With y(q) the right answers among the candidates of query q, a and b maximise

    .. math:: \sum_q \log \frac{\sum_{n \in y(q)} \exp(a c_{qn} + b m_{qn})}{\sum_n \exp(a c_{qn} + b m_{qn})}

    over the queries with right and wrong candidates, and w = b / a; 0 where match logits are of no help.

    Args:
        directions: Cosines [Q, k], match logits [Q, k] and right answers bool [Q, k] of each direction.
    """
    log_a, b = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
    b.requires_grad_()
    optimizer = torch.optim.LBFGS([log_a, b], max_iter=100, line_search_fn="strong_wolfe")
    rows = [(c.double(), m.double(), r) for c, m, r in directions]

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for cosine, logit, right in rows:
            usable = right.any(1) & ~right.all(1)
            scores = (log_a.exp() * cosine + b * logit)[usable]
            likelihood = scores.masked_fill(~right[usable], -torch.inf).logsumexp(1) - scores.logsumexp(1)
            total, count = total - likelihood.sum(), count + len(scores)
        mean = total / max(count, 1) + 1e-6 * (log_a.square() + b.square())  # finite where all is told apart
        mean.backward()
        return mean

    optimizer.step(loss)
    weight = (b / log_a.exp()).item()
    return max(weight, 0.0) if math.isfinite(weight) else 0.0


def join(model: "SpeechImageModel", similarity: Tensor, logits: Tensor, evaluation: config.Evaluation) -> Tensor:
    """The scores [M] of pairs by their cosines and match logits [M].

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
            "this model holds no fitted weight of its match score: evaluate with --evaluation.fuse sum or matching"
        )
    return similarity + weight * logits


def score_pairs(
    model: "SpeechImageModel", encodings: Encodings, pairs: Tensor, evaluation: config.Evaluation, process: ProcessInfo
) -> Tensor:
    """Score pairs int64 [M, 2] of caption and picture as re-ranking does: float32 [M] on the CPU."""
    logits = match_pairs(model, encodings, pairs, process)
    return join(model, cosines(encodings, pairs).cpu(), logits, evaluation)


def match_pairs(model: "SpeechImageModel", encodings: Encodings, pairs: Tensor, process: ProcessInfo) -> Tensor:
    """Match logits of pairs by the fusion encoder, each on the rank that has the caption's tokens.

    Every rank makes the same number of model calls, as ZeRO-3 demands.

    Args:
        model: In evaluation mode.
        encodings: With tokens.
        pairs: int64 [M, 2], positions of caption and picture; the same on all ranks.
        process: This process.

    Returns:
        float32 [M] on the CPU, the same on all ranks.
    """
    tokens, device, ranks = encodings.tokens, encodings.images.device, process.world_size
    if tokens is None:
        raise ValueError("the encodings were made without tokens")
    batches = _cut(tokens.batch[pairs[:, 0]], tokens.sizes)
    own = [(number // ranks, rows) for number, rows in batches if number % ranks == process.rank]
    calls = torch.bincount(torch.tensor([number % ranks for number, _ in batches])).max()
    scores = torch.zeros(len(pairs), device=device)
    for call in progress("matching", int(calls), process.show_progress):
        if call < len(own):
            number, rows = own[call]
            logits = _match(model, encodings, number, tokens.place[pairs[rows, 0]], pairs[rows, 1])
            scores[rows.to(device)] = logits
        else:  # no pair is left for this rank: one that counts for nothing
            _match(model, encodings, 0, *torch.zeros(2, 1, dtype=torch.int64))
    return all_reduce_sum(scores, ranks).cpu()


def cosines(encodings: Encodings, pairs: Tensor) -> Tensor:
    """Cosines of the global embeddings: float32 [M] for pairs int64 [M, 2] of caption and picture, on the device."""
    captions, pictures = pairs.to(encodings.images.device).T
    return (encodings.speech[captions] * encodings.images[pictures]).sum(dim=1)


def _cut(batch: Tensor, sizes: list[int]) -> list[tuple[int, Tensor]]:
    """Cut pairs into calls of one speech batch and at most its size: the same cut on any number of ranks."""
    order = batch.argsort(stable=True)
    groups = order.split(batch.bincount().tolist())
    return [(number, rows) for number, group in enumerate(groups) if len(group) for rows in group.split(sizes[number])]


def _match(model: "SpeechImageModel", encodings: Encodings, number: int, places: Tensor, pictures: Tensor) -> Tensor:
    """Match logits [M] of the captions at `places` of this rank's batch `number` with the pictures, int64 [M] each."""
    assert encodings.tokens is not None
    device = encodings.images.device
    speech = encodings.tokens.speech[number][places]
    patches = encodings.tokens.images[pictures].to(device)
    seen = torch.ones(patches.shape[:2], dtype=torch.bool, device=device)
    spoken = Encoded(speech.embedding.to(device), speech.tokens.to(device), speech.mask.to(device))
    return model.match(spoken, Encoded(encodings.images[pictures.to(device)], patches, seen))[:, 1].float()
