"""Twins: of two pictures that differ in one swap, which one does the caption speak of?

A twin has the words of its original in other places ("a red circle above a blue star" / "a blue circle above a red
star"), so the choice measures fine-grained alignment; chance is 50 %. Each caption of the original and of the twin is
a question.
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
    """N captions, each with the picture it speaks of and that one's twin; positions in the encodings."""

    captions: Tensor  # int64 [N]
    right: Tensor  # int64 [N]
    wrong: Tensor  # int64 [N]
    kinds: list[str]  # [N], what was swapped, or "" where the image id does not tell


def find_minimal_pairs(manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Sample numbers of the twins of the given samples, int64; none where the shards have no split `twins`."""
    if SPLIT not in manifest.splits:
        return np.zeros(0, dtype=np.int64)
    rows = manifest.rows(SPLIT)
    return rows[np.isin(manifest.twin[rows], samples)]


def make_questions(manifest: Manifest, samples: np.ndarray, picture: Tensor) -> Questions:
    """Make the questions of all pairs of twins among the encoded samples.

    Args:
        manifest: The shards.
        samples: int64 [P], the encoded samples, originals and twins.
        picture: int64 [C], ascending: position of each caption's picture.
    """
    position = {int(sample): at for at, sample in enumerate(samples)}
    first = torch.searchsorted(picture, torch.arange(len(samples) + 1)).tolist()
    captions: list[int] = []
    right: list[int] = []
    wrong: list[int] = []
    kinds: list[str] = []
    for at, sample in enumerate(samples):
        original = position.get(int(manifest.twin[sample]))
        if original is None:
            continue
        kind = swap_kind(manifest.image_id[sample].decode(), manifest.image_id[samples[original]].decode())
        for this, other in ((original, at), (at, original)):
            own = range(first[this], first[this + 1])
            captions += own
            right += [this] * len(own)
            wrong += [other] * len(own)
            kinds += [kind] * len(own)
    return Questions(torch.tensor(captions), torch.tensor(right), torch.tensor(wrong), kinds)


def swap_kind(twin: str, original: str) -> str:
    """Tell what was swapped: KIND where the twin's image id is the original's with -KIND behind it, else ""."""
    found = re.fullmatch(re.escape(original) + "-([a-z]+)", twin)
    return found[1] if found else ""


def accuracy(questions: Questions, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Share of questions answered right, in per cent, over all and for each kind; a tie counts half.

    Args:
        questions: The questions.
        score: Gives for int64 [M, 2], positions of caption and picture, float [M].

    Returns:
        The accuracy under "", and under each kind that the image ids tell.
    """
    count = len(questions.captions)
    both = torch.cat([questions.right, questions.wrong])
    right, wrong = score(torch.stack([questions.captions.repeat(2), both], dim=1)).split(count)
    won = (right > wrong).double() + 0.5 * (right == wrong).double()
    groups: dict[str, list[float]] = {"": won.tolist()}
    for kind, point in sorted(zip(questions.kinds, won.tolist(), strict=True)):
        if kind:
            groups.setdefault(kind, []).append(point)
    return {kind: round(100 * sum(points) / len(points), 3) for kind, points in groups.items()}
