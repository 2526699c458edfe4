"""Evaluation of a split: encoding, coarse recall, re-ranked recall, accuracy on minimal pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest
from toolkit.config.schema import Config, Evaluation, Fuse
from toolkit.evaluation import minimal_pairs
from toolkit.evaluation.encode import Encodings, ProcessInfo, encode
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import Ranking, summarize_recall
from toolkit.evaluation.rerank import ScoredCandidates, cosines, score_candidates, score_pairs

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_MIN_CANDIDATES = 10  # kept per query


@dataclass
class Retrieval:
    """Rankings and metrics of P pictures and C captions."""

    report: dict[str, Any]  # contents of recall.json
    samples: np.ndarray  # int64 [P], sample numbers
    captions: np.ndarray  # int64 [C], caption rows of the manifest
    caption_picture: Tensor  # int64 [C], position of each caption's picture
    queries: Tensor  # int64 [Q], positions of the pictures that have captions
    speech_to_image: Ranking  # C queries; candidates are positions of pictures
    image_to_speech: Ranking  # Q queries; candidates are positions of captions
    coarse: tuple[Ranking, Ranking] | None = None  # both directions before re-ranking; None: not re-ranked


def retrieve(
    model: "SpeechImageModel",
    manifest: Manifest,
    split: str,
    config: Config,
    rerank: int,
    process: ProcessInfo,
    fit: bool = False,
) -> Retrieval:
    """Measure recall on a split; called on every rank, with the same result on all.

    Args:
        model: On the device; its training mode is restored afterwards.
        manifest: The shards.
        split: Name of the split. Minimal pairs are evaluated with the split that holds the original pictures.
        config: Sections `data` and `evaluation` are used.
        rerank: Candidates per query that are re-ranked; 0: coarse recall only.
        process: This process.
        fit: Fit the weight of the match logit on this split, and set it in the model's configuration.

    Returns:
        The rankings, and a report with figures in percent and None for what was not measured:
        {"split", "pictures", "captions", "max_seconds",
        "coarse": {"speech_to_image": {"R@1", "R@5", "R@10"}, "image_to_speech": the same, "mean_R@1"},
        "reranked": as coarse, with "k", "fuse", "match_weight" and "seconds_per_query" of one rank,
        "twins" (minimal pairs): {"coarse", "matching" (by the fused score), "questions",
        "kinds": {kind: {"coarse", "matching"}}}}.

    Raises:
        UserError: The split does not exist, or a sample cannot be read.
    """
    return retrieve_each(model, manifest, split, config, rerank, process, [config.evaluation.fuse], fit)[0]


@torch.no_grad()
def retrieve_each(
    model: "SpeechImageModel",
    manifest: Manifest,
    split: str,
    config: Config,
    rerank: int,
    process: ProcessInfo,
    fuses: Sequence[Fuse],
    fit: bool = False,
) -> list[Retrieval]:
    """Measure recall on a split with several scores for re-ranking, of which encodings and match logits are the same.

    Args:
        model, manifest, split, config, rerank, process, fit: As of `retrieve`; `evaluation.fuse` is not used.
        fuses: Values of `evaluation.fuse`.

    Returns:
        What `retrieve` returns, for each of `fuses`.

    Raises:
        UserError: The split does not exist, or a sample cannot be read.
    """
    training = model.training
    model.eval()
    samples = manifest.rows(split)
    with_twins = np.concatenate([samples, minimal_pairs.find_minimal_pairs(manifest, samples)])
    encodings = encode(model, manifest, with_twins, config, process, keep_tokens=rerank > 0)
    coarse = rank_coarse(encodings, len(samples), split, config.evaluation.max_seconds, rerank, process)
    scored = None
    if rerank:
        both = coarse.speech_to_image, coarse.image_to_speech
        scored = score_candidates(model, encodings, *both, coarse.queries, rerank, process)
        if fit:
            model.config.match_weight = scored.fit_weight()
    retrievals = []
    for fuse in fuses:
        evaluation = replace(config.evaluation, fuse=fuse)
        retrieval = _rerank(coarse, model, scored, rerank, evaluation) if scored else coarse
        if len(with_twins) > len(samples):
            twins = _minimal_pairs(manifest, model, encodings, rerank > 0, evaluation, process)
            retrieval = replace(retrieval, report=retrieval.report | {"twins": twins})
        retrievals.append(retrieval)
    model.train(training)
    return retrievals


def rank_coarse(
    encodings: Encodings, count: int, split: str, max_seconds: float, k: int, process: ProcessInfo
) -> Retrieval:
    """Rank by the embeddings among the first `count` pictures; the twins after them are left out."""
    captions = int((encodings.caption_picture < count).sum())
    images, speech = encodings.images[:count], encodings.speech[:captions]
    caption_picture = encodings.caption_picture[:captions]
    queries = caption_picture.unique()
    speech_to_image, image_to_speech = rank_both(
        speech, images, caption_picture, max(k, _MIN_CANDIDATES), process.rank, process.world_size
    )
    size = {"pictures": count, "captions": captions, "max_seconds": max_seconds}
    recall = summarize_recall(speech_to_image, image_to_speech)
    report = {"split": split, **size, "coarse": recall, "reranked": None, "twins": None}
    rows = encodings.samples[:count], encodings.captions[:captions]
    return Retrieval(report, *rows, caption_picture, queries, speech_to_image, image_to_speech)


def _rerank(
    coarse: Retrieval, model: "SpeechImageModel", scored: ScoredCandidates, k: int, evaluation: Evaluation
) -> Retrieval:
    before = coarse.speech_to_image, coarse.image_to_speech
    both = scored.reorder(model, *before, evaluation)
    weight = {"match_weight": model.config.match_weight} if evaluation.fuse == "fitted" else {}
    details = {"k": k, "fuse": evaluation.fuse, **weight, "seconds_per_query": round(scored.seconds, 6)}
    report = coarse.report | {"reranked": summarize_recall(*both) | details}
    return replace(coarse, report=report, speech_to_image=both[0], image_to_speech=both[1], coarse=before)


def _minimal_pairs(
    manifest: Manifest,
    model: "SpeechImageModel",
    encodings: Encodings,
    match: bool,
    evaluation: Evaluation,
    process: ProcessInfo,
) -> dict[str, Any]:
    questions = minimal_pairs.make_questions(manifest, encodings.samples, encodings.caption_picture)
    coarse = minimal_pairs.accuracy(questions, lambda pairs: cosines(encodings, pairs).cpu())
    reranked: dict[str, float] = {}
    if match:
        reranked = minimal_pairs.accuracy(
            questions, lambda pairs: score_pairs(model, encodings, pairs, evaluation, process)
        )
    # The key is "matching" whatever the score: it is stored in results of earlier versions too.
    kinds = {kind: {"coarse": coarse[kind], "matching": reranked.get(kind)} for kind in coarse if kind}
    overall = {"coarse": coarse[""], "matching": reranked.get("")}
    return {**overall, "questions": len(questions.captions), "kinds": kinds}
