"""Results of the robustness suite: recall of a checkpoint with perturbed speech or perturbed images.

RUN/robustness holds a JSON file for each data set, split, checkpoint and protocol:

    {"format": 1, "run", "shards", "corpus", "split", "manifest" (SHA-256 of the shards), "checkpoint", "step", "model"
     (SHA-256 of the exported model), "protocol": {"limit", "seed", "max_seconds", "image_size", "resize"},
     "pictures", "captions", "augmentation": {kind: probability in training}, "conditions": [
        {"kind": "clean", "modality": null, "level": null, "unit": "", "files": null, "speech_to_image": {"R@1", "R@5",
         "R@10"}, "image_to_speech": the same, "mean_R@1"},
        {"kind": "white", "modality": "speech", "level": 10.0, "unit": "dB", ...}, ...]}

It is replaced atomically after each condition, so that a suite that was killed goes on where it stopped. This module
imports neither torch nor a model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shards.errors import UserError
from shards.files import atomic_write

FOLDER = "robustness"  # in a run folder
CLEAN = "clean"
FORMAT = 1


@dataclass(frozen=True)
class Condition:
    """Recall of all queries in one condition.

    Attributes:
        kind: Kind of the perturbation, or `clean`.
        modality: What is perturbed, speech or image; None: nothing.
        level: Strength of the perturbation; None: clean.
        unit: Unit of the level, such as dB.
        files: SHA-256 of the files that the perturbation uses; None: it uses none.
        speech_to_image: R@1, R@5 and R@10 in percent, of spoken captions among the pictures.
        image_to_speech: Likewise, of pictures among the spoken captions.
        mean: Mean of both R@1, in percent.
    """

    kind: str
    modality: str | None
    level: float | None
    unit: str
    files: str | None
    speech_to_image: dict[str, float]
    image_to_speech: dict[str, float]
    mean: float

    @property
    def key(self) -> tuple[str, float | None, str | None]:
        """What distinguishes a condition from the others of the same file."""
        return self.kind, self.level, self.files


@dataclass(frozen=True)
class Robustness:
    """Conditions measured with one checkpoint on one split; fields are named as the keys of the JSON.

    Attributes:
        path: The JSON file.
        run: Run folder.
        shards: Folder or URL of the shards.
        corpus: Corpus of the shards.
        split: Evaluated split.
        manifest: SHA-256 that identifies the shards.
        checkpoint: Name of the exported model, such as best.
        step: Its training step; None if it is not known.
        model: SHA-256 of the exported model.
        protocol: {"limit" (pictures; None: all of the split), "seed", "max_seconds", "image_size", "resize"}.
        pictures: Number of pictures, the candidates of the captions.
        captions: Number of captions, the candidates of the pictures.
        augmentation: Probability in training of each kind of augmentation that the run used.
        conditions: In the order of measurement; the first is clean.
    """

    path: Path
    run: str
    shards: str
    corpus: str
    split: str
    manifest: str
    checkpoint: str
    step: int | None
    model: str
    protocol: dict[str, Any]
    pictures: int
    captions: int
    augmentation: dict[str, float]
    conditions: tuple[Condition, ...]

    @property
    def clean_condition(self) -> Condition | None:
        """The condition without perturbation; None: not measured yet."""
        return next((condition for condition in self.conditions if condition.kind == CLEAN), None)


def load_robustness(run: Path) -> list[Robustness]:
    """Load all robustness results of a run, sorted by file name; empty if none was measured.

    Raises:
        UserError: The run folder does not exist, or a file is not a result of the robustness suite.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run folder")
    return [read_robustness(path) for path in sorted((run / FOLDER).glob("*.json"))]


def read_robustness(path: Path) -> Robustness:
    """Read one file of RUN/robustness.

    Raises:
        UserError: It cannot be read, or is not a result of the robustness suite.
    """
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError("it has another format")
        conditions = tuple(_condition(each) for each in values.pop("conditions"))
        return Robustness(path=path, conditions=conditions, **values)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a result of the robustness suite ({error}): move it elsewhere") from None


def _condition(values: dict[str, Any]) -> Condition:
    mean, by_speech, by_image = (values.pop(name) for name in ("mean_R@1", "speech_to_image", "image_to_speech"))
    return Condition(mean=float(mean), speech_to_image=dict(by_speech), image_to_speech=dict(by_image), **values)


def save_robustness(result: Robustness) -> None:
    """Write a result to its path.

    Raises:
        UserError: The folder cannot be written.
    """
    values = asdict(result)
    path = values.pop("path")
    for condition in values["conditions"]:
        condition["mean_R@1"] = condition.pop("mean")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps({"format": FORMAT, **values}, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}") from None


def result_name(values: Mapping[str, Any]) -> str:
    """Name of a result: data set, split, checksum, checkpoint, step, the model's checksum, protocol.

    Args:
        values: Fields of `Robustness`, by name.
    """
    p = values["protocol"]
    step = None if values["step"] is None else f"step-{values['step']}"
    limit = None if p["limit"] is None else f"limit-{p['limit']}"
    seed = f"seed-{p['seed']}" if p["seed"] else None
    preprocessing = f"{p['max_seconds']:g}s-{p['image_size']}-{p['resize']}"
    names = [quote(values[name], safe="") for name in ("corpus", "split", "checkpoint")]
    checksums = [values[name][:8] for name in ("manifest", "model")]
    parts = (*names[:2], checksums[0], names[2], step, checksums[1], limit, seed, preprocessing)
    return "-".join(part for part in parts if part)


def format_robustness(result: Robustness) -> str:
    """Format a result as a table, kind by kind, with the difference from clean."""
    step = "" if result.step is None else f" (step {result.step:,})"
    clean = result.clean_condition
    lines = [
        f"{result.corpus} {result.split}, checkpoint {result.checkpoint}{step}: {result.pictures:,} pictures, "
        f"{result.captions:,} spoken captions",
        f"training augmentation: {describe_augmentation(result.augmentation)}",
        f"{'percent':<29}{'speech to image':>23}{'image to speech':>25}{'mean':>9}{'change':>9}",
        f"{'':<29}{'R@1':>7}{'R@5':>8}{'R@10':>8}{'R@1':>9}{'R@5':>8}{'R@10':>8}{'R@1':>9}",
    ]
    for condition in by_kind(result.conditions):
        figures = [*condition.speech_to_image.values(), *condition.image_to_speech.values(), condition.mean]
        row = "".join(f"{value:>{width}.1f}" for value, width in zip(figures, (7, 8, 8, 9, 8, 8, 9), strict=True))
        level = "" if condition.level is None else f"{condition.level:g}"
        change = f"{condition.mean - clean.mean:>+9.1f}" if clean and condition is not clean else ""
        lines.append(f"{condition.kind:<15}{level:>6} {condition.unit:<7}{row}{change}")
    return "\n".join(lines)


def by_kind(conditions: Sequence[Condition]) -> list[Condition]:
    """Order conditions by kind, as the kinds were first measured, and keep the order of levels."""
    kinds = list(dict.fromkeys(condition.kind for condition in conditions))
    return sorted(conditions, key=lambda condition: kinds.index(condition.kind))


def describe_augmentation(augmentation: dict[str, float]) -> str:
    """Describe the augmentation of a run in a line."""
    return ", ".join(f"{kind} {probability:g}" for kind, probability in augmentation.items()) or "none"
