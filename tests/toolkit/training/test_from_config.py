"""Training reads what the configuration describes."""

from pathlib import Path

import pytest
import torch

from tests.shards.media.noise import noise
from toolkit.config.schema import Config
from toolkit.data import open_order
from toolkit.training.from_config import open_batches


@pytest.fixture
def config(tmp_path: Path) -> Config:
    noise(tmp_path / "shards")
    config = Config()
    config.data.shards, config.data.image_size, config.data.workers = str(tmp_path / "shards"), 16, 0
    config.training.batch_size = 6
    return config


def read(config: Config, steps: range, world_size: int = 1) -> tuple[list[bytes], list[bytes]]:
    """Bytes of the images and waveforms of all ranks, in the order of the global batches."""
    manifests, order = open_order(config, world_size)
    streams = [
        open_batches(config, manifests, order, steps, rank, world_size, torch.device("cpu"))
        for rank in range(world_size)
    ]
    batches = [next(stream) for _ in steps for stream in streams]
    images = [image.numpy().tobytes() for batch in batches for image in batch.images]
    pairs = [pair for batch in batches for pair in zip(batch.waveforms, batch.lengths, strict=True)]
    return images, [wave[:length].numpy().tobytes() for wave, length in pairs]


def test_training_batches_are_augmented_as_configured(config: Config) -> None:
    images, waves = read(config, range(3))
    config.data.augment.speech.gain = config.data.augment.image.color = 1.0
    augmented = read(config, range(3))
    assert not set(images) & set(augmented[0])
    assert not set(waves) & set(augmented[1])
    assert read(config, range(1, 3), world_size=3) == (augmented[0][6:], augmented[1][6:])
    config.seed = 1
    assert not set(read(config, range(3))[1]) & set(augmented[1])
