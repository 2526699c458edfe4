"""Kinds and levels from the command line, and random numbers of a sample."""

import numpy as np
import pytest

from shards.errors import UserError
from toolkit.evaluation.perturbations.kinds import KINDS, generator_of, parse_kinds


def test_without_words_all_kinds_have_their_levels():
    every = parse_kinds([], with_files=True)
    assert every == [(name, level) for name, kind in KINDS.items() for level in kind.levels]
    assert parse_kinds([], with_files=False) == [pair for pair in every if pair[0] != "noise"]


def test_levels_can_be_given():
    assert parse_kinds(["white=10,-5,10", "jpeg"], False) == [
        ("white", 10.0), ("white", -5.0), ("jpeg", 30), ("jpeg", 10), ("jpeg", 5),
    ]  # fmt: skip


def test_default_levels_are_within_bounds_and_not_clean():
    for kind in KINDS.values():
        assert all(kind.bounds[0] <= level <= kind.bounds[1] and level != kind.clean_level for level in kind.levels)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("whit", r"--kinds whit: no such kind of perturbation; valid are white, babble, .*, crop, occlusion"),
        ("white=loud", r"--kinds white=loud: loud is not valid; expected levels from -60 to 120 dB"),
        ("white=inf", r"inf is not valid"),
        ("speed=0", r"0 is not valid; expected levels from 0.25 to 4 x"),
        ("speed=", r"nothing is not valid"),
        ("jpeg=9.5", r"9.5 is not valid; .*a whole number"),
        ("noise", r"name a folder of audio files with --noise DIR"),
    ],
)
def test_mistakes_are_one_line(word, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_kinds([word], with_files=False)
    assert "\n" not in str(caught.value)


def test_random_numbers_depend_on_seed_kind_and_sample_alone():
    def draw(*key):
        return generator_of(*key).random(3).tolist()

    assert draw(0, "white", 5) == draw(0, "white", 5)
    drawn = [draw(*key) for key in ((0, "white", 5), (1, "white", 5), (0, "babble", 5), (0, "white", 6))]
    assert len(np.unique(drawn)) == 12
