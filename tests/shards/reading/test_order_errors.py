"""Orders of manifests, and errors where batch, shard groups and shards do not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from shards.reading.order import Order, Selection, order_of, rank_slice, source_of
from tests.shards.reading.sources import mix, same_shards, saved


def test_an_order_of_manifests_numbers_them_end_to_end(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", {"train": [5, 5, 0, 2], "dev": [4]}, captions=2)
    two = saved(tmp_path / "two", {"dev": [3], "train": [6, 8]}, captions=3)
    assert [source_of(one, "train").start.tolist(), source_of(one, "train").count.tolist()] == [[0, 5, 10], [5, 5, 2]]
    order = order_of([one, two], "train", 6, seed=1, weights=[1, 2])
    batches = [order.batch(t) for t in range(6)]
    samples, captions = (np.concatenate(column) for column in list(zip(*batches, strict=True))[:2])
    assert sorted(samples[samples < 16]) == list(range(12))
    assert sorted(set(samples[samples >= 16])) == list(range(16 + 3, 16 + 17))
    local = captions[samples >= 16] - one.first_caption[-1]
    np.testing.assert_array_equal(local // 3 + 16, samples[samples >= 16])
    np.testing.assert_array_equal(captions[samples < 16] // 2, samples[samples < 16])
    equal = order_of([one, two], "train", 6).batch(0).samples
    assert (equal < 16).sum() == 3
    assert (order.pictures, order.steps_per_epoch) == (26, 26 / 6)


def test_unknown_splits_and_pictures_without_captions_are_refused(tmp_path: Path) -> None:
    manifest = saved(tmp_path / "one", {"train": [5], "dev": [4]}, captions=1)
    with pytest.raises(UserError, match=r"no split 'eval' in .*one: it has train, dev"):
        order_of(manifest, "eval", 2)
    first_caption = manifest.first_caption.copy()
    first_caption[3] = first_caption[2]  # the caption of picture 2 goes to picture 3
    silent = replace(manifest, first_caption=first_caption, key=np.array([b"p%d" % n for n in range(9)]))
    with pytest.raises(UserError, match=r"sample p2 of split train of .*one has no caption \(1 such samples\)"):
        order_of(silent, "train", 2)
    assert order_of(silent, "dev", 2).pictures == 4


def test_a_part_has_the_same_indices_of_all_columns() -> None:
    batch = Order([same_shards(40, 5, captions=3)], 8).batch(2)
    part = batch.part(np.array([1, 6]))
    assert isinstance(part, Selection)
    assert [column.tolist() for column in part] == [[column[1], column[6]] for column in batch]


@pytest.mark.parametrize(
    ("counts", "weights", "batch", "shard_groups", "message"),
    [
        (
            [[15]],
            [1],
            8,
            1,
            "a batch of 8 needs at least 16 pictures, training has 15: set --training.batch_size to 7 or",
        ),
        ([[1]], [1], 8, 1, "a batch of 8 needs at least 16 pictures, training has 1: give it more pictures"),
        ([[9], [90]], [9, 1], 20, 1, "at least 36 pictures, training has 9: give it more pictures or less weight"),
        (
            [[9, 5, 7]],
            [1],
            12,
            3,
            "at least 8 pictures, shard group 2 of training has 5: set --training.batch_size to 6 or less",
        ),
        ([[90], [9]], [3, 1], 20, 1, "at least 10 pictures, training has 9: set --training.batch_size to 16 or less"),
        ([[20, 20]], [1], 9, 2, "a batch of 9 does not divide into 2 shard groups: set --training.batch_size to 10 or"),
        (
            [[20, 20]],
            [1],
            9,
            3,
            "3 shard groups need as many shards, training has 2: set --data.shard_groups to 2 or less",
        ),
        (
            [[90], [90]],
            [9, 1],
            8,
            1,
            "training has 0.8 places in a batch: give it more weight or set --training.batch_",
        ),
        ([[90], [90]], [1, 0], 8, 1, "the weight of training is 0: set it to a positive number"),
        ([[90], [90]], [1, float("nan")], 8, 1, "the weight of training is nan"),
        ([[90], [90]], [1, float("inf")], 8, 1, "the weight of training is inf"),
    ],
)
def test_orders_that_do_not_fit_are_one_clear_line(counts, weights, batch, shard_groups, message) -> None:
    with pytest.raises(UserError) as caught:
        Order(mix([(c, 1, w) for c, w in zip(counts, weights, strict=True)]), batch, shard_groups=shard_groups)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_batch_that_an_error_names_fits() -> None:
    for pictures in range(4, 30):
        sources = mix([([pictures], 1, 2), ([200], 1, 5)])
        with pytest.raises(UserError) as caught:
            Order(sources, 2 * pictures)
        named = int(str(caught.value).rpartition("batch_size to ")[2].split()[0])
        Order(sources, named)
        with pytest.raises(UserError):
            Order(sources, named + 1)


def test_a_batch_that_ranks_or_shard_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"is not divisible by 2 micro-batches x 1 shard groups or x 3 ranks: .* multiple of 6"
    ):
        rank_slice(16, 0, 2, 0, 3)
    with pytest.raises(
        UserError, match=r"is not divisible by 3 micro-batches x 4 shard groups or x 2 ranks: .* multiple of 12"
    ):
        rank_slice(18, 0, 3, 0, 2, shard_groups=4)
