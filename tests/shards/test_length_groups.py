"""Groups of like length against all ways to cut a sorted batch."""

from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.length_groups import group_by_length, padded_length


def best_by_trial(lengths: list[int], groups: int) -> int:
    """The least padded length, by trying all cuts."""
    ordered = sorted(lengths)
    cuts = ((0, *inner, len(ordered)) for inner in combinations(range(1, len(ordered)), groups - 1))
    return min(sum((b - a) * ordered[b - 1] for a, b in pairwise(c)) for c in cuts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 10))
def test_no_other_cut_pads_less(lengths: list[int], groups: int) -> None:
    grouped = group_by_length(lengths, groups)

    assert sorted(np.concatenate(grouped).tolist()) == list(range(len(lengths))), "every utterance once"
    of_groups = [[lengths[row] for row in rows] for rows in grouped]
    assert list(chain(*of_groups)) == sorted(lengths)
    padded = sum(len(group) * group[-1] for group in of_groups)
    assert padded == best_by_trial(lengths, len(grouped)) == padded_length(lengths, groups)


@pytest.mark.parametrize("count", [1, 2, 5, 700])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_number_of_groups_is_that_of_every_rank(count: int, groups: int) -> None:
    """Whatever the lengths: ranks with another number would wait for one another's collectives under ZeRO 3."""
    chance = np.random.default_rng(0)
    for lengths in (np.full(count, 5.0), np.zeros(count), chance.integers(1, 3, count), chance.lognormal(1, 1, count)):
        grouped = group_by_length(lengths, groups)
        assert len(grouped) == min(groups, count)
        assert all(len(rows) for rows in grouped)


def test_a_large_batch_is_cut_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).lognormal(1.4, 0.4, 1500)
    coarse = padded_length(lengths, 5)
    monkeypatch.setattr("shards.length_groups._MAX_EDGES", 10_000)
    assert padded_length(lengths, 5) <= coarse < 1.005 * padded_length(lengths, 5)
