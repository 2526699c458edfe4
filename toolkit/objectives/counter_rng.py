"""Random numbers of the rows of a batch that do not depend on how the batch is cut over ranks.

A generator gives the n-th number to whoever asks n-th. Here a number is a hash of the seed, of the row's place in the
global batch and of its index in the row: every rank computes those of its rows, on its own device, and a longer row, or
one padded further, only has more of them. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class CounterRNG:
    """The numbers of some rows.

    Attributes:
        seed: Of the step.
        rows: int64 [B], each row's place in the global batch.
    """

    seed: int
    rows: Tensor

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """Draw from [0, 1).

        Args:
            stream: Which numbers; two streams share none.
            shape: Of a row. The numbers of a row are those of the flattened shape, so only the first extent may vary
                between ranks.

        Returns:
            float32 [B, *shape].
        """
        key = _mixed(self.rows * _signed(_STEP) + _signed(_mixed_on_host(self.seed + stream * _STEP)))
        index = torch.arange(math.prod(shape), device=self.rows.device)
        bits = _mixed(key[:, None] + index * _signed(_STEP))
        return (_shifted(bits, 40).float() / 2**24).view(len(self.rows), *shape)  # 24 bits are exact in float32

    def normal(self, stream: int, *shape: int) -> Tensor:
        """Draw from the standard normal distribution, float32 [B, *shape], by Box and Muller; takes two streams."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(stream, *shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(stream + 1, *shape))


def _mixed(z: Tensor) -> Tensor:
    """Scatter 64-bit integers; products wrap around."""
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _mixed_on_host(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * _FIRST & _MASK
    z = (z ^ (z >> 27)) * _SECOND & _MASK
    return z ^ (z >> 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros coming in: torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
