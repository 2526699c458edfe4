"""Augmented batches and background voices: a function of seed and position, on any ranks, workers and restarts."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS, Augment, ImageAugment, SpeechAugment
from shards.errors import UserError
from shards.manifest import Manifest
from shards.media.audio import decode_audio
from shards.reading.babble import Babble
from shards.reading.dataset import Batch
from shards.reading.order import order_of
from shards.reading.reader import Reader
from tests.shards.media.noise import noise, spoil
from tests.shards.reading.test_dataset import MAX_SECONDS, assert_same, batches, joined, order_for

SPEECH: dict[str, Any] = dict.fromkeys(SPEECH_KINDS, 0.5)
IMAGE: dict[str, Any] = dict.fromkeys(IMAGE_KINDS, 0.5)
HALF = Augment(SpeechAugment(**SPEECH), ImageAugment(**IMAGE))
BABBLE = Augment(SpeechAugment(babble=1.0))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return noise(tmp_path_factory.mktemp("babble") / "shards")


@pytest.fixture(scope="module")
def augmented(manifest: Manifest) -> list[list[Batch]]:
    """Six steps of one rank without workers: an epoch of 26 pictures ends in the fifth."""
    return batches(manifest, range(6), augment=HALF, order=order_for(manifest, batch_size=6))


def test_without_probabilities_the_bytes_are_the_same(manifest: Manifest) -> None:
    plain = batches(manifest, range(4))
    assert_same(plain, batches(manifest, range(4), augment=Augment()))
    assert_same(plain, batches(manifest, range(4), augment=None))


def test_batches_are_augmented_and_fit(manifest: Manifest, augmented: list[list[Batch]]) -> None:
    plain = batches(manifest, range(6), order=order_for(manifest, batch_size=6))
    pictures = captions = 0
    for one, other in zip(augmented, plain, strict=True):
        a, b = joined(one), joined(other)
        assert a[0] == b[0], "the samples are the same"
        pictures += sum(x != y for x, y in zip(a[1], b[1], strict=True))
        captions += sum(x != y for x, y in zip(a[2], b[2], strict=True))
        assert all(0 < length <= MAX_SECONDS * 16000 for batch in one for length in batch.lengths.tolist())
        assert all(batch.waveforms.abs().max() <= 1 for batch in one)
    assert 18 <= pictures <= 36  # 3 of 4 are expected
    assert captions >= 35


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers"),
    [(2, 1, 0), (3, 1, 0), (1, 2, 0), (3, 2, 0), (1, 1, 1), (1, 1, 4), (2, 1, 2)],
)
def test_the_same_on_any_ranks_and_workers(
    manifest: Manifest, augmented: list[list[Batch]], world_size: int, accumulation: int, workers: int
) -> None:
    order = order_for(manifest, batch_size=6)
    result = batches(manifest, range(6), world_size, accumulation, workers, augment=HALF, order=order)
    assert_same(augmented, result)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 2), (5, 1)])
def test_the_same_after_a_restart(manifest: Manifest, augmented: list[list[Batch]], step: int, workers: int) -> None:
    order = order_for(manifest, batch_size=6)
    assert_same(augmented[step:], batches(manifest, range(step, 6), 3, workers=workers, augment=HALF, order=order))


def test_another_epoch_and_another_seed_augment_differently(manifest: Manifest) -> None:
    """Of the picture, which is the same in each epoch; the captions of a picture take turns."""

    def pictures(seed: int) -> list[tuple[int, bytes]]:
        order = order_of(manifest, "train", 13, seed=seed, shuffle_shards=2)
        steps = batches(manifest, range(4), order=order, augment=Augment(image=ImageAugment(color=1.0)))
        joint = [joined(step) for step in steps]
        return [(sample, bytes(image)) for ids, images, _ in joint for sample, image in zip(ids, images, strict=True)]

    first = pictures(0)
    assert len({sample for sample, _ in first}) < len(first) == 52, "no picture came twice"
    assert len({image for _, image in first}) == 52
    assert not {image for _, image in first} & {image for _, image in pictures(1)}


@pytest.mark.parametrize("shard_groups", [1, 2])
def test_voices_are_of_the_next_batch_and_of_the_same_shard_group(manifest: Manifest, shard_groups: int) -> None:
    reader, order = Reader(manifest), order_for(manifest, shard_groups=shard_groups)
    babble, size = Babble(reader, order, 10**6), 8 // shard_groups
    for position in range(24):
        step, index = divmod(position, 8)
        following, group = order.batch(step + 1), index // size
        rows = slice(group * size, (group + 1) * size)
        allowed = [decode_audio(reader.audio(row)).tobytes() for row in following.captions[rows].tolist()]
        own = int(following.samples[rows][0])  # as if it were in the next batch too, as where an epoch ends
        voices = babble.voices(position, own, np.random.default_rng(position), 99)
        assert len(voices) == size - 1
        assert {voice.tobytes() for voice in voices} == set(allowed[1:])
        few = babble.voices(position, own, np.random.default_rng(position), 2)
        assert [voice.tobytes() for voice in few] == [voice.tobytes() for voice in voices[:2]]


def test_long_voices_are_cut(manifest: Manifest) -> None:
    babble = Babble(Reader(manifest), order_for(manifest), 1500)
    assert {len(voice) for voice in babble.voices(3, -1, np.random.default_rng(0), 8)} == {1500}


def test_unreadable_voices_are_left_out(tmp_path: Path) -> None:
    manifest = noise(tmp_path / "shards", captions=1)
    order = order_for(manifest)
    drawn = partial(Babble(Reader(manifest), order, 10**6).voices, 0, -1)
    before = drawn(np.random.default_rng(0), 8)
    for sample in order.batch(1).samples[:3].tolist():
        spoil(manifest, sample, "audio")
    after = drawn(np.random.default_rng(0), 8)
    assert (len(before), len(after)) == (8, 5)
    step = batches(manifest, range(1), augment=BABBLE)[0]
    assert not [bad for batch in step for bad in batch.bad_samples], "the next batch's samples are not this one's"


def test_a_missing_shard_of_a_voice_is_an_error(tmp_path: Path) -> None:
    manifest = noise(tmp_path / "shards", captions=1)
    order = order_for(manifest)
    needed = {int(shard) for shard in manifest.shard[order.batch(0).samples]}
    others = {int(shard) for shard in manifest.shard[order.batch(1).samples]} - needed
    for shard in others:
        (manifest.folder / manifest.shards[shard].name).unlink()
    assert batches(manifest, range(1))
    settings: dict[str, Any] = {"augment": Augment(SpeechAugment(babble=1.0, babble_voices=8))}
    if others:
        with pytest.raises(UserError, match="make the shards again"):
            batches(manifest, range(1), **settings)
