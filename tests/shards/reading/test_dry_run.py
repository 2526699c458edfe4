"""The dry run: readers, bytes and padding against a naive count over the order and the manifests."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from shards.manifest import Manifest, ShardInfo
from shards.reading.dry_run import ReadingPlan, advise, plan_reading
from shards.reading.order import Order, order_of, rank_slice
from tests.shards.reading.sources import saved

BATCH = 16


def made(folder: Path, shards: int = 12, pictures: int = 10, seed: int = 0) -> Manifest:
    """A manifest without shards: pictures of 1,000 to 2,000 bytes with 1 to 3 captions of 1 to 9 seconds."""
    chance = np.random.default_rng(seed)
    samples = (shards + 2) * pictures
    captions = chance.integers(1, 4, samples)
    rows = int(captions.sum())
    columns = {
        "image_bytes": chance.integers(1000, 2000, samples),
        "audio_bytes": chance.integers(5000, 9000, rows),
        "duration": chance.uniform(1, 9, rows),
    }
    return saved(folder, {"train": [pictures] * shards, "dev": [pictures] * 2}, captions, **columns)


@pytest.fixture
def one(tmp_path: Path) -> Manifest:
    return made(tmp_path / "one")


def of(
    m: Manifest, world_size: int = 2, workers: int = 2, accumulation: int = 2, shard_groups: int = 1, **how: object
) -> ReadingPlan:
    settings = {"groups": 2, "max_seconds": 6.0} | how
    return plan_reading(
        order_of(m, "train", BATCH, 3, 2, shard_groups), [m], world_size, workers, accumulation, **settings
    )


def names_read(m: Manifest, order: Order, steps: int, world_size: int, workers: int, accumulation: int) -> dict:
    """The shards that each (rank, worker) reads, as the loader assigns micro-batches to workers."""
    read: dict[tuple[int, int], set[str]] = {}
    for number in range(steps * accumulation):
        step, micro = divmod(number, accumulation)
        for rank in range(world_size):
            mine = rank_slice(BATCH, micro, accumulation, rank, world_size, order.shard_groups)
            shards = {m.shards[m.shard[sample]].name for sample in order.batch(step).samples[mine]}
            read.setdefault((rank, number % max(1, workers)), set()).update(shards)
    return read


@pytest.mark.parametrize(
    ("world_size", "workers", "accumulation", "shard_groups"), [(1, 0, 1, 1), (2, 2, 2, 1), (4, 3, 1, 2), (2, 1, 2, 4)]
)
def test_readers_are_those_of_the_loader(
    one: Manifest, world_size: int, workers: int, accumulation: int, shard_groups: int
) -> None:
    p = of(one, world_size, workers, accumulation, shard_groups)
    expected = names_read(
        one, order_of(one, "train", BATCH, 3, 2, shard_groups), p.steps, world_size, workers, accumulation
    )
    assert {reader: set(shards) for reader, shards in p.readers.items()} == expected
    assert all(list(shards) == sorted(shards) for shards in p.readers.values())


def test_epoch_and_shuffle_block(one: Manifest) -> None:
    p = of(one)
    (source,) = p.sources
    first = int(one.first_caption[120])
    assert (source.pictures, source.shards, source.captions) == (120, 12, first)
    assert source.hours == pytest.approx(one.duration[:first].sum() / 3600, rel=1e-6)
    assert p.steps_per_epoch == 120 / 16
    assert (source.shuffle_block, source.steps, p.steps) == (20, 20 / 16, 2)
    assert of(one, shard_groups=2).sources[0].steps == 2 * 20 / 16
    assert (
        of(one, world_size=1, accumulation=1, shard_groups=8).sources[0].shuffle_block == 10
    )  # a shard group has one shard
    assert of(one, workers=1).readers.keys() == {(0, 0), (1, 0)}


def test_bytes_of_an_epoch_are_what_epochs_read(one: Manifest) -> None:
    """Six epochs use the 1, 2 or 3 captions of a picture equally often: their mean is exact."""
    order = order_of(one, "train", BATCH, 3, 2)
    read = 0
    for step in range(6 * 120 // 16):
        chosen = order.batch(step)
        read += int(one.image_bytes[chosen.samples].sum() + one.audio_bytes[chosen.captions].sum())
    assert 6 * 120 % 16 == 0
    assert of(one).sources[0].read == pytest.approx(read / 6, abs=1)
    assert of(one).read_per_node == of(one).sources[0].read
    assert of(one, nodes=2).read_per_node == pytest.approx(read / 12, abs=1)


def test_shards_of_a_node(one: Manifest) -> None:
    stored = sum(shard.bytes for shard in one.shards[:12])
    assert of(one).stored_per_node == of(one, nodes=2).stored_per_node == stored
    assert of(one, shard_groups=2, nodes=2).stored_per_node == stored // 2
    assert of(one, world_size=4, shard_groups=2, nodes=4).stored_per_node == stored // 2
    assert of(one, world_size=4, accumulation=1, shard_groups=4, nodes=2).stored_per_node == stored // 2


def test_padding_against_a_plain_count(one: Manifest) -> None:
    order = order_of(one, "train", BATCH, 3, 2)
    real = plain = grouped = 0.0
    for step in range(7):  # the complete steps of an epoch
        seconds = [min(float(one.duration[row]), 6.0) for row in order.batch(step).captions]
        for start in range(0, 16, 4):
            mine = seconds[start : start + 4]
            real += sum(mine)
            plain += 4 * max(mine)
            a, b, c, d = sorted(mine)
            grouped += min(a + 3 * d, 2 * b + 2 * d, 3 * c + d)
    p = of(one)
    assert p.batches == 7
    # The steps that are looked at lie between 0 and 6.5, rounded down.
    assert p.padding == pytest.approx(1 - real / plain, abs=1e-9)
    assert p.padding_grouped == pytest.approx(1 - real / grouped, abs=1e-9)
    assert p.padding_grouped < p.padding
    assert of(one, groups=1).padding_grouped == of(one).padding
    assert of(one, groups=4).padding_grouped == of(one, groups=9).padding_grouped == pytest.approx(0)
    assert of(one, max_seconds=1.0).padding == pytest.approx(0)


def test_many_ranks_evaluate_fewer_batches(one: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.reading.dry_run._MAX_MICROS", 13)
    assert of(one, world_size=2, accumulation=2).batches == 4
    assert of(one, world_size=16, accumulation=1).batches == 1


def test_mixture(tmp_path: Path, one: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    two = made(tmp_path / "two", shards=8, seed=1)
    order = order_of([one, two], "train", BATCH, 3, 2, weights=[3, 1])
    p = plan_reading(order, [one, two], 2, 1, 1, 2, 6.0)
    assert [source.share for source in p.sources] == [0.75, 0.25]
    assert [source.pictures for source in p.sources] == [120, 80]
    assert p.steps == math.ceil(20 / 4)  # the shuffle block of the slower source
    samples = np.concatenate([order.batch(step).samples for step in range(p.steps)])
    ones = {f"one/{one.shards[one.shard[s]].name}" for s in samples if s < len(one.key)}
    twos = {f"two/{two.shards[two.shard[s - len(one.key)]].name}" for s in samples if s >= len(one.key)}
    assert twos
    assert set().union(*p.readers.values()) == ones | twos
    seconds = np.concatenate([one.duration, two.duration])[order.batch(0).captions].clip(max=6.0).reshape(2, 8)
    monkeypatch.setattr(Order, "steps_per_epoch", 1.0)  # so that only the first batch is looked at
    first = plan_reading(order, [one, two], 2, 1, 1, 2, 6.0)
    assert first.padding == pytest.approx(1 - seconds.sum() / (8 * seconds.max(axis=1).sum()))
    assert "75.0% of each batch" in p.text()


def test_text(one: Manifest, tmp_path: Path) -> None:
    text = of(one).text()
    assert "120 pictures" in text
    assert "steps per epoch: 7.50 of 16 pairs (2 ranks x 2 micro-batches x 4)" in text
    two = of(made(tmp_path / "two", shards=2, pictures=60)).text()
    assert two.endswith("\n  every worker of every rank: 2 shards: train-000000.tar, train-000001.tar")
    shard_groups = of(one, world_size=8, workers=2, accumulation=1, shard_groups=4)
    first = ", ".join(shard_groups.readers[2, 0])
    assert f"\n  ranks 2 to 3: {len(shard_groups.readers[2, 0])} shards: {first}\n" in shard_groups.text()
    assert "\n  rank 0 worker 0: " in of(one, workers=3).text()
    assert "\n  every rank: " in of(one, workers=1, accumulation=1).text()
    assert "\n  rank 0: 4 shards: " in of(one, world_size=1, workers=0, accumulation=1).text()


def test_text_of_very_many_readers_is_short(tmp_path: Path) -> None:
    m = made(tmp_path / "many", shards=100)
    order = order_of(m, "train", 400, 0, 2, 50)
    p = plan_reading(order, [m], 400, 1, 1, 1)
    assert len(p.readers) == 400
    text = p.text()
    assert "and 34 more such groups" in text  # 50 shard groups
    lines = [line for line in text.splitlines() if line.startswith("  ranks ")]
    assert len(lines) == 16
    for line in lines:
        first, last = map(int, re.match(r"  ranks (\d+) to (\d+): ", line).groups())
        assert last == first + 7  # a shard group
        read = {name for rank in range(first, last + 1) for name in p.readers[rank, 0]}
        assert f"{len(read)} shard" in line
        assert all(name in line for name in sorted(read)[:8])


def test_batch_that_does_not_divide(one: Manifest) -> None:
    with pytest.raises(UserError, match="is not divisible"):
        of(one, world_size=3)


def test_advice(one: Manifest, tmp_path: Path) -> None:
    lines = advise(one, ranks=2, workers=2)
    assert lines[0].startswith(
        "train: 12 shards of 100 kB, 10 pictures each; a shuffle block of 16 shards is 100% of an epoch"
    )
    assert "up to 2 shard groups; stock webdataset has a shard for each worker too" in lines[1]
    crowded = advise(one, ranks=16, workers=4)
    assert "stock webdataset would leave 52 of 64 workers without a shard" in crowded[1]
    assert len(advise(made(tmp_path / "fifteen", shards=15, pictures=8), ranks=16, workers=4)) == 2
    # 128 shards would be two for each worker; fewer than 8 pictures are not worth a file.
    assert crowded[2] == "better: make_shards --samples-per-shard 8, 15 shards of 80 kB"


def test_advice_on_shards_that_are_too_large_or_too_many(one: Manifest) -> None:
    rows = np.arange(100_000)
    tiny = dataclasses.replace(
        one,
        shards=tuple(ShardInfo(f"train-{n:06d}.tar", 30_000, "0" * 64, 10) for n in range(10_000)),
        key=np.repeat(b"", 100_000),
        shard=rows // 10,
        split=np.zeros(100_000, np.int8),
    )
    assert advise(tiny, 4, 4)[-1] == "better: make_shards --samples-per-shard 1562, 65 shards of 4.69 MB"
    suited = dataclasses.replace(tiny, shards=tiny.shards[:100], shard=rows // 1000)
    assert len(advise(suited, 4, 4)) == 2
    huge = tuple(dataclasses.replace(shard, bytes=10_000_000_000) for shard in suited.shards)
    lines = advise(dataclasses.replace(suited, shards=huge), 4, 4)
    assert lines[-1] == "better: make_shards --samples-per-shard 20, 5,000 shards of 200 MB"
