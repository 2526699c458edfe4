"""Counter-based random numbers for the rows of a batch, independent of how the batch is distributed over ranks.

Each number is a hash of the seed, the row's index in the global batch and the position in the row, instead of the next
state of a generator. Every rank computes the numbers of its rows on its device, and longer rows, or more padding, do
not change the numbers before. The hash is the finalizer of SplitMix64 (Steele, Lea, Flood, 2014).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class CounterRNG:
    """Random numbers of some rows.

    Attributes:
        seed: Seed of the step.
        rows: Int64 [B], index of each row in the global batch.
    """

    seed: int
    rows: Tensor

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """Draw from the uniform distribution on [0, 1).

        Args:
            stream: Number of an independent stream.
            shape: Shape per row. The numbers of a row are in the order of the flattened shape, so only the first
                dimension may differ between ranks.

        Returns:
            Float32 [B, *shape].
        """
        key = _mix(self.rows * _to_signed(_STEP) + _to_signed(_mix_int(self.seed + stream * _STEP)))
        index = torch.arange(math.prod(shape), device=self.rows.device)
        bits = _mix(key[:, None] + index * _to_signed(_STEP))
        uniforms = _logical_shift_right(bits, 40).float() / 2**24  # 24 bits are exact in float32
        return uniforms.view(len(self.rows), *shape)

    def normal(self, stream: int, *shape: int) -> Tensor:
        """Draw from the standard normal distribution, float32 [B, *shape], by Box-Muller; uses two streams."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(stream, *shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(stream + 1, *shape))


def _mix(z: Tensor) -> Tensor:
    """Hash 64-bit integers; products wrap around."""
    z = (z ^ _logical_shift_right(z, 30)) * _to_signed(_FIRST)
    z = (z ^ _logical_shift_right(z, 27)) * _to_signed(_SECOND)
    return z ^ _logical_shift_right(z, 31)


def _mix_int(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * _FIRST & _MASK
    z = (z ^ (z >> 27)) * _SECOND & _MASK
    return z ^ (z >> 31)


def _logical_shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros; torch's operator fills with the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _to_signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
