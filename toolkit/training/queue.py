"""The queue: vectors of earlier batches as further keys of SIC (MoCo, arXiv 1911.05722; ALBEF, arXiv 2107.07651)."""

import torch
from torch import Tensor, nn

from toolkit.objectives.contrastive import EMPTY


class EmbeddingQueue(nn.Module):
    """Ring of the newest `size` pairs of vectors with the identity of their picture.

    Takes batches of any size, larger than itself too. All ranks push the same gathered rows and so hold the same queue.

    Attributes:
        speech: float32 [size, dim].
        image: float32 [size, dim].
        ids: int64 [size], -1 in a slot not yet written.
        pointer: int64 scalar, the slot that is written next; once the ring is full it holds the oldest pair.
    """

    speech: Tensor
    image: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Make an empty queue.

        Args:
            size: Pairs kept; 0 keeps none.
            dim: Length of the vectors.
        """
        super().__init__()
        self.size = size
        self.register_buffer("speech", torch.zeros(size, dim))
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), EMPTY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, speech: Tensor, image: Tensor, ids: Tensor) -> None:
        """Write pairs over the oldest ones, without waiting for the device.

        Args:
            speech: [n, dim], the oldest first.
            image: [n, dim].
            ids: int64 [n].
        """
        if self.size == 0:
            return
        pushed = len(ids)
        kept = min(pushed, self.size)
        # Of more than the ring holds only the last remain; no slot is written twice, so the write has one outcome.
        slots = (self.pointer + torch.arange(pushed - kept, pushed, device=self.ids.device)) % self.size
        for ring, rows in ((self.speech, speech), (self.image, image), (self.ids, ids)):
            ring.index_copy_(0, slots, rows[pushed - kept :].to(ring.dtype))
        self.pointer.add_(pushed).remainder_(self.size)
