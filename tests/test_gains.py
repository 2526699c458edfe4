"""The permutation test of `tests/benchmarks/gains.py`."""

from itertools import product

import numpy as np
import pytest

from tests.benchmarks.gains import gain


def test_p_equals_that_of_the_exact_test():
    chance = np.random.default_rng(0)
    ours, theirs = chance.normal(0.3, 1, (2, 3, 12))
    result = gain("", list(ours), list(theirs), 0.0)
    by_picture = (ours - theirs).mean(0)
    sums = [abs(np.dot(signs, by_picture)) for signs in product((-1, 1), repeat=12)]
    assert result.p == pytest.approx(np.mean(np.array(sums) >= abs(by_picture.sum()) - 1e-9), abs=0.01)
    assert result.difference == pytest.approx((ours - theirs).sum(1).mean())
    assert result.deviation == pytest.approx((ours - theirs).sum(1).std(ddof=1))


def test_p_is_rarely_small_without_a_gain_and_always_with_one():
    chance = np.random.default_rng(1)
    small = [gain("", [chance.normal(size=200)], [chance.normal(size=200)], 0.0).p < 0.05 for _ in range(100)]
    assert sum(small) <= 12  # 5 are expected, and more than 12 have a probability of 0.001
    base = chance.normal(size=200)
    assert gain("", [base + 0.5 + chance.normal(size=200)], [base], 0.0).p < 0.001
    assert not gain("", [base], [base], 0.0).holds
