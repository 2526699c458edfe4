"""The permutation test behind the figures of `tests/benchmarks/gains.py`."""

from itertools import product

import numpy as np
import pytest

from tests.benchmarks.gains import gain


def test_p_is_that_of_all_signs():
    chance = np.random.default_rng(0)
    ours, theirs = chance.normal(0.3, 1, (2, 3, 12))
    found = gain("", list(ours), list(theirs), 0.0)
    by_picture = (ours - theirs).mean(0)
    sums = [abs(np.dot(signs, by_picture)) for signs in product((-1, 1), repeat=12)]
    assert found.p == pytest.approx(np.mean(np.array(sums) >= abs(by_picture.sum()) - 1e-9), abs=0.01)
    assert found.difference == pytest.approx((ours - theirs).sum(1).mean())
    assert found.deviation == pytest.approx((ours - theirs).sum(1).std(ddof=1))


def test_p_is_seldom_small_without_a_gain_and_always_with_one():
    chance = np.random.default_rng(1)
    small = [gain("", [chance.normal(size=200)], [chance.normal(size=200)], 0.0).p < 0.05 for _ in range(100)]
    assert sum(small) <= 12  # 5 are expected; more than 12 come in one of a thousand times
    base = chance.normal(size=200)
    assert gain("", [base + 0.5 + chance.normal(size=200)], [base], 0.0).p < 0.001
    assert not gain("", [base], [base], 0.0).holds
