"""Run folders as training and evaluation leave them, with made-up figures."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.media.audio import SAMPLE_RATE, encode_audio
from toolkit.config.schema import Config
from toolkit.evaluation.inside.result import save_inside
from toolkit.evaluation.results import save_result
from toolkit.run_folder import to_yaml

PICTURES, CAPTIONS = 30, 2  # of the test set, and of each picture
_PROTOCOL = {"rerank": 4, "fuse": "fitted", "max_seconds": 60.0, "image_size": 32, "resize": "crop"}


def configuration(run: Path, seed: int = 0, denoising: float = 0.2) -> Config:
    config = Config(run=str(run), seed=seed)
    weight = dataclasses.replace(config.objectives.denoising, weight=denoising)
    return dataclasses.replace(config, objectives=dataclasses.replace(config.objectives, denoising=weight))


def write_run(run: Path, seed: int = 0, denoising: float = 0.2, **values: Any) -> Path:
    """Write a run with a log, a result with ranks (see `write_result`) and examples with sound."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(configuration(run, seed, denoising)))
    records: list[dict[str, Any]] = [{"event": "began", "at": 0}]
    for step in range(1, 6):
        loss = 1 / step + seed
        records.append({"step": step, "loss": loss, "contrastive": loss, "lr": 1e-4, "seconds": step * 3.0})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = write_result(run, seed, **values)
    (run / "recall.json").write_text(json.dumps(report))
    write_examples(run)
    return run


def write_result(
    run: Path, seed: int = 0, hits: float = 0.5, corpus: str = "scenes", data: str = "a" * 64, **more: Any
) -> dict[str, Any]:
    """Write a result in which a query has rank 1 with probability `hits`, re-ranked with 0.1 more."""
    chance = np.random.default_rng(seed)
    owner = np.repeat(np.arange(PICTURES), CAPTIONS)
    columns = {
        "image_id": np.array([f"image{n}" for n in range(PICTURES)], dtype="S"),
        "caption_picture": owner.astype(np.int32),
        "caption_number": np.tile(np.arange(CAPTIONS), PICTURES).astype(np.int32),
        "query_picture": np.arange(PICTURES, dtype=np.int32),
    }
    report: dict[str, Any] = {}
    for stage, share in (("coarse", hits), ("reranked", hits + 0.1)):
        recall: dict[str, Any] = {}
        for direction, count in (("speech_to_image", len(owner)), ("image_to_speech", PICTURES)):
            ahead = np.where(chance.random(count) < share, 0, 7).astype(np.int32)
            prefix = f"{stage}.{direction}."
            columns |= {f"{prefix}ahead": ahead, f"{prefix}tied": 0 * ahead, f"{prefix}right": 0 * ahead + 1}
            recall[direction] = {"R@1": 100 * float((ahead == 0).mean()), "R@5": 100.0, "R@10": 100.0}
        mean = (recall["speech_to_image"]["R@1"] + recall["image_to_speech"]["R@1"]) / 2
        report[stage] = recall | {"mean_R@1": mean}
    report["reranked"]["k"] = 4
    sizes = {"pictures": PICTURES, "captions": len(owner), "twins": None}
    identity = {"run": str(run), "corpus": corpus, "split": "test", "manifest": data, "checkpoint": "best", "step": 5}
    report |= sizes | identity | {"protocol": _PROTOCOL, "time": 1.0, "shards": "data"} | more
    save_result(run / "results", report, columns)
    return report


def write_baseline(run: Path, **more: Any) -> None:
    """Write a result of `analyze.py text`."""
    baseline = {"text": "asr-tiny", "clip": "/models/some-clip", "word_error_rate": 12.34}
    write_result(run, 7, **{"checkpoint": "asr-tiny-some-clip", "step": None, "baseline": baseline} | more)


def write_inside(run: Path, **more: Any) -> None:
    """Write a result of `analyze.py inside`, without its page."""
    curve = {name: [0.5, 0.75] for name in ("noised", "right", "other", "none")} | {"ratio": [0.0, 1.0]}
    identity = {"run": str(run), "shards": "data", "corpus": "scenes", "split": "test", "manifest": "a" * 64}
    identity |= {"checkpoint": "best", "step": 5, "model": "c" * 64, "protocol": _PROTOCOL, "pictures": PICTURES}
    values: dict[str, Any] = {
        "captions": PICTURES * CAPTIONS,
        "gap": {"centroids": 0.625, "right": 0.25, "wrong": 0.125},
        "similarity": {"edges": [-1.0, 0.0, 1.0], "right": [1.0, 3.0], "wrong": [9.0, 2.0]},
        "ranks": {"speech_to_image": {"edges": [1, 2, 6], "counts": [40, 20]}},
        "hardest": {},
        "attention": {"reason": "none"},
        "denoising": {"image": {"loss": "cosine", **curve}},
    }
    save_inside(run / "inside/one", identity | values | more, {})


def write_examples(run: Path, **query: Any) -> None:
    """Write examples of the final evaluation: a query with a tone and two pictures."""
    tone = np.sin(np.arange(SAMPLE_RATE) * 0.2).astype(np.float32) / 2
    audio = "data:audio/ogg;base64," + base64.b64encode(encode_audio(tone, "opus")).decode()
    answers = [{"right": n == 1, "picture": _jpeg(n)} for n in range(2)]
    queries = [{"text": "a red cross", "rank": 2, "audio": audio, "answers": answers} | query]
    content = {"split": "test", "reranked": True, "queries": queries}
    (run / "examples-final.json").write_text(json.dumps(content))
    Image.new("RGB", (40, 30), (90, 20, 20)).save(run / "retrieved.png")


def _jpeg(shade: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (100 * shade, 30, 60)).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
