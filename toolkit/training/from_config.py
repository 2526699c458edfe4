"""Parts of a run that are made from the configuration: its micro-batches and SIM's queue."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE
from shards.reading.dataset import Batch
from shards.reading.loader import load_batches
from shards.reading.order import Order
from toolkit.config.schema import Config, micro_batch
from toolkit.data import open_reader
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.metrics.flops import count_frames, count_patches
from toolkit.training.queue import TokenQueue


def open_batches(
    config: Config,
    manifests: Sequence[Manifest],
    order: Order,
    steps: range,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Read a rank's micro-batches of some steps.

    Args:
        config: The configuration.
        manifests: The data sets that the order numbers.
        order: Order of the samples.
        steps: Optimizer steps to read for; a restarted run passes those that remain.
        rank: This process.
        world_size: Number of processes.
        device: Where the batches are used.

    Raises:
        UserError: A shard is missing or damaged, or too many samples cannot be read.
        TransientError: A worker was killed or hangs, or a disk or network does not answer.
    """
    data = config.data
    return load_batches(
        open_reader(data, *manifests),
        order,
        steps,
        image_size=data.image_size,
        resize=data.resize,
        augment=data.augment,
        max_seconds=data.max_seconds,
        accumulation=config.training.accumulation,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        pin=device.type == "cuda",
        timeout=data.timeout,
        max_bad_samples=data.max_bad_samples,
        max_bad_samples_in_a_row=data.max_bad_samples_in_a_row,
    )


def make_token_queue(
    config: Config, model: SpeechImageModel, world_size: int, device: torch.device
) -> TokenQueue | None:
    """Make the queue of SIM's negatives; None where they come from the batch alone."""
    matching = config.objectives.matching
    if not (matching.weight and matching.queue):
        return None
    longest = np.array([int(config.data.max_seconds * SAMPLE_RATE)])
    return TokenQueue(
        matching.queue,
        micro_batch(config, world_size),
        world_size if matching.negatives == "global" else 1,
        config.model.embed_dim,
        (int(count_frames(model.speech, longest)[0]), model.speech.token_dim),
        (count_patches(model.image, config.data.image_size), model.image.token_dim),
        torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        device,
        matching.queue_on == "host",
    )
