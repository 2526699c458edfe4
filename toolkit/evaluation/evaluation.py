"""Evaluate one checkpoint on one data set: recall in both directions, its intervals, other measures, groups.

A checkpoint here is an exported model, which evaluation reads, and not the training state of RUN/checkpoints.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.manifest import Manifest
from toolkit.config.schema import Config, Fuse
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.results import DIRECTIONS, ranks_of
from toolkit.evaluation.retrieve import Retrieval, retrieve_each
from toolkit.evaluation.summaries.groups import recall_by_group
from toolkit.evaluation.summaries.measures import measure
from toolkit.evaluation.summaries.significance import intervals

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

CUT_SECONDS = 10.0  # of FaST-VGS's test on SpokenCOCO and Flickr8k


@dataclass(frozen=True)
class Checkpoint:
    """The exported model that is evaluated.

    Attributes:
        model: On the device.
        run: Run folder, or without a run the model's folder or hub id.
        name: Name of the exported model; see `checkpoint_name`.
        step: Its training step; None if it is not known.
    """

    model: "SpeechImageModel"
    run: str
    name: str
    step: int | None


@dataclass(frozen=True)
class SplitEvaluation:
    """Evaluation of a split: rankings, the contents of its JSON file, and those of its `.npz`; see `save_result`."""

    config: Config
    retrieval: Retrieval
    report: dict[str, Any]
    columns: dict[str, np.ndarray]


def checkpoint_name(export: Path, run: Path | None) -> str:
    """Name of an exported model; outside of the run's exports with a checksum of its path, as names repeat."""
    if run is not None and export.resolve().parent == (run / "export").resolve():
        return export.name
    return f"{export.resolve().name}-{hashlib.sha256(str(export.resolve()).encode()).hexdigest()[:8]}"


def evaluate_split(
    checkpoint: Checkpoint,
    manifest: Manifest,
    split: str,
    config: Config,
    rerank: int,
    process: ProcessInfo,
    groups: Mapping[str, Sequence[str]] | None = None,
    fuses: Sequence[Fuse] = (),
) -> list[SplitEvaluation]:
    """Evaluate a split; called on every rank. Intervals, measures and groups are computed on rank 0 alone.

    Args:
        checkpoint: The model.
        manifest: The shards.
        split: Name of the split.
        config: Sections `data` and `evaluation` are used.
        rerank: Candidates per query that are re-ranked; 0: none.
        process: This process.
        groups: For each attribute the group of each caption of the split.
        fuses: Scores for re-ranking; default: `evaluation.fuse`.

    Returns:
        An evaluation for each of `fuses`, or one without re-ranking; empty on other ranks than 0.

    Raises:
        UserError: The split does not exist, or a sample cannot be read.
    """
    chosen: Sequence[Fuse] = (fuses or (config.evaluation.fuse,)) if rerank else (config.evaluation.fuse,)
    retrievals = retrieve_each(checkpoint.model, manifest, split, config, rerank, process, chosen)
    if process.rank:
        return []
    evaluations = []
    for fuse, retrieval in zip(chosen, retrievals, strict=True):
        settings = replace(config, evaluation=replace(config.evaluation, fuse=fuse))
        source = {
            "shards": manifest.location,
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "run": checkpoint.run,
            "corpus": manifest.corpus,
            "manifest": manifest.hash,
            "protocol": protocol_of(settings, rerank),
            "time": round(time.time(), 3),
        }
        columns = rank_columns(retrieval, manifest)
        report = retrieval.report | source | _summaries(retrieval, columns, groups or {})
        evaluations.append(SplitEvaluation(settings, retrieval, report, columns))
    return evaluations


def protocol_of(config: Config, rerank: int) -> dict[str, Any]:
    """Settings that influence the figures."""
    return {
        "rerank": rerank,
        "fuse": config.evaluation.fuse if rerank else None,
        "max_seconds": config.evaluation.max_seconds,
        "image_size": config.data.image_size,
        "resize": config.data.resize,
    }


def rank_columns(retrieval: Retrieval, manifest: Manifest) -> dict[str, np.ndarray]:
    """Ranks of all queries, and what identifies them."""
    caption_picture = retrieval.caption_picture.numpy()
    columns = {
        "image_id": manifest.image_id[retrieval.samples],
        "caption_picture": caption_picture,
        "caption_number": retrieval.captions - manifest.first_caption[retrieval.samples[caption_picture]],
        "query_picture": retrieval.queries.numpy(),
    }
    for stage, both in _stages(retrieval).items():
        for direction, ranking in zip(DIRECTIONS, both, strict=True):
            counts = ranking.rank_counts
            for name, values in (("ahead", counts.ahead), ("tied", counts.tied), ("right", counts.correct)):
                columns[f"{stage}.{direction}.{name}"] = values.numpy()
    return {name: values if name == "image_id" else values.astype(np.int32) for name, values in columns.items()}


def _stages(retrieval: Retrieval) -> dict[str, Any]:
    last = retrieval.speech_to_image, retrieval.image_to_speech
    return {"coarse": last} if retrieval.coarse is None else {"coarse": retrieval.coarse, "reranked": last}


def _summaries(
    retrieval: Retrieval, columns: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    stages = _stages(retrieval)
    bounds = {stage: intervals({name: ranks_of(columns, name, stage) for name in DIRECTIONS}) for stage in stages}
    measures = {
        stage: {name: measure(ranking) for name, ranking in zip(DIRECTIONS, both, strict=True)}
        for stage, both in stages.items()
    }
    last = retrieval.speech_to_image, retrieval.image_to_speech
    grouped = {attribute: recall_by_group(*last, names) for attribute, names in groups.items()}
    return {"intervals": bounds, "measures": measures, "groups": grouped or None}


def audio_limits(manifest: Manifest, split: str, limit: float) -> list[float]:
    """Lengths in seconds at which protocols cut the audio, the longest first; those that cut no caption are one.

    SpeechCLIP evaluates full-length audio, FaST-VGS its first 10 s, and `limit` is this configuration's.
    """
    captions = [row for sample in manifest.rows(split) for row in manifest.captions(int(sample))]
    longest = float(manifest.duration[captions].max(initial=0.0))
    full = limit if limit >= longest else float(math.ceil(longest))
    return [full, *sorted((cut for cut in {limit, CUT_SECONDS} if cut < longest), reverse=True)]
