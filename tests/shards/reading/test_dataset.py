"""Batches: the same for any number of ranks, workers and restarts; bad samples are replaced or named."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from shards.errors import UserError
from shards.manifest import Manifest, load
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture
from shards.reading.cache import Cache
from shards.reading.dataset import Batch
from shards.reading.loader import load_batches
from shards.reading.order import Order, order_of, rank_slice
from shards.reading.reader import Reader
from tests.shards.media.noise import drawn, noise, spoil
from tests.shards.media.picture_files import saved

MAX_SECONDS = 0.3
ROOT = Path(__file__).parents[3]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return noise(tmp_path / "shards")


def order_for(*manifests: Manifest, shard_groups: int = 1, batch_size: int = 8) -> Order:
    weights = [1.0, 2.0][: len(manifests)]
    return order_of(
        manifests, "train", batch_size, seed=3, shuffle_shards=2, shard_groups=shard_groups, weights=weights
    )


def opened(reader: Reader, order: Order, steps: range, **settings: Any) -> Any:
    settings = {"accumulation": 1, "rank": 0, "world_size": 1, "workers": 0} | settings
    return load_batches(reader, order, steps, image_size=16, max_seconds=MAX_SECONDS, **settings)


def batches(
    manifest: Manifest, steps: range, world_size: int = 1, accumulation: int = 1, workers: int = 0, **settings: Any
) -> list[list[Batch]]:
    """All ranks' micro-batches of each step, in global order."""
    order = settings.pop("order", None) or order_for(manifest)
    reader = settings.pop("reader", None) or Reader(manifest)
    streams = [
        opened(
            reader,
            order,
            steps,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            workers=workers,
            **settings,
        )
        for rank in range(world_size)
    ]
    steps_read = []
    for _ in steps:
        parts = [[next(stream) for stream in streams] for _ in range(accumulation)]
        steps_read.append([batch for part in parts for batch in part])
    for stream in streams:
        assert next(stream, None) is None, "there is a batch after the last step"
    return steps_read


def joined(parts: list[Batch]) -> tuple[list[int], list[bytes], list[bytes]]:
    """Ids, pictures and cut waveforms of a global batch."""
    ids = torch.cat([b.ids for b in parts]).tolist()
    pictures = [image.numpy().tobytes() for b in parts for image in b.images]
    waves = [wave[:n].numpy().tobytes() for b in parts for wave, n in zip(b.waveforms, b.lengths, strict=True)]
    return ids, pictures, waves


def assert_same(ones: list[list[Batch]], others: list[list[Batch]]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        a, b = joined(one), joined(other)
        assert a[0] == b[0]
        assert a[1:] == b[1:]


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers"), [(2, 1, 0), (1, 2, 0), (2, 2, 0), (8, 1, 0), (2, 1, 3)]
)
def test_global_batches_do_not_depend_on_the_cluster(
    manifest: Manifest, world_size: int, accumulation: int, workers: int
) -> None:
    assert_same(batches(manifest, range(5)), batches(manifest, range(5), world_size, accumulation, workers))


@pytest.mark.parametrize(("broken", "seed"), [(False, 0), (True, 1), (True, 2)])
def test_resumed_in_mid_epoch_on_another_cluster_the_rest_is_what_was_left(
    manifest: Manifest, broken: bool, seed: int
) -> None:
    """Two epochs of 26 pictures in steps of 8; resumed at a random step with other numbers of ranks and workers."""
    for sample in (1, 12, 13, 20) if broken else ():
        spoil(manifest, sample, "image" if sample % 2 else "audio")
    chance = np.random.default_rng(seed)
    stop = int(chance.integers(1, 6))
    (before, workers), (after, others) = [(2 ** int(chance.integers(0, 3)), int(w)) for w in chance.integers(0, 3, 2)]
    uninterrupted = batches(manifest, range(7))
    assert_same(uninterrupted[:stop], batches(manifest, range(stop), before, workers=workers))
    assert_same(uninterrupted[stop:], batches(manifest, range(stop, 7), after, workers=others))
    ids = [n for step in uninterrupted[:3] for n in joined(step)[0]]
    assert len(set(ids)) == 24 or broken
    assert all(len(set(joined(step)[0])) == 8 for step in uninterrupted), "a picture is in a batch twice"
    assert bool(sum(len(b.bad_samples) for step in uninterrupted for b in step)) == broken


