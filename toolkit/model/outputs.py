"""What passes between the model's parts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Features:
    """Output of an encoder's frozen part, computed once and shared by student and teacher.

    Attributes:
        hidden: input of the first trained part: activations [B, L, H], or the prepared waveforms [B, T] or pictures
            [B, 3, S, S] where nothing is frozen.
        mask: bool [B, L] (or [B, T]), True on real positions; None where all are real (pictures).
        states: hidden states [B, L, H] already final, for the layer mix of the speech encoder.
        rows: int64 [B], the rows of the batch that these are; None: all, in order.
    """

    hidden: Tensor
    mask: Tensor | None
    states: tuple[Tensor, ...] = ()
    rows: Tensor | None = None


@dataclass
class Encoded:
    """One modality, encoded.

    Attributes:
        embedding: [B, D] float32 of unit length.
        tokens: [B, L, H] frame or patch features.
        mask: bool [B, L], True on real tokens.
    """

    embedding: Tensor
    tokens: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Encoded":
        """The chosen rows of the batch."""
        return Encoded(self.embedding[rows], self.tokens[rows], self.mask[rows])

    def detach(self) -> "Encoded":
        """The same values, cut from the graph."""
        return Encoded(self.embedding.detach(), self.tokens.detach(), self.mask)
