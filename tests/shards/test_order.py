"""The order of samples: exactly once, the same on any cluster, no picture twice in a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order import Order, part_of


def make_order(pictures: int, captions: int, per_shard: int, batch: int, seed: int, window: int) -> Order:
    rows = np.arange(3, 3 + pictures)  # the split does not begin at sample 0
    shard = ((rows - 3) // per_shard).astype(np.int32)
    first_caption = np.arange(0, (pictures + 4) * captions, captions)
    return Order(rows, shard, first_caption, batch, seed, window)


orders = st.builds(
    make_order,
    pictures=st.integers(16, 90),
    captions=st.integers(1, 5),
    per_shard=st.integers(1, 20),
    batch=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 4))
def test_every_picture_once_a_pass(order: Order, passes: int) -> None:
    n = len(order.rows)
    steps = -(-(passes + 1) * n // order.batch_size)
    seen = np.concatenate([order.batch(t)[0] for t in range(steps)])
    for e in range(passes + 1):
        assert sorted(seen[e * n : (e + 1) * n]) == sorted(order.rows), f"pass {e} is not a permutation"


@settings(max_examples=60, deadline=None)
@given(orders)
def test_no_picture_twice_in_a_batch(order: Order) -> None:
    for t in range(4 * len(order.rows) // order.batch_size):
        samples, _, _ = order.batch(t)
        assert len(set(samples)) == order.batch_size, f"batch {t} holds a picture twice"


@settings(max_examples=40, deadline=None)
@given(orders)
def test_k_passes_use_each_caption_once(order: Order) -> None:
    captions = int(order.first_caption[1] - order.first_caption[0])
    n = len(order.rows)
    steps = -(-captions * n // order.batch_size)
    used = np.concatenate([order.batch(t)[1] for t in range(steps)])[: captions * n]
    expected = np.arange(order.first_caption[3], order.first_caption[3 + n])
    assert sorted(used) == sorted(expected)


@settings(max_examples=30, deadline=None)
@given(orders, st.integers(0, 300))
def test_seeking_equals_replaying(order: Order, step: int) -> None:
    for t in range(step):
        order.batch(t)
    fresh = Order(order.rows, order.shard, order.first_caption, order.batch_size, order.seed, order.window)
    for replayed, sought in zip(order.batch(step), fresh.batch(step), strict=True):
        np.testing.assert_array_equal(replayed, sought)


@pytest.mark.parametrize(("world", "micros"), [(1, 1), (2, 1), (1, 4), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_cover_the_batch_in_order(world: int, micros: int) -> None:
    whole = np.arange(64)
    parts = [whole[part_of(64, m, micros, r, world)] for m in range(micros) for r in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_seeds_and_passes_differ() -> None:
    a, b = make_order(64, 2, 8, 8, seed=1, window=4), make_order(64, 2, 8, 8, seed=2, window=4)
    assert list(a.permutation(0)) != list(b.permutation(0))
    assert list(a.permutation(0)) != list(a.permutation(1))


def test_a_window_keeps_reads_local() -> None:
    order = make_order(80, 1, 10, 8, seed=0, window=2)
    shards = order.shard[order.permutation(0) - 3]
    for start in range(0, 80, 20):
        assert len(set(shards[start : start + 20])) == 2, "a window of two shards reads other shards"


def test_too_few_pictures_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"batch of 8 .* training has 15: set --training.batch_size to 7"):
        make_order(15, 1, 5, 8, seed=0, window=2)
