"""Curves of a run's log: values by step, and which of them make a chart."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shards.files import read_records
from toolkit.run_folder import LOG

_MAX_STEP = 2**53  # a larger one is no step, and would not fit a float

# Title, and the keys of the curves in it with their names.
CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "sum"}),
    (
        "Objectives",
        {
            "contrastive": "SIC",
            "matching": "SIM",
            "matching_control": "SIM with another pair's tokens",
            "denoising": "CMD",
            "denoising_control": "CMD with another pair's tokens",
        },
    ),
    (
        "SIM: share of pairs classified correctly",
        {"matching_accuracy": "right tokens", "matching_control_accuracy": "another pair's tokens"},
    ),
    ("Temperature", {"temperature": "temperature"}),
    (
        "Recall on dev, %",
        {
            "dev/coarse/speech_to_image/R@1": "speech to image R@1",
            "dev/coarse/image_to_speech/R@1": "image to speech R@1",
            "dev/coarse/mean_R@10": "mean R@10",
            "dev/reranked/mean_R@1": "mean R@1 re-ranked",
        },
    ),
    ("Learning rate", {"lr": "learning rate"}),
    ("Pairs a second", {"pairs_per_second": "pairs a second"}),
    ("Model TFLOP/s a rank", {"tflops": "TFLOP/s"}),
    ("Waiting for data, share of the time", {"waiting": "waiting"}),
    ("Memory, GB", {"memory_gb": "largest rank"}),
    ("Skipped steps", {"skipped": "skipped so far"}),
)

Curve = Mapping[float, float]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log; empty if it has none."""
    try:
        return list(read_records(run / LOG))
    except OSError:
        return []


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten the numbers of a record; nested ones are named `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def curves_of(records: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """Collect finite values by key and step. Of steps that were repeated after a restart, the last values count."""
    curves: dict[str, dict[float, float]] = {}
    for record in records:
        step = record.get("step")
        if isinstance(step, int) and 0 <= step < _MAX_STEP:
            for key, value in flat(record).items():
                if abs(value) < _MAX_STEP or (isinstance(value, float) and math.isfinite(value)):
                    curves.setdefault(key, {})[step] = value
    return {key: dict(sorted(curve.items())) for key, curve in curves.items()}