@pytest.mark.parametrize(("shard_groups", "world_size", "accumulation"), [(1, 2, 1), (2, 1, 2), (2, 2, 1), (2, 4, 2)])
def test_mixtures_and_shard_groups_hold_the_right_bytes(
    manifest: Manifest, tmp_path: Path, shard_groups: int, world_size: int, accumulation: int
) -> None:
    both = (manifest, noise(tmp_path / "more", captions=2, first=500))
    order, reader = order_for(*both, shard_groups=shard_groups), Reader(*both)
    indices = {
        index: None
        for micro in range(accumulation)
        for rank in range(world_size)
        for index in rank_slice(8, micro, accumulation, rank, world_size, shard_groups).tolist()
    }
    for step, parts in enumerate(batches(manifest, range(8), world_size, accumulation, order=order, reader=reader)):
        chosen = order.batch(step).part(list(indices))
        ids, pictures, waves = joined(parts)
        assert ids == chosen.samples.tolist()
        for n, sample in enumerate(ids):
            assert pictures[n] == decode_picture(reader.picture(sample), 16).tobytes()
            caption = decode_audio(reader.audio(int(chosen.captions[n])))
            assert _holds(caption, np.frombuffer(waves[n], np.float32))


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_cropped_or_squashed_as_configured(tmp_path: Path, monkeypatch: Any, workers: int) -> None:
    monkeypatch.setattr("tests.shards.media.noise.drawn", lambda seed: drawn(seed).resize((72, 24)))
    oblong = noise(tmp_path / "oblong")
    reader = Reader(oblong)
    for resize in ("crop", "squash"):
        for (batch,) in batches(oblong, range(2), workers=workers, resize=resize):
            for sample, image in zip(batch.ids.tolist(), batch.images, strict=True):
                assert np.array_equal(image, decode_picture(reader.picture(sample), 16, resize=resize))


def test_batches_hold_the_pictures_and_captions_that_were_written(manifest: Manifest) -> None:
    reader = Reader(manifest)
    for (batch,) in batches(manifest, range(3)):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 16, 16)
        for sample, wave, length in zip(batch.ids, batch.waveforms, batch.lengths, strict=True):
            captions = [decode_audio(reader.audio(row)) for row in manifest.captions(int(sample))]
            assert length <= int(MAX_SECONDS * SAMPLE_RATE)
            assert not wave[length:].any(), "padding is not zero"
            assert any(_holds(caption, wave[:length].numpy()) for caption in captions), "not a caption of this picture"


def test_a_worker_fills_the_same_memory_again_and_no_batch_in_use_is_touched(manifest: Manifest) -> None:
    steps = range(30)
    plain = opened(Reader(manifest), order_for(manifest), steps)
    in_shared_memory, kept = 0, []
    for number, batch in enumerate(opened(Reader(manifest), order_for(manifest), steps, workers=1)):
        in_shared_memory += batch.images.untyped_storage().nbytes() > batch.images.nbytes
        expected = next(plain)
        assert torch.equal(batch.waveforms, expected.waveforms), "what was there before shows in the padding"
        if number in (3, 10):
            kept.append((batch.images[1:], batch.waveforms[2], expected))
    assert in_shared_memory >= 20, "batches take new memory"
    for images, wave, expected in kept:
        assert torch.equal(images, expected.images[1:])
        assert torch.equal(wave, expected.waveforms[2])


