"""Common parts of the training benchmarks: scaled-down models, batches with realistic durations, and a trainer.

The trainer is the project's own, with its engine, teacher and queue; its batches are generated in memory.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.media.audio import SAMPLE_RATE
from shards.reading.dataset import Batch
from shards.writing.writer import Format, write_shards
from toolkit.config import schema as config
from toolkit.distributed import init_distributed
from toolkit.training.trainer import Trainer

# SpokenCOCO: 742 hours in 617,222 captions are 4.33 s each, and 384 captions are longer than 15 s.
MEAN_SECONDS, SIGMA = 4.33, 0.41


def durations(rng: np.random.Generator, count: int, max_seconds: float) -> np.ndarray:
    """Return durations of captions in seconds as in SpokenCOCO: log-normal, truncated at `max_seconds`."""
    mu = math.log(MEAN_SECONDS) - SIGMA**2 / 2
    return np.minimum(rng.lognormal(mu, SIGMA, count), max_seconds)


def make_speech(rng: np.random.Generator, size: int, max_seconds: float) -> tuple[torch.Tensor, list[int]]:
    """Return noise [B, T] with SpokenCOCO's durations, zero-padded, and its lengths in samples."""
    lengths = [int(seconds * SAMPLE_RATE) for seconds in durations(rng, size, max_seconds)]
    waveforms = torch.zeros(size, max(lengths))
    for row, length in zip(waveforms, lengths, strict=True):
        row[:length] = torch.from_numpy(0.1 * rng.standard_normal(length, np.float32))
    return waveforms, lengths


def make_batch(seed: int, size: int, image_size: int, max_seconds: float, identities: int = 2**31) -> Batch:
    """Return a batch of noise on the CPU, in the format of the loader, with the durations of SpokenCOCO."""
    rng = np.random.default_rng(seed)
    waveforms, lengths = make_speech(rng, size, max_seconds)
    images = torch.from_numpy(rng.integers(0, 256, (size, 3, image_size, image_size), np.uint8))
    ids = torch.from_numpy(rng.choice(identities, size, replace=False).astype(np.int64))
    return Batch(images, waveforms, torch.tensor(lengths), ids, tuple(lengths))


def frozen_model(width: int = 128, layers: int = 8) -> config.Model:
    """Return the large reference scaled to an eighth of its width and a third of its depth.

    Frozen trunks, a speech head of one layer, and fusion. HuBERT-large and CLIP ViT-L/14 have 24 layers of 1024, the
    fusion 6 of 768. The numbers of frames and patches are unchanged: 50 per second and 256. There are three
    convolutions instead of seven, since narrow ones take more time on a CPU than their FLOPs suggest.
    """
    trunk = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
    }
    hubert = {
        **trunk,
        "conv_dim": [width // 2] * 3,
        "conv_kernel": [20, 16, 8],
        "conv_stride": [10, 8, 4],
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    }
    vit = {**trunk, "image_size": 224, "patch_size": 14}
    return config.Model(
        embed_dim=width,
        speech=config.Speech(config=hubert, train="none", head_layers=1, head_heads=4, dropout=0.0),
        image=config.Image(config=vit, train="none", head_layers=0, head_heads=4, dropout=0.0),
        fusion=config.Fusion(width=3 * width // 4, layers=2, heads=4, pool=2, dropout=0.0),
    )


def _placeholder_picture() -> Image.Image:
    return Image.new("RGB", (8, 8))


def _placeholder_audio() -> tuple[np.ndarray, int]:
    return np.full((1, 1600), 0.1, np.float32), SAMPLE_RATE


@contextmanager
def open_trainer(configuration: config.Config) -> Iterator[Trainer]:
    """Open a trainer in the process group, if any, with a temporary run folder and placeholder shards."""
    rank, world_size, device = init_distributed()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        configuration.data.shards = str(Path(folder, "shards"))
        items = [
            Item(f"{n:03d}", "train", _placeholder_picture, (Caption(f"{n:03d}", _placeholder_audio),))
            for n in range(256)
        ]
        write_shards(items, Path(folder, "shards"), "benchmark", Format(samples_per_shard=64), {})
        configuration.wandb.mode = "disabled"
        run = Path(folder, "run")
        run.mkdir()
        trainer = Trainer(configuration, run, rank, world_size, device)
        yield trainer
        trainer.close()
