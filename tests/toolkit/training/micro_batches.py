"""A micro-batch of noise for tiny models, and its random numbers."""

import torch

from shards.reading.dataset import Batch
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.training.step_randomness import StepRandomness


def tiny_batch(*lengths: int) -> Batch:
    """Pairs of a picture and an utterance of so many samples, each of its own identity."""
    images = torch.randint(0, 256, (len(lengths), 3, 32, 32), dtype=torch.uint8)
    waves = torch.randn(len(lengths), max(lengths))
    return Batch(images, waves, torch.tensor(lengths), torch.arange(len(lengths)))


def even_draws(rows: int) -> StepRandomness:
    """Negatives drawn in the middle of their distribution, and noise of seed 0."""
    return StepRandomness(torch.full((2, rows), 0.5), CounterRNG(0, torch.arange(rows)))
