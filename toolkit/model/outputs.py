"""Data passed between the parts of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Features:
    """Output of an encoder's frozen part, computed once and shared by student and teacher.

    Attributes:
        hidden: Input of the first trained part: activations [B, L, H], or preprocessed waveforms [B, T] or pictures
            [B, 3, S, S] if nothing is frozen.
        mask: Bool [B, L] (or [B, T]), False on padding; None: no padding (pictures).
        states: Hidden states [B, L, H] of the frozen layers, for the layer mix of the speech encoder.
        rows: Int64 [B], positions in the batch; None: the complete batch in order.
    """

    hidden: Tensor
    mask: Tensor | None
    states: tuple[Tensor, ...] = ()
    rows: Tensor | None = None


@dataclass
class Encoded:
    """Output of an encoder.

    Attributes:
        embedding: Float32 [B, D], of unit length.
        tokens: Frame or patch features [B, L, H].
        mask: Bool [B, L], False on padding.
    """

    embedding: Tensor
    tokens: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Encoded":
        """Select rows of the batch."""
        return Encoded(self.embedding[rows], self.tokens[rows], self.mask[rows])

    def detach(self) -> "Encoded":
        """Detach embedding and tokens from the graph."""
        return Encoded(self.embedding.detach(), self.tokens.detach(), self.mask)


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """Concatenate batches along their rows, padded to the longest."""
    length = max(part.tokens.shape[1] for part in parts)
    return Encoded(
        torch.cat([part.embedding for part in parts]),
        torch.cat([pad(part.tokens, length) for part in parts]),
        torch.cat([pad(part.mask, length) for part in parts]),
    )


def pad(rows: Tensor, length: int) -> Tensor:
    """Pad rows [B, L, ...] with zeros to a length: [B, length, ...]."""
    return F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, length - rows.shape[1]))
