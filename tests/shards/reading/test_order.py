"""The order of samples: exactly once, the same on any cluster, no picture twice in a batch, exact shares."""

import pickle
import tracemalloc
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.manifest import COLUMNS, Manifest, ShardInfo, save
from shards.reading.epochs import EpochStream, Share, Source
from shards.reading.order import Order, Selection, order_of, rank_slice, source_of

EPOCHS = 3  # that each test reads


def make_source(counts: list[int], captions: int = 1, sample: int = 0, row: int = 0, **other: float) -> Source:
    """A data set whose first three samples belong to another split; samples have 1 to `captions` captions, in turn."""
    edges = np.cumsum([3, *counts])
    first_caption = np.cumsum([0, *(1 + n % captions for n in range(int(edges[-1])))])
    return Source(edges[:-1], np.array(counts), first_caption, sample, row, **other)


def same_shards(pictures: int, per_shard: int, captions: int = 1) -> Source:
    return make_source([min(per_shard, pictures - n) for n in range(0, pictures, per_shard)], captions)


def mix(sources: list[tuple[list[int], int, float]]) -> list[Source]:
    """Data sets numbered end to end, from (pictures of each shard, most captions, weight)."""
    made: list[Source] = []
    sample = row = 0
    for counts, captions, weight in sources:
        made.append(make_source(counts, captions, sample, row, weight=weight))
        sample, row = sample + len(made[-1].first_caption) - 1, row + int(made[-1].first_caption[-1])
    return made


@st.composite
def orders(draw: st.DrawFn, sources: int = 3) -> Order:
    """Orders small enough to be run for some epochs, the with batches smaller and larger than an epoch."""
    groups, places = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    some = st.tuples(
        st.lists(st.integers(1, 12), min_size=groups, max_size=3 * groups),
        st.integers(1, 3),
        st.sampled_from([0.3, 0.7, 1, 1.5, 2]),
    )
    mixed = mix(draw(st.lists(some, min_size=1, max_size=sources)))
    try:
        return Order(mixed, places * groups, draw(st.integers(0, 2**70)), draw(st.integers(1, 6)), groups)
    except UserError:
        reject()


@dataclass(frozen=True)
class Run:
    """What one shard group draws from one source."""

    source: int
    shard_group: int
    places: np.ndarray  # bool [steps, places of the batch]
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


@settings(max_examples=50, deadline=None)
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


