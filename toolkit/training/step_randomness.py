"""Random numbers of a step's micro-batches: functions of seed and step, so that no generator's state is ever saved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.reading.order import Order, rank_slice
from toolkit.objectives.counter_rng import CounterRNG


@dataclass
class StepRandomness:
    """Random numbers of one micro-batch on this rank.

    Attributes:
        negatives: [2, B] uniform in [0, 1), for drawing hard negatives; a row's numbers do not depend on world size.
        noise: Generator of the denoising's noise, indexed by the rows' indices in the step's global batch.
    """

    negatives: Tensor
    noise: CounterRNG


def seed_micro_batch(
    seed: int, step: int, micro: int, accumulation: int, order: Order, rank: int, world_size: int, device: torch.device
) -> StepRandomness:
    """Make a micro-batch's random numbers, and seed torch's global generators for its dropout.

    Only dropout masks differ between ranks.

    Args:
        seed: Seed of the run.
        step: The optimizer step.
        micro: The micro-batch in the step.
        accumulation: Micro-batches a step.
        order: Order of the samples, which places this rank's rows in the global batch.
        rank: This process.
        world_size: Number of processes.
        device: Where the numbers are used.
    """
    number = step * accumulation + micro
    rows = order.batch_size // (accumulation * world_size)
    # By micro-batch, because a row draws among its micro-batch's candidates.
    common = torch.Generator().manual_seed(_mix(seed, number, 0))
    uniforms = torch.rand(2, world_size * rows, generator=common)
    torch.manual_seed(_mix(seed, number, rank + 1))  # dropout
    indices = rank_slice(order.batch_size, micro, accumulation, rank, world_size, order.shard_groups)
    # The noise by step: the indices distinguish the micro-batches, so that it does not depend on their number.
    return StepRandomness(
        uniforms[:, rank * rows : (rank + 1) * rows].to(device, non_blocking=True),
        CounterRNG(_mix(seed, step, 0), torch.from_numpy(indices).to(device, non_blocking=True)),
    )


def _mix(seed: int, number: int, stream: int) -> int:
    """Mix a run's seed, the number of a micro-batch or step, and a stream into one 63-bit seed."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
