"""Evaluation of a split: encoding, coarse recall, re-ranked recall, accuracy on minimal pairs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest
from toolkit.config.schema import Config
from toolkit.evaluation import minimal_pairs
from toolkit.evaluation.encode import Encodings, ProcessInfo, encode
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import Ranking, summarize_recall
from toolkit.evaluation.rerank import cosines, score_pairs
from toolkit.evaluation.rerank import rerank as rerank_both

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_MIN_CANDIDATES = 10  # kept per query


@dataclass
class Retrieval:
    """Rankings and metrics of P pictures and C captions."""

    report: dict[str, Any]  # contents of recall.json
    samples: np.ndarray  # int64 [P], sample numbers
    captions: np.ndarray  # int64 [C], caption rows of the manifest
    picture: Tensor  # int64 [C], position of each caption's picture
    queries: Tensor  # int64 [Q], positions of the pictures that have captions
    speech_to_image: Ranking  # C queries; candidates are positions of pictures
    image_to_speech: Ranking  # Q queries; candidates are positions of captions


@torch.no_grad()
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
    training = model.training
    model.eval()
    samples = manifest.rows(split)
    with_twins = np.concatenate([samples, minimal_pairs.find_minimal_pairs(manifest, samples)])
    encodings = encode(model, manifest, with_twins, config, process, keep_tokens=rerank > 0)
    retrieval = _coarse(encodings, len(samples), max(rerank, _MIN_CANDIDATES), process)
    size = {"pictures": len(retrieval.samples), "captions": len(retrieval.captions)}
    retrieval.report = {"split": split, **size, "max_seconds": config.evaluation.max_seconds, **retrieval.report}
    if rerank:
        _rerank(retrieval, model, encodings, rerank, config, process, fit)
    if len(with_twins) > len(samples):
        retrieval.report["twins"] = _minimal_pairs(manifest, model, encodings, rerank > 0, config, process)
    model.train(training)
    return retrieval


def _coarse(encodings: Encodings, count: int, k: int, process: ProcessInfo) -> Retrieval:
    """Rank by the embeddings among the first `count` pictures; the twins after them are left out."""
    captions = int((encodings.picture < count).sum())
    images, speech = encodings.images[:count], encodings.speech[:captions]
    owner = encodings.picture[:captions]
    queries = owner.unique()
    speech_to_image, image_to_speech = rank_both(speech, images, owner, k, process.rank, process.world_size)
    report = {"coarse": summarize_recall(speech_to_image, image_to_speech), "reranked": None, "twins": None}
    rows = encodings.samples[:count], encodings.captions[:captions]
    return Retrieval(report, *rows, owner, queries, speech_to_image, image_to_speech)


def _rerank(
    retrieval: Retrieval,
    model: "SpeechImageModel",
    encodings: Encodings,
    k: int,
    config: Config,
    process: ProcessInfo,
    fit: bool,
) -> None:
    coarse = retrieval.speech_to_image, retrieval.image_to_speech
    *both, seconds = rerank_both(model, encodings, *coarse, retrieval.queries, k, config.evaluation, process, fit)
    retrieval.speech_to_image, retrieval.image_to_speech = both
    fuse = config.evaluation.fuse
    weight = {"match_weight": model.config.match_weight} if fuse == "fitted" else {}
    details = {"k": k, "fuse": fuse, **weight, "seconds_per_query": round(seconds, 6)}
    retrieval.report["reranked"] = summarize_recall(*both) | details


def _minimal_pairs(
    manifest: Manifest,
    model: "SpeechImageModel",
    encodings: Encodings,
    match: bool,
    config: Config,
    process: ProcessInfo,
) -> dict[str, Any]:
    questions = minimal_pairs.make_questions(manifest, encodings.samples, encodings.picture)
    coarse = minimal_pairs.accuracy(questions, lambda pairs: cosines(encodings, pairs).cpu())
    matching: dict[str, float] = {}
    if match:
        matching = minimal_pairs.accuracy(
            questions, lambda pairs: score_pairs(model, encodings, pairs, config.evaluation, process)
        )
    kinds = {kind: {"coarse": coarse[kind], "matching": matching.get(kind)} for kind in coarse if kind}
    overall = {"coarse": coarse[""], "matching": matching.get("")}
    return {**overall, "questions": len(questions.captions), "kinds": kinds}
