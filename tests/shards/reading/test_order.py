"""The order of samples: exactly once, the same on any cluster, no picture twice in a batch, exact shares."""

import pickle
import tracemalloc
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.manifest import COLUMNS, Manifest, ShardInfo
from shards.reading.epochs import EpochStream, Share, Source
from shards.reading.order import Order, order_of, rank_slice
from tests.shards.reading.sources import make_source, mix, same_shards

EPOCHS = 3  # that each test reads

REJECTED = [HealthCheck.filter_too_much]  # of drawn mixtures many do not fit their batch


@st.composite
def orders(draw: st.DrawFn, sources: int = 3) -> Order:
    """Orders small enough to be run for some epochs, with batches smaller and larger than an epoch."""
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    some = st.tuples(
        st.lists(st.integers(1, 12), min_size=groups, max_size=3 * groups),
        st.integers(1, 3),
        st.sampled_from([0.3, 0.7, 1, 1.5, 2]),
    )
    mixed = mix(draw(st.lists(some, min_size=1, max_size=sources)))
    try:
        return Order(mixed, size * groups, draw(st.integers(0, 2**70)), draw(st.integers(1, 6)), groups)
    except UserError:
        reject()


@dataclass(frozen=True)
class Run:
    """What one shard group draws from one source."""

    source: int
    shard_group: int
    of_source: np.ndarray  # bool [steps, batch]
    samples: np.ndarray  # int64 [n], of EPOCHS complete epochs or more
    captions: np.ndarray
    pictures: int  # different ones

    def epochs(self, column: np.ndarray) -> np.ndarray:
        """A column as [EPOCHS, pictures]."""
        return column[: EPOCHS * self.pictures].reshape(EPOCHS, self.pictures)


def steps_of(order: Order) -> int:
    """Steps that contain EPOCHS epochs of every source in every shard group."""
    weights = sum(source.weight for source in order.sources)
    epochs = (
        (int(source.count.sum()) / order.shard_groups + int(source.count.max())) * weights / source.weight
        for source in order.sources
    )
    return int(EPOCHS * max(epochs) * order.shard_groups / order.batch_size) + 2


def runs_of(order: Order) -> list[Run]:
    """Take an order apart into the runs of every source in every shard group."""
    batches = [order.batch(step) for step in range(steps_of(order))]
    samples, captions = (np.stack([getattr(batch, name) for batch in batches]) for name in ("samples", "captions"))
    source = np.searchsorted([source.first_sample for source in order.sources], samples, side="right") - 1
    shard_group = np.arange(order.batch_size) // (order.batch_size // order.shard_groups)
    runs = []
    for k in range(len(order.sources)):
        for one in range(order.shard_groups):
            here = (source == k) & (shard_group == one)
            runs.append(Run(k, one, here, samples[here], captions[here], len(np.unique(samples[here]))))
    return runs


def numbers(source: Source) -> set[int]:
    """The sample numbers of a source."""
    ranges = (range(first, first + n) for first, n in zip(source.start, source.count, strict=True))
    return {int(n) + source.first_sample for each in ranges for n in each}


@settings(max_examples=50, deadline=None, suppress_health_check=REJECTED)
@given(orders())
def test_every_picture_once_per_epoch_in_one_shard_group(order: Order) -> None:
    runs = runs_of(order)
    for k, source in enumerate(order.sources):
        shard_groups = [run for run in runs if run.source == k]
        for run in shard_groups:
            for each in run.epochs(run.samples):
                assert set(each.tolist()) == set(run.samples.tolist()), "an epoch does not contain every picture once"
        assigned = [picture for run in shard_groups for picture in set(run.samples.tolist())]
        assert sorted(assigned) == sorted(numbers(source)), "the shard groups together are not the source"
        shards = [
            set(np.searchsorted(source.start, run.samples - source.first_sample, side="right")) for run in shard_groups
        ]
        assert sum(map(len, shards)) == len(source.start), "two shard groups read a shard"


@settings(max_examples=50, deadline=None, suppress_health_check=REJECTED)
@given(orders())
def test_no_picture_twice_in_a_batch(order: Order) -> None:
    for step in range(steps_of(order)):
        batch = order.batch(step)
        assert len(set(batch.samples.tolist())) == order.batch_size, f"batch {step} holds a picture twice"
        assert batch.positions.tolist() == [step * order.batch_size + index for index in range(order.batch_size)]


@settings(max_examples=40, deadline=None, suppress_health_check=REJECTED)
@given(orders(sources=2))
def test_k_consecutive_epochs_use_each_of_k_captions_once(order: Order) -> None:
    for run in runs_of(order):
        source = order.sources[run.source]
        for picture in set(run.samples.tolist()):
            used = (run.captions[run.samples == picture] - source.first_row).tolist()
            first, end = source.first_caption[picture - source.first_sample :][:2].tolist()
            assert len(used) >= EPOCHS
            for start in range(len(used) - (end - first) + 1):
                assert sorted(used[start : start + end - first]) == list(range(first, end))


