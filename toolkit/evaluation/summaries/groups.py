"""Recall by groups of captions: speaker, language, accent, duration, number of words, where the shards state them.

Speech to image: the queries are the group's captions, the candidates all pictures of the split. Image to speech: the
queries are the pictures with a caption of the group, the candidates all captions of the split, and a hit is a caption
of the group among the first k. The picture's other captions are candidates like any other and may stand before it, so
figures of this direction are lower than those of the split: compare groups with one another.

An accent is known of voices of espeak-ng alone, which speak the scenes. Where the code of a language names a region, as
`en-GB` does, the groups of languages tell accents apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.reading.caption_attributes import CaptionAttributes
from toolkit.evaluation.recall import CUTOFFS, CorrectCandidates, RankCounts, Ranking, hits_at

ATTRIBUTES = ("speaker", "language", "accent", "duration", "words")
_BINNED = ("duration", "words")
UNKNOWN = "not stated"
_BINS = 4  # of durations and numbers of words, by quantiles
_PRINTED = 20  # groups of an attribute in the printed table


def group_captions(attributes: CaptionAttributes, by: str) -> list[str]:
    """Name the group of each caption.

    Durations and numbers of words are binned by quartiles.

    Args:
        attributes: What the shards state of the captions.
        by: One of `ATTRIBUTES`.

    Raises:
        UserError: The shards do not state it of any caption, or `by` is unknown.
    """
    if by not in ATTRIBUTES:
        raise UserError(f"--by {by}: expected any of {', '.join(ATTRIBUTES)}")
    if by == "duration":
        return _bin([float(seconds) for seconds in attributes.duration], "{:.1f}", "s")
    if by == "words":
        names = _bin([len(text.split()) if text else None for text in attributes.text], "{:.0f}", "words")
    else:
        stated: list[str | None] = getattr(attributes, by)
        names = [name or UNKNOWN for name in stated]
    if all(name == UNKNOWN for name in names):
        what = "texts" if by == "words" else f"{by}s"
        why = ": only the voices of espeak-ng, which speak the scenes, name one" if by == "accent" else ""
        raise UserError(f"--by {by}: the shards state no {what} of the captions of this split{why}")
    return names


def _bin(values: Sequence[float | None], form: str, unit: str) -> list[str]:
    """Name the quantile bin of each value by the bin's smallest and largest value."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return [UNKNOWN] * len(values)
    inner = np.unique(np.quantile(known, np.arange(1, _BINS) / _BINS, method="higher"))
    numbers = np.searchsorted(inner, known, side="right")  # a value equal to an edge is in the bin above it
    bounds = {n: [form.format(end(known[numbers == n])) for end in (np.min, np.max)] for n in np.unique(numbers)}
    names = {n: " to ".join(dict.fromkeys(ends)) + f" {unit}" for n, ends in bounds.items()}
    of_known = iter(numbers.tolist())
    return [UNKNOWN if value is None else names[next(of_known)] for value in values]


def recall_by_group(speech_to_image: Ranking, image_to_speech: Ranking, groups: Sequence[str]) -> dict[str, Any]:
    """Recall of each group in both directions, in percent.

    Args:
        speech_to_image: With the ranks of all correct candidates; its queries are the captions.
        image_to_speech: Likewise; its candidates are the captions.
        groups: The group of each caption.

    Returns:
        For each group, the largest first: {"captions", "pictures", "speech_to_image": {"R@1", "R@5", "R@10"},
        "image_to_speech": the same, "mean_R@1"}.
    """
    assert image_to_speech.correct is not None
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    number, counts = torch.from_numpy(numbers), np.bincount(numbers)
    hits = {k: hits_at(speech_to_image.rank_counts, k) for k in CUTOFFS}
    report = {}
    for index in np.argsort(-counts, kind="stable").tolist():
        members = number == index
        best = _best_of_group(image_to_speech.correct, members)
        by_speech = {f"R@{k}": round(100 * hits[k][members].mean().item(), 3) for k in CUTOFFS}
        by_image = {f"R@{k}": round(100 * hits_at(best, k).mean().item(), 3) for k in CUTOFFS}
        mean = (hits[1][members].mean().item() + hits_at(best, 1).mean().item()) * 50
        sizes = {"captions": int(counts[index]), "pictures": len(best.ahead)}
        report[str(names[index])] = {
            **sizes, "speech_to_image": by_speech, "image_to_speech": by_image, "mean_R@1": round(mean, 3)
        }  # fmt: skip
    return report


def _best_of_group(correct: CorrectCandidates, members: Tensor) -> RankCounts:
    """Rank counts of the best caption of a group, for each picture that has one.

    Args:
        correct: The captions of all pictures.
        members: Bool [captions], the group.
    """
    rows = members[correct.candidate]
    queries, query = correct.query[rows].unique(return_inverse=True)
    ahead = correct.ahead[rows]
    least = torch.full((len(queries),), torch.iinfo(torch.int64).max).scatter_reduce_(0, query, ahead, "amin")
    # Correct candidates of one query with equally many candidates ahead have the same score.
    best = ahead == least[query]
    tied_correct = torch.bincount(query[best], minlength=len(queries))
    tied = torch.zeros_like(tied_correct)
    tied[query[best]] = correct.tied[rows][best]
    return RankCounts(least, (tied - tied_correct).clamp(min=0), tied_correct)


def format_groups(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the groups of each attribute as a table, bins in their order; of many groups the largest."""
    header = f"{'captions':>10}{'S>I R@1':>9}{'R@5':>7}{'R@10':>7}{'I>S R@1':>10}{'R@5':>7}{'R@10':>7}{'mean R@1':>11}"
    lines = []
    for attribute, rows in groups.items():
        printed = dict(list(rows.items())[:_PRINTED])
        if attribute in _BINNED:
            printed = dict(sorted(printed.items(), key=lambda row: (row[0] == UNKNOWN, _first_number(row[0]))))
        width = max(map(len, [attribute, *printed]))
        lines.append(f"\n{attribute:<{width}}{header}")
        for name, row in printed.items():
            figures = [*row["speech_to_image"].values(), *row["image_to_speech"].values(), row["mean_R@1"]]
            cells = zip(figures, (9, 7, 7, 10, 7, 7, 11), strict=True)
            lines.append(f"{name:<{width}}{row['captions']:>10,}" + "".join(f"{value:>{w}.1f}" for value, w in cells))
        if len(rows) > len(printed):
            lines.append(f"and {len(rows) - len(printed)} smaller groups, in the result's file")
    return "\n".join(lines).lstrip("\n")


def _first_number(name: str) -> float:
    word = name.split()[0]
    return float(word) if word.replace(".", "").isdigit() else 0.0
