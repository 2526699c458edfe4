"""Minimal pairs: the questions, and the accuracy against loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toolkit.evaluation.minimal_pairs import accuracy, find_minimal_pairs, make_questions, swap_kind


def shards():
    """Train 0-1, test 2-4, twins 5-7: 5 and 6 of picture 3, 7 of picture 2; picture 1 is the twin of 0 in training."""
    split = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    splits = ("train", "test", "twins")
    return SimpleNamespace(
        splits=splits,
        rows=lambda name: np.flatnonzero(split == splits.index(name)),
        twin=np.array([-1, 0, -1, -1, -1, 3, 3, 2]),
        image_id=np.array([b"a", b"a-colour", b"x", b"y", b"z", b"y-colour", b"y-relation", b"other"]),
    )


def questions():
    """Questions on the test split and its twins, with 2, 1, 3, 1, 1, 2 captions."""
    samples = np.array([2, 3, 4, 5, 6, 7])
    picture = torch.repeat_interleave(torch.arange(6), torch.tensor([2, 1, 3, 1, 1, 2]))
    return make_questions(shards(), samples, picture)


def test_twins_are_those_of_the_given_samples():
    manifest = shards()
    assert find_minimal_pairs(manifest, manifest.rows("test")).tolist() == [5, 6, 7]
    assert find_minimal_pairs(manifest, np.array([2])).tolist() == [7]
    assert find_minimal_pairs(manifest, manifest.rows("train")).tolist() == []
    manifest.splits = ("train", "test")
    assert find_minimal_pairs(manifest, np.array([2, 3])).tolist() == []


def test_every_caption_of_both_pictures_is_a_question():
    pairs = questions()
    rows = list(zip(pairs.captions.tolist(), pairs.correct.tolist(), pairs.wrong.tolist(), pairs.kinds, strict=True))
    assert rows == [
        (2, 1, 3, "colour"), (6, 3, 1, "colour"),
        (2, 1, 4, "relation"), (7, 4, 1, "relation"),
        (0, 0, 5, ""), (1, 0, 5, ""), (8, 5, 0, ""), (9, 5, 0, ""),
    ]  # fmt: skip


def test_accuracy_equals_loops_and_a_tie_counts_half():
    pairs = questions()
    scores = torch.randint(0, 3, (10, 6), generator=torch.Generator().manual_seed(0)).float()
    won: dict[str, list[float]] = {"": []}
    for caption, right, wrong, kind in zip(pairs.captions, pairs.correct, pairs.wrong, pairs.kinds, strict=True):
        point = 1.0 if scores[caption, right] > scores[caption, wrong] else 0.0
        point = 0.5 if scores[caption, right] == scores[caption, wrong] else point
        won[""].append(point)
        if kind:
            won.setdefault(kind, []).append(point)
    expected = {kind: pytest.approx(100 * sum(points) / len(points), abs=1e-3) for kind, points in won.items()}
    assert accuracy(pairs, lambda rows: scores[rows[:, 0], rows[:, 1]]) == expected
    assert 0.5 in won[""], "the scores should contain ties"


def test_a_constant_score_gets_half_and_nan_gets_nothing():
    pairs = questions()
    assert accuracy(pairs, lambda rows: torch.ones(len(rows)))[""] == 50.0
    assert accuracy(pairs, lambda rows: torch.full((len(rows),), torch.nan))[""] == 0.0


@pytest.mark.parametrize(
    ("twin", "original", "kind"),
    [("t7-colour", "t7", "colour"), ("t7-relation", "t7", "relation"), ("t8-colour", "t7", ""), ("t7-2", "t7", "")],
)
def test_the_kind_is_the_suffix_of_the_image_id(twin, original, kind):
    assert swap_kind(twin, original) == kind
