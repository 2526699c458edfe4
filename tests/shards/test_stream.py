"""The stream: the same batches for any number of ranks, workers and restarts; damage is named."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shards.audio import SAMPLE_RATE, decode_audio
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.manifest import Manifest, load
from shards.order import order_of
from shards.stream import Batch, Reader, open_stream
from shards.write import Format, write_shards

MAX_SECONDS = 0.3


def drawn(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def spoken(seed: int) -> tuple[np.ndarray, int]:
    chance = np.random.default_rng(seed)
    return chance.uniform(-0.5, 0.5, (1, chance.integers(2000, 8000))).astype(np.float32), SAMPLE_RATE


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    items = [
        Item(
            f"p{n}",
            "train",
            partial(drawn, n),
            tuple(Caption(f"p{n}-{k}", partial(spoken, 7 * n + k), f"text {n} {k}") for k in range(3)),
        )
        for n in range(26)
    ]
    write_shards(items, tmp_path / "shards", "noise", Format(samples_per_shard=5), {})
    return load(tmp_path / "shards")


def batches(
    manifest: Manifest, steps: range, world_size: int = 1, micros: int = 1, workers: int = 0
) -> list[list[Batch]]:
    """All ranks' micro-batches of each step, in global order."""
    order = order_of(manifest, "train", 8, seed=3, window=2)
    streams = [
        open_stream(
            manifest, order, steps, image_size=16, max_seconds=MAX_SECONDS, micros=micros,
            rank=rank, world_size=world_size, workers=workers,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found = []
    for _ in steps:
        parts = [[next(stream) for stream in streams] for _ in range(micros)]
        found.append([batch for part in parts for batch in part])
    for stream in streams:
        assert next(stream, None) is None, "the stream goes on after its last step"
    return found


def joined(parts: list[Batch]) -> tuple[np.ndarray, list[bytes], list[bytes]]:
    """Ids, pictures and cut waveforms of a global batch."""
    ids = torch.cat([b.ids for b in parts]).numpy()
    pictures = [image.numpy().tobytes() for b in parts for image in b.images]
    waves = [wave[:n].numpy().tobytes() for b in parts for wave, n in zip(b.waveforms, b.lengths, strict=True)]
    return ids, pictures, waves


@pytest.mark.parametrize(("world_size", "micros", "workers"), [(2, 1, 0), (1, 2, 0), (2, 2, 0), (4, 1, 0), (1, 1, 2)])
def test_global_batches_do_not_depend_on_the_cluster(
    manifest: Manifest, world_size: int, micros: int, workers: int
) -> None:
    for one, other in zip(
        batches(manifest, range(5)), batches(manifest, range(5), world_size, micros, workers), strict=True
    ):
        a, b = joined(one), joined(other)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]


def test_a_resumed_stream_goes_on_with_the_same_bytes(manifest: Manifest) -> None:
    whole = batches(manifest, range(7))
    rest = batches(manifest, range(4, 7), world_size=2)
    for one, other in zip(whole[4:], rest, strict=True):
        assert joined(one)[1:] == joined(other)[1:]


def test_batches_hold_the_pictures_and_captions_that_were_written(manifest: Manifest) -> None:
    reader = Reader(manifest)
    for (batch,) in batches(manifest, range(3)):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 16, 16)
        for sample, wave, length in zip(batch.ids, batch.waveforms, batch.lengths, strict=True):
            captions = [decode_audio(reader.audio(row)) for row in manifest.captions(int(sample))]
            cut = wave[:length].numpy()
            assert len(cut) == min(int(MAX_SECONDS * SAMPLE_RATE), len(cut))
            assert not wave[length:].any(), "padding is not zero"
            assert any(_holds(caption, cut) for caption in captions), "not a caption of this picture"


def _holds(caption: np.ndarray, cut: np.ndarray) -> bool:
    return any(np.array_equal(caption[start : start + len(cut)], cut) for start in range(len(caption) - len(cut) + 1))


def test_reader_returns_the_members(manifest: Manifest) -> None:
    reader = Reader(manifest)
    meta = reader.meta(4)
    assert meta["image_id"] == manifest.image_id[4].decode()
    assert [caption["text"] for caption in meta["captions"]] == [f"text 4 {k}" for k in range(3)]
    assert reader.picture(4)[:2] == b"\xff\xd8"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_in_one_line(manifest: Manifest, workers: int) -> None:
    shard = manifest.folder / manifest.shards[0].name
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=shard.name) as caught:
        batches(manifest, range(5), workers=workers)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(manifest: Manifest) -> None:
    (manifest.folder / manifest.shards[2].name).unlink()
    with pytest.raises(UserError, match=manifest.shards[2].name):
        batches(manifest, range(5))