def test_pictures_begin_with_different_captions() -> None:
    source = Source(np.arange(0, 500, 50), np.full(10, 50), np.arange(0, 5 * 501, 5))
    order = Order([source], 8)
    begin = np.concatenate([order.batch(step).captions for step in range(62)]) % 5
    assert np.bincount(begin, minlength=5).min() > 60, "far less than a fifth of pictures begin with some caption"


@settings(max_examples=40, deadline=None, suppress_health_check=REJECTED)
@given(orders(), st.lists(st.integers(0, 10**7), min_size=1, max_size=12), st.booleans())
def test_a_batch_does_not_depend_on_what_was_read_before(order: Order, steps: list[int], back: bool) -> None:
    near = [step + 1 - 2 * back for step in steps if step]
    used = pickle.loads(pickle.dumps(order))
    for step in (*steps, *near, *steps):
        fresh = Order(order.sources, order.batch_size, order.seed, order.shuffle_shards, order.shard_groups)
        for replayed, sought in zip(used.batch(step), fresh.batch(step), strict=True):
            np.testing.assert_array_equal(replayed, sought)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 8, 64]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.integers(1, 3),
)
def test_ranks_and_micro_batches_together_are_the_batch(
    world: int, accumulation: int, shard_groups: int, times: int
) -> None:
    size = int(np.lcm(shard_groups, world)) * accumulation * times
    order = Order([same_shards(3 * size + 35, 5)], size, seed=5, shuffle_shards=2, shard_groups=shard_groups)
    batch = order.batch(3)
    indices = [
        rank_slice(size, m, accumulation, r, world, shard_groups) for m in range(accumulation) for r in range(world)
    ]
    assert {len(part) for part in indices} == {size // (accumulation * world)}, "ranks have unequal parts"
    joined = np.concatenate(indices)
    for column, part in zip(batch, batch.part(joined), strict=True):
        np.testing.assert_array_equal(part[np.argsort(joined)], column)
    if shard_groups == 1:
        np.testing.assert_array_equal(joined, np.arange(size))
    if shard_groups % world == 0:
        for rank in range(world):
            mine = {int(p) // (size // shard_groups) for m in range(accumulation) for p in indices[m * world + rank]}
            each = shard_groups // world
            assert mine == set(range(rank * each, (rank + 1) * each)), "a rank does not read complete shard groups"


@settings(max_examples=50, deadline=None, suppress_health_check=REJECTED)
@given(orders())
def test_a_mixture_keeps_its_shares_at_every_step(order: Order) -> None:
    weights = [Fraction(str(source.weight)) for source in order.sources]
    for run in runs_of(order):
        share = order.batch_size // order.shard_groups * weights[run.source] / sum(weights)
        for step, drawn in enumerate(np.cumsum(run.of_source.sum(axis=1)).tolist(), start=1):
            assert abs(drawn - step * share) < 1, f"source {run.source} has {drawn} of {float(step * share)} pictures"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(13, 80), st.integers(1, 10**18))
def test_a_share_is_arithmetic(low: int, mean: int, far: int) -> None:
    share = Share(Fraction(low, 13), Fraction(low + mean, 13))
    drawn = [share.drawn_before(step) for step in range(14)]  # the sum of 13 steps has no rounding
    assert share.drawn_before(13 * far) == mean * far
    assert max(np.diff(drawn)) <= share.maximum <= share.mean + 2
    for position in range(drawn[13]):
        assert share.drawn_before(share.step_at(position)) <= position < share.drawn_before(share.step_at(position) + 1)


def test_a_mixture_is_exact_after_a_long_time_too() -> None:
    order = Order(mix([([40] * 4, 1, 0.1), ([40] * 4, 1, 0.7), ([40] * 4, 1, 0.2)]), 32)
    late = [order.batch(10**15 + step).samples // 163 for step in range(10)]
    assert np.bincount(np.concatenate(late)).tolist() == [32, 224, 64]


def test_any_part_of_a_batch_is_a_mixture() -> None:
    order = Order(mix([([40] * 4, 1, 3), ([40] * 4, 1, 1)]), 16, shard_groups=2)
    for step in range(6):
        assert (order.batch(step).samples // 163).tolist() == 2 * [0, 0, 1, 0, 0, 0, 1, 0]


@settings(max_examples=40, deadline=None, suppress_health_check=REJECTED)
@given(orders(), st.data())
def test_replacements_put_no_picture_into_a_batch_twice(order: Order, data: st.DataObject) -> None:
    for run in runs_of(order):
        ends = np.cumsum(run.of_source.sum(axis=1))
        across = [int(np.searchsorted(ends, e * run.pictures, side="right")) for e in range(1, EPOCHS)]
        step = data.draw(st.sampled_from(across) | st.integers(0, across[-1] - 1))
        indices = np.flatnonzero(run.of_source[step]).tolist()
        assume(indices)
        rounds = run.pictures // len(indices) - 1
        assert rounds >= 1, "there is no picture for the first attempt"
        named = [order.replacement(step, index, attempt) for attempt in range(1, rounds + 3) for index in indices]
        epoch = (ends[step] - 1) // run.pictures
        passed = zip(run.epochs(run.samples)[epoch], run.epochs(run.captions)[epoch], strict=True)
        assert set(named) <= set(passed), "not a picture and its caption of this source, shard group and epoch"
        assert not {sample for sample, _ in named} & set(order.batch(step).samples), "a replacement is in the batch"
        different = [sample for sample, _ in named[: rounds * len(indices)]]
        assert len(set(different)) == len(different), "two indices or attempts have the same replacement"


def test_replacements_follow_the_batch() -> None:
    order = Order([same_shards(80, 10)], 8, seed=1, shuffle_shards=2)
    later = [order.batch(step).samples.tolist() for step in range(10)]
    assert [order.replacement(3, index, 1)[0] for index in range(8)] == later[4]
    assert [order.replacement(3, index, 2)[0] for index in range(8)] == later[5]
    assert [order.replacement(8, index, 2)[0] for index in range(8)] == later[0], "not the beginning of the epoch"


def test_a_shuffle_block_keeps_reads_local_and_mixes_all_its_shards() -> None:
    order = Order([same_shards(80, 10)], 8, shuffle_shards=2)
    for epoch in (0, 1):
        shards = (np.concatenate([order.batch(10 * epoch + step).samples for step in range(10)]) - 3) // 10
        for start in range(0, 80, 20):
            block = shards[start : start + 20]
            assert len(set(block)) == 2, "a block of two shards reads other shards"
            assert np.diff(block).astype(bool).sum() > 3, "the shards of a block are not mixed"


def test_seeds_epochs_shard_groups_and_sources_are_shuffled_differently() -> None:
    def shuffled(order: Order, column: slice, first_step: int = 0) -> list[int]:
        return [int(n) for step in range(first_step, first_step + 4) for n in order.batch(step).samples[column] % 83]

    one = [make_source([80], 1)]
    plain = shuffled(Order(one, 20), slice(None))
    assert plain != shuffled(Order(one, 20, seed=1), slice(None))
    assert plain != shuffled(Order(one, 20, seed=2**64), slice(None), first_step=4)
    two = mix([([80], 1, 1), ([80], 1, 1)])
    assert shuffled(Order(two, 40), slice(0, 40, 2)) != shuffled(Order(two, 40), slice(1, 40, 2))
    shard_groups = Order([make_source([80, 80], 1)], 40, shard_groups=2)
    first, second = (
        [int(n) for t in range(4) for n in shard_groups.batch(t).samples[part]] for part in (range(20), range(20, 40))
    )
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_the_order_is_the_same_in_every_version() -> None:
    # A change here changes what a resumed run reads.
    order = Order(mix([([5, 4, 3], 3, 2), ([6, 5], 2, 1)]), 6, seed=7, shuffle_shards=2)
    assert order.batch(0).samples.tolist() == [12, 22, 13, 14, 27, 10]
    assert order.batch(5).captions.tolist() == [15, 44, 21, 20, 35, 18]
    assert order.replacement(5, 2, 1) == (13, 26)


def test_shard_groups_have_as_many_pictures_each_as_the_shards_allow() -> None:
    order = Order([make_source([7, 50, 9, 30, 20, 11, 33], 1)], 12, shard_groups=3)
    shard_groups = [
        np.concatenate([order.batch(t).samples.reshape(3, 4)[shard_group] for t in range(14)])
        for shard_group in range(3)
    ]
    assert sorted(len(set(shard_group.tolist())) for shard_group in shard_groups) == [50, 53, 56]


def test_ten_million_pictures_need_neither_memory_nor_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, shards = 10_000_000, 10_000
    shard = np.repeat(np.arange(shards, dtype=np.int32), pictures // shards)
    infos = tuple(ShardInfo(f"{n}.tar", 0, "", pictures // shards) for n in range(shards))
    split = (shard < 10).astype(np.int8)
    first_caption = np.arange(0, 5 * pictures + 1, 5)
    rest = {name: first_caption for name in COLUMNS if name not in ("shard", "split", "first_caption")}
    manifest = Manifest(
        Path("big"), "big", "", infos, ("train", "dev"), shard=shard, split=split, first_caption=first_caption, **rest
    )
    blocks = []
    shuffle = EpochStream._shuffle_block
    monkeypatch.setattr(EpochStream, "_shuffle_block", lambda run, *key: blocks.append(key) or shuffle(run, *key))
    tracemalloc.start()
    order = order_of(manifest, "train", 1024, seed=3)
    assert order.pictures == pictures - 10_000
    last = int(30 * order.steps_per_epoch) - 1
    order.batch(last)
    assert len(blocks) <= 2, "a seek shuffles more blocks than it reads"
    across = int(29 * order.steps_per_epoch)
    assert order.batch(across).samples.min() >= 10_000, "a sample of the other split"
    assert len(blocks) <= 2 + 2, "a seek across epochs shuffles more than an end and a beginning"
    for step in range(across + 1, across + 40):
        order.batch(step)
    assert len(blocks) <= 2 + 2 + 4, "blocks are shuffled anew for every batch"
    for step in range(0, 4000, 16):  # one in every block
        order.batch(step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6, f"planning takes {peak / 1e6:.0f} MB beside the manifest"
