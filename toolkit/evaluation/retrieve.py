"""One evaluation: encode a split, coarse recall, re-ranked recall, twins."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest
from toolkit.config.schema import Config
from toolkit.evaluation import minimal_pairs
from toolkit.evaluation.encode import Encodings, ProcessInfo, encode
from toolkit.evaluation.recall import Ranking, rank_answers, summarize_recall
from toolkit.evaluation.rerank import cosines, score_pairs
from toolkit.evaluation.rerank import rerank as rerank_both

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_KEPT = 10  # answers a query, at least


@dataclass
class Retrieval:
    """What was retrieved for P pictures and C captions, and how good that is."""

    report: dict[str, Any]  # as in recall.json
    samples: np.ndarray  # int64 [P], sample numbers
    captions: np.ndarray  # int64 [C], caption rows
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
    """Measure recall of a split; every rank calls this and gets the same.

    Args:
        model: On the device; it is in evaluation mode meanwhile.
        manifest: The shards.
        split: Name of the split. Twins are measured with the split that holds their originals.
        config: Sections data and evaluation count.
        rerank: Candidates that the fusion encoder scores for each query; 0: coarse recall only.
        process: This process's place among the ranks, and its device.
        fit: Fit the weight of the match score to this split, into the model's configuration: for dev.

    Returns:
        The rankings, and a report in per cent, with None for what was not measured:
        {"split", "pictures", "captions", "max_seconds",
        "coarse": {"speech_to_image": {"R@1", "R@5", "R@10"}, "image_to_speech": the same, "mean_R@1"},
        "reranked": as coarse, with "k", "fuse", "match_weight" and "seconds_per_query" of one rank,
        "twins": {"coarse", "matching" (by the score that re-ranks), "questions", "kinds": {kind: {"coarse",
        "matching"}}}}.

    Raises:
        UserError: There is no such split, or a sample cannot be read.
    """
    training = model.training
    model.eval()
    samples = manifest.rows(split)
    everything = np.concatenate([samples, minimal_pairs.find_minimal_pairs(manifest, samples)])
    encodings = encode(model, manifest, everything, config, process, keep_tokens=rerank > 0)
    found = _coarse(encodings, len(samples), max(rerank, _KEPT), process)
    size = {"pictures": len(found.samples), "captions": len(found.captions)}
    found.report = {"split": split, **size, "max_seconds": config.evaluation.max_seconds, **found.report}
    if rerank:
        _rerank(found, model, encodings, rerank, config, process, fit)
    if len(everything) > len(samples):
        found.report["twins"] = _twins(manifest, model, encodings, rerank > 0, config, process)
    model.train(training)
    return found


def _coarse(encodings: Encodings, count: int, k: int, process: ProcessInfo) -> Retrieval:
    """Rank by the global embeddings among the first `count` pictures; those behind them are twins."""
    captions = int((encodings.picture < count).sum())
    images, speech = encodings.images[:count], encodings.speech[:captions]
    owner = encodings.picture[:captions]
    queries = owner.unique()
    ids, query_ids = owner.to(process.device), queries.to(process.device)
    place = process.rank, process.world_size
    speech_to_image = rank_answers(speech, ids, images, torch.arange(count, device=process.device), k, *place)
    image_to_speech = rank_answers(images[query_ids], query_ids, speech, ids, k, *place)
    report = {"coarse": summarize_recall(speech_to_image, image_to_speech), "reranked": None, "twins": None}
    names = encodings.samples[:count], encodings.captions[:captions]
    return Retrieval(report, *names, owner, queries, speech_to_image, image_to_speech)


def _rerank(
    found: Retrieval,
    model: "SpeechImageModel",
    encodings: Encodings,
    k: int,
    config: Config,
    process: ProcessInfo,
    fit: bool,
) -> None:
    coarse = found.speech_to_image, found.image_to_speech
    *both, seconds = rerank_both(model, encodings, *coarse, found.queries, k, config.evaluation, process, fit)
    found.speech_to_image, found.image_to_speech = both
    fuse = config.evaluation.fuse
    weight = {"match_weight": model.config.match_weight} if fuse == "fitted" else {}
    details = {"k": k, "fuse": fuse, **weight, "seconds_per_query": round(seconds, 6)}
    found.report["reranked"] = summarize_recall(*both) | details


def _twins(
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