@settings(max_examples=50, deadline=None)
@given(orders())
def test_no_picture_twice_in_a_batch(order: Order) -> None:
    for step in range(steps_of(order)):
        batch = order.batch(step)
        assert len(set(batch.samples.tolist())) == order.batch_size, f"batch {step} holds a picture twice"
        assert batch.positions.tolist() == [step * order.batch_size + place for place in range(order.batch_size)]


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
def test_ranks_and_micro_batches_together_are_the_batch(world: int, micros: int, shard_groups: int, times: int) -> None:
    size = int(np.lcm(shard_groups, world)) * micros * times
    order = Order([same_shards(3 * size + 35, 5)], size, seed=5, shuffle_shards=2, shard_groups=shard_groups)
    whole = order.batch(3)
    places = [rank_slice(size, m, micros, r, world, shard_groups) for m in range(micros) for r in range(world)]
    assert {len(part) for part in places} == {size // (micros * world)}, "ranks have unequal parts"
    joined = np.concatenate(places)
    for column, part in zip(whole, whole.part(joined), strict=True):
        np.testing.assert_array_equal(part[np.argsort(joined)], column)
    if shard_groups == 1:
        np.testing.assert_array_equal(joined, np.arange(size))
    if shard_groups % world == 0:
        for rank in range(world):
            mine = {int(p) // (size // shard_groups) for m in range(micros) for p in places[m * world + rank]}
            each = shard_groups // world
            assert mine == set(range(rank * each, (rank + 1) * each)), "a rank does not read complete shard groups"


@settings(max_examples=50, deadline=None)
@given(orders())
def test_a_mixture_keeps_its_shares_at_every_step(order: Order) -> None:
    weights = [Fraction(str(source.weight)) for source in order.sources]
    for run in runs_of(order):
        share = order.batch_size // order.shard_groups * weights[run.source] / sum(weights)
        for step, drawn in enumerate(np.cumsum(run.places.sum(axis=1)).tolist(), start=1):
            assert abs(drawn - step * share) < 1, f"source {run.source} has {drawn} of {float(step * share)} pictures"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(13, 80), st.integers(1, 10**18))
def test_a_share_is_arithmetic(low: int, mean: int, far: int) -> None:
    share = Share(Fraction(low, 13), Fraction(low + mean, 13))
    drawn = [share.drawn(step) for step in range(14)]  # the sum of 13 steps has no rounding
    assert share.drawn(13 * far) == mean * far
    assert max(np.diff(drawn)) <= share.maximum <= share.mean + 2
    for position in range(drawn[13]):
        assert share.drawn(share.step_at(position)) <= position < share.drawn(share.step_at(position) + 1)


def test_a_mixture_is_exact_after_a_long_time_too() -> None:
    order = Order(mix([([40] * 4, 1, 0.1), ([40] * 4, 1, 0.7), ([40] * 4, 1, 0.2)]), 32)
    late = [order.batch(10**15 + step).samples // 163 for step in range(10)]
    assert np.bincount(np.concatenate(late)).tolist() == [32, 224, 64]


def test_any_part_of_a_batch_is_a_mixture() -> None:
    order = Order(mix([([40] * 4, 1, 3), ([40] * 4, 1, 1)]), 16, shard_groups=2)
    for step in range(6):
        assert (order.batch(step).samples // 163).tolist() == 2 * [0, 0, 1, 0, 0, 0, 1, 0]


@settings(max_examples=40, deadline=None)
@given(orders(), st.data())
def test_replacements_put_no_picture_into_a_batch_twice(order: Order, data: st.DataObject) -> None:
    for run in runs_of(order):
        ends = np.cumsum(run.places.sum(axis=1))
        across = [int(np.searchsorted(ends, e * run.pictures, side="right")) for e in range(1, EPOCHS)]
        step = data.draw(st.sampled_from(across) | st.integers(0, across[-1] - 1))
        places = np.flatnonzero(run.places[step]).tolist()
        assume(places)
        whole = run.pictures // len(places) - 1
        assert whole >= 1, "there is no picture for the first attempt"
        named = [order.replacement(step, place, attempt) for attempt in range(1, whole + 3) for place in places]
        epoch = (ends[step] - 1) // run.pictures
        passed = zip(run.epochs(run.samples)[epoch], run.epochs(run.captions)[epoch], strict=True)
        assert set(named) <= set(passed), "not a picture and its caption of this source, shard group and epoch"
        assert not {sample for sample, _ in named} & set(order.batch(step).samples), "a replacement is in the batch"
        different = [sample for sample, _ in named[: whole * len(places)]]
        assert len(set(different)) == len(different), "two places or attempts have the same replacement"


def test_replacements_follow_the_batch() -> None:
    order = Order([same_shards(80, 10)], 8, seed=1, shuffle_shards=2)
    later = [order.batch(step).samples.tolist() for step in range(10)]
    assert [order.replacement(3, place, 1)[0] for place in range(8)] == later[4]
    assert [order.replacement(3, place, 2)[0] for place in range(8)] == later[5]
    assert [order.replacement(8, place, 2)[0] for place in range(8)] == later[0], "not the beginning of the epoch"


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


def saved(folder: Path, counts: dict[str, list[int]], captions: int) -> Manifest:
    """A manifest of these splits: pictures in each shard."""
    folder.mkdir()
    shards = [(name, n) for name, shards in counts.items() for n in shards]
    pictures = sum(n for _, n in shards)
    columns = {
        name: np.zeros(pictures * captions if "audio" in name or name == "duration" else pictures) for name in COLUMNS
    }
    columns["shard"] = np.repeat(np.arange(len(shards)), [n for _, n in shards])
    columns["split"] = np.repeat([list(counts).index(name) for name, _ in shards], [n for _, n in shards])
    columns["first_caption"] = np.arange(pictures + 1) * captions
    infos = [ShardInfo(f"{name}-{n}.tar", 0, "", count) for n, (name, count) in enumerate(shards)]
    return save(folder, "noise", infos, list(counts), columns, {})


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


def test_an_unknown_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    manifest = saved(tmp_path / "one", {"train": [5], "dev": [4]}, captions=1)
    with pytest.raises(UserError, match=r"no split 'eval' in .*one: it has train, dev"):
        order_of(manifest, "eval", 2)


def test_a_picture_without_a_caption_is_named(tmp_path: Path) -> None:
    manifest = saved(tmp_path / "one", {"train": [5], "dev": [4]}, captions=1)
    first_caption = manifest.first_caption.copy()
    first_caption[3] = first_caption[2]  # the caption of picture 2 goes to picture 3
    silent = replace(manifest, first_caption=first_caption, key=np.array([b"p%d" % n for n in range(9)]))
    with pytest.raises(UserError, match=r"sample p2 of split train of .*one has no caption \(1 such samples\)"):
        order_of(silent, "train", 2)
    assert order_of(silent, "dev", 2).pictures == 4


def test_a_part_has_the_same_places_of_all_columns() -> None:
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
        (
            [[20, 20]],
            [1],
            9,
            2,
            "a batch of 9 does not divide into 2 shard groups: set --training.batch_size to 10 or",
        ),
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
def test_what_does_not_fit_is_one_clear_line(counts, weights, batch, shard_groups, message) -> None:
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
        UserError, match=r"does not divide by 2 micro-batches x 1 shard groups or x 3 ranks: .* multiple of 6"
    ):
        rank_slice(16, 0, 2, 0, 3)
    with pytest.raises(
        UserError, match=r"does not divide by 3 micro-batches x 4 shard groups or x 2 ranks: .* multiple of 12"
    ):
        rank_slice(18, 0, 3, 0, 2, shard_groups=4)
