"""Minimal pairs: two pictures that differ in one swap, one of which a caption describes.

The captions of both pictures contain the same words in different places ("a red circle above a blue star" / "a blue
circle above a red star"), so the choice between the pictures measures fine-grained alignment; chance is 50 %. Every
caption of both pictures is one question. In the manifest, the second picture is the twin of the first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest

SPLIT = "twins"


@dataclass
class Questions:
    """N captions, each with its picture and the other picture of the minimal pair, as positions in the encodings."""

    captions: Tensor  # int64 [N]
    correct: Tensor  # int64 [N], the picture that the caption describes
    wrong: Tensor  # int64 [N], the other picture
    kinds: list[str]  # [N], what was swapped; "" if the image id does not contain it


def find_minimal_pairs(manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Return the numbers of the samples' twins, int64; empty if the shards have no split `twins`."""
    if SPLIT not in manifest.splits:
        return np.zeros(0, dtype=np.int64)
    rows = manifest.rows(SPLIT)
    return rows[np.isin(manifest.twin[rows], samples)]


def make_questions(manifest: Manifest, samples: np.ndarray, caption_picture: Tensor) -> Questions:
    """Build the questions of all minimal pairs among the encoded samples.

    Args:
        manifest: The shards.
        samples: Int64 [P], the encoded samples, with their twins.
        caption_picture: Int64 [C], ascending: position of each caption's picture.
    """
    position = {int(sample): index for index, sample in enumerate(samples)}
    first = torch.searchsorted(caption_picture, torch.arange(len(samples) + 1)).tolist()
    captions: list[int] = []
    correct: list[int] = []
    wrong: list[int] = []
    kinds: list[str] = []
    for twin, sample in enumerate(samples):
        original = position.get(int(manifest.twin[sample]))
        if original is None:
            continue
        kind = swap_kind(manifest.image_id[sample].decode(), manifest.image_id[samples[original]].decode())
        for described, other in ((original, twin), (twin, original)):
            rows = range(first[described], first[described + 1])
            captions += rows
            correct += [described] * len(rows)
            wrong += [other] * len(rows)
            kinds += [kind] * len(rows)
    return Questions(torch.tensor(captions), torch.tensor(correct), torch.tensor(wrong), kinds)


def swap_kind(twin: str, original: str) -> str:
    """Return what was swapped: KIND if the twin's image id is ORIGINAL-KIND, else ""."""
    match = re.fullmatch(re.escape(original) + "-([a-z]+)", twin)
    return match[1] if match else ""


def accuracy(questions: Questions, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Accuracy in percent, over all questions and for each kind of swap; a tie counts half.

    Args:
        questions: The questions.
        score: Maps pairs int64 [M, 2], positions of caption and picture, to scores float [M].

    Returns:
        The accuracy over all questions under "", and those of the kinds under their names.
    """
    count = len(questions.captions)
    both = torch.cat([questions.correct, questions.wrong])
    correct, wrong = score(torch.stack([questions.captions.repeat(2), both], dim=1)).split(count)
    points_of_all = ((correct > wrong).double() + 0.5 * (correct == wrong).double()).tolist()
    groups: dict[str, list[float]] = {"": points_of_all}
    for kind, point in sorted(zip(questions.kinds, points_of_all, strict=True)):
        if kind:
            groups.setdefault(kind, []).append(point)
    return {kind: round(100 * sum(points) / len(points), 3) for kind, points in groups.items()}