def _holds(caption: np.ndarray, cut: np.ndarray) -> bool:
    return any(np.array_equal(caption[start : start + len(cut)], cut) for start in range(len(caption) - len(cut) + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    memory = fsspec.filesystem("memory")
    for path in manifest.folder.iterdir():
        memory.pipe_file(f"/far/{path.name}", path.read_bytes())
    far = load("memory://far")
    for cache in (None, Cache(tmp_path / "cache"), Cache(tmp_path / "small", 3 * far.shards[0].bytes / 1e9)):
        remote = batches(far, range(9), 2, workers=workers, reader=Reader(far, cache=cache))
        assert_same(batches(manifest, range(9)), remote)
    small = [line for line in caplog.messages if "less than two shuffle blocks of 2 shards" in line]
    assert len(small) == 2, "each of two ranks warns once that the cache is small"


def test_workers_fetch_ahead(manifest: Manifest, tmp_path: Path) -> None:
    far, fetched = load(f"file://{manifest.folder}"), tmp_path / "cache"
    order = order_of(far, "train", 4, seed=3, shuffle_shards=1)
    stream = opened(Reader(far, cache=Cache(fetched)), order, range(1), workers=1)
    next(stream)
    now, later = ({int(far.shard[s]) for s in order.batch(step).samples} for step in (0, 1))
    assert later - now
    deadline = time.monotonic() + 10
    while len(list(fetched.glob("*.tar"))) < len(now | later) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {path.stem for path in fetched.glob("*.tar")} == {far.shards[n].sha256 for n in now | later}


@pytest.mark.parametrize(("rank", "world_size", "shards"), [(0, 1, 8), (1, 2, 4)])
def test_the_shuffle_block_of_every_shard_group_that_a_rank_reads_has_to_fit_the_cache(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, world_size: int, shards: int
) -> None:
    far = load(f"file://{manifest.folder}")
    bound = (shards - 0.5) * max(shard.bytes for shard in far.shards) / 1e9
    order, reader = order_for(far, shard_groups=2), Reader(far, cache=Cache(tmp_path / "cache", bound))
    next(opened(reader, order, range(1), rank=rank, world_size=world_size))
    assert len(caplog.messages) == 1
    assert f"less than two shuffle blocks of {shards // 2} shards" in caplog.messages[0]


# Bad samples.


def hour() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(3600 * SAMPLE_RATE, np.int16), SAMPLE_RATE, format="FLAC")
    return buffer.getvalue()


class Poisoned(Reader):
    """A reader with something else in some members."""

    pictures: dict[int, bytes]
    captions: dict[int, bytes]

    def picture(self, sample: int) -> bytes:
        return self.pictures.get(sample) or super().picture(sample)

    def audio(self, caption: int) -> bytes:
        return self.captions.get(caption) or super().audio(caption)


class Stuck(Reader):
    """A reader whose disk responds to the first `answers` reads of a process only."""

    answers = 0

    def picture(self, sample: int) -> bytes:
        self.answers -= 1
        if self.answers < 0:
            threading.Event().wait()
        return super().picture(sample)


def test_bombs_and_endless_audio_are_replaced_and_named(manifest: Manifest) -> None:
    reader = Poisoned(manifest)
    reader.pictures = {
        2: saved("PNG", Image.new("1", (9000, 9000))),
        3: saved("PPM", Image.new("L", (40, 40))),
        4: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    reader.captions = dict.fromkeys(manifest.captions(5), hour())
    read = batches(manifest, range(4), reader=reader)
    bad_samples = {bad_sample.sample: bad_sample.reason for (batch,) in read for bad_sample in batch.bad_samples}
    assert set(bad_samples) >= {"p2", "p3", "p4", "p5"}
    assert "9000 x 9000 pixels, the limit is 50,000,000" in bad_samples["p2"]
    assert "not JPEG or PNG or WEBP" in bad_samples["p3"]
    assert "not JPEG or PNG or WEBP" in bad_samples["p4"]
    assert "audio of 3600.0 s in a shard" in bad_samples["p5"]
    assert not {2, 3, 4, 5} & {n for (batch,) in read for n in batch.ids.tolist()}


def test_a_bad_sample_is_replaced_as_the_order_says_and_counted(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    order, bad = order_for(manifest), 9
    spoil(manifest, bad)
    step, index = next((t, b.tolist().index(bad)) for t in range(9) if bad in (b := order.batch(t).samples))
    (batch,) = batches(manifest, range(step, step + 1))[0]
    assert int(batch.ids[index]) == order.replacement(step, index, 1)[0]
    (bad_sample,) = batch.bad_samples
    assert (bad_sample.sample, bad_sample.step, bad_sample.row) == ("p9", step, index)
    assert bad_sample.shard == str(manifest.folder / "train-000001.tar")
    assert caplog.messages == [f"replaced unreadable {bad_sample}"]
    moved = batch.to(torch.device("cpu"))
    assert moved.bad_samples == [bad_sample]
    assert torch.equal(moved.ids, batch.ids)


def test_the_same_bad_samples_are_allowed_in_every_epoch(manifest: Manifest) -> None:
    for sample in (2, 9):
        spoil(manifest, sample)
    read = batches(manifest, range(26), max_bad_samples=2)  # 8 epochs
    bad_samples = [bad_sample.sample for (batch,) in read for bad_sample in batch.bad_samples]
    assert set(bad_samples) == {"p2", "p9"}
    assert len(bad_samples) >= 16


def test_a_bad_sample_that_comes_again_in_a_batch_counts_once(manifest: Manifest) -> None:
    """A batch of 8 of 20 pictures leaves 12 to replace them with: indices 0 and 4 try the same three of these."""
    few = noise(manifest.folder / "few", pictures=20)
    order = order_for(few)
    good = {order.replacement(0, index, 2)[0] for index in range(4)}
    for sample in set(range(20)) - good:
        spoil(few, sample)
    (batch,) = batches(few, range(1), order=order, reader=Reader(few), max_bad_samples=16)[0]
    assert set(batch.ids.tolist()) == good
    assert len(batch.bad_samples) == 20


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_bad_samples": 6}, r"samples, 7 in all, could not"),
        ({"max_bad_samples_in_a_row": 4}, r"samples, 5 in a row, could not"),
    ],
)
def test_too_many_bad_samples_are_an_error(
    manifest: Manifest, workers: int, limits: dict[str, int], reason: str
) -> None:
    for sample in range(26):
        spoil(manifest, sample)
    with pytest.raises(UserError, match=reason) as caught:
        batches(manifest, range(5), workers=workers, **limits)
    assert "shards/train-00000" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_shard_is_no_bad_sample(
    manifest: Manifest, caplog: pytest.LogCaptureFixture, workers: int, how: str
) -> None:
    shard = manifest.folder / manifest.shards[0].name
    shard.write_bytes(shard.read_bytes()[:3000]) if how == "truncated" else shard.unlink()
    with pytest.raises(UserError, match=shard.name) as caught:
        batches(manifest, range(5), workers=workers)
    assert "\n" not in str(caught.value)
    assert not caplog.messages


def test_a_batch_that_is_too_broken_is_not_tried_to_its_end(manifest: Manifest) -> None:
    for sample in range(26):
        spoil(manifest, sample)
    reader = Stuck(manifest)
    reader.answers = 7
    with pytest.raises(UserError, match="7 in all"):
        batches(manifest, range(5), reader=reader, max_bad_samples=6)
