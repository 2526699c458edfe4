"""Fixtures of these tests."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.writing.writer import Format, write_shards

RATE = 16000


def drawn(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)


def spoken(seed: int) -> tuple[np.ndarray, int]:
    chance = np.random.default_rng(seed)
    return chance.uniform(-0.5, 0.5, (1, chance.integers(RATE // 4, RATE))).astype(np.float32), RATE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 pictures to train on and 6 of dev, with two captions each, all of noise."""
    items = [
        Item(
            f"{split}{n}",
            split,
            partial(drawn, n),
            tuple(Caption(f"{split}{n}-{k}", partial(spoken, 9 * n + k)) for k in range(2)),
        )
        for split, count in (("train", 40), ("dev", 6))
        for n in range(count)
    ]
    folder = tmp_path_factory.mktemp("shards") / "noise"
    write_shards(items, folder, "noise", Format(samples_per_shard=7), {})
    return folder
