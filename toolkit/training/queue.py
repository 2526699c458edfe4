"""Queues: pairs of earlier batches, as keys of SIC and as hard negatives of SIM.

SIC's queue holds embeddings (MoCo, arXiv 1911.05722; ALBEF, arXiv 2107.07651). SIM's holds token sequences as well:
hard negatives are mined in the queue by the contrastive similarities (arXiv 2408.13119).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.model.outputs import Encoded
from toolkit.objectives.contrastive import EMPTY

_KEYS = ("speech", "image", "ids")
_TOKENS = ("speech", "speech_mask", "image")


@dataclass
class ContrastiveKeys:
    """Embeddings that SIC compares with.

    Attributes:
        speech: [M, D].
        image: [M, D].
        ids: int64 [M], identities of the pictures.
    """

    speech: Tensor
    image: Tensor
    ids: Tensor

    def __getitem__(self, rows: slice) -> "ContrastiveKeys":
        """Select rows."""
        return ContrastiveKeys(self.speech[rows], self.image[rows], self.ids[rows])

    def detach(self) -> "ContrastiveKeys":
        """Return the same values, detached from the graph."""
        return ContrastiveKeys(self.speech.detach(), self.image.detach(), self.ids)


@dataclass
class QueuedTokens:
    """A rank's rows of a token queue: those after the batch's in a row exchange.

    Attributes:
        frames: [K * B, L, H] speech.
        mask: uint8 [K * B, L], 1 on real frames.
        patches: [K * B, P, H].
    """

    frames: Tensor
    mask: Tensor
    patches: Tensor


class EmbeddingQueue(nn.Module):
    """Ring buffer of the newest `size` pairs of embeddings with the identity of their picture.

    Accepts batches of any size, also larger than the queue. All ranks push the same gathered rows, so that their queues
    are equal.

    Attributes:
        speech: float32 [size, dim].
        image: float32 [size, dim].
        ids: int64 [size], -1 in a slot that is not written yet.
        pointer: int64 scalar, the slot that is written next; in a full queue it is that of the oldest pair.
    """

    speech: Tensor
    image: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Make an empty queue.

        Args:
            size: Number of pairs; 0: none.
            dim: Length of the embeddings.
        """
        super().__init__()
        self.size = size
        self.register_buffer("speech", torch.zeros(size, dim))
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), EMPTY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, speech: Tensor, image: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest pairs, without waiting for the device.

        Args:
            speech: [n, dim], the oldest first.
            image: [n, dim].
            ids: int64 [n].
        """
        if self.size == 0:
            return
        pushed = len(ids)
        kept = min(pushed, self.size)
        # Of more rows than slots only the last are written; no slot is written twice, so the result is deterministic.
        slots = (self.pointer + torch.arange(pushed - kept, pushed, device=self.ids.device)) % self.size
        for ring, rows in ((self.speech, speech), (self.image, image), (self.ids, ids)):
            ring.index_copy_(0, slots, rows[pushed - kept :].to(ring.dtype))
        self.pointer.add_(pushed).remainder_(self.size)


class TokenQueue:
    """Token sequences of the newest pairs: hard negatives of SIM beyond the batch.

    A ring of blocks, one for each global micro-batch of W * B pairs. The keys are the same on all ranks; the tokens of
    a pair stay on the rank that encoded it, without gradient, and travel only when they are drawn. With the batch as
    block 0, pair i of rank r in block k is

        candidate   k * W * B + r * B + i             index that negatives are drawn from
        global row  r * (1 + K) * B + k * B + i       index that a row exchange requests
        local row   k * B + i on its owner, rank r    global row modulo (1 + K) * B, and their quotient

    `global_rows` converts the first to the second, the plan of a row exchange the second to the third.

    Attributes:
        keys: Embeddings and identities of the K * W * B pairs.
        speech: [K, B, L, H] frames of this rank's pairs, in the model's precision.
        speech_mask: uint8 [K, B, L], 1 on real frames.
        image: [K, B, P, H] patches.
        lengths: Padded length of each block of this rank, in frames.
        block: The block that is written next; in a full queue that of the oldest pairs.
    """

    def __init__(
        self,
        size: int,
        rows: int,
        world_size: int,
        embed_dim: int,
        speech_shape: Sequence[int],
        image_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        on_host: bool = False,
    ) -> None:
        """Make an empty queue.

        Args:
            size: Number of pairs over all ranks, rounded down to complete micro-batches; 0: none.
            rows: B, pairs of a rank in a micro-batch.
            world_size: W, number of ranks; 1 where negatives are drawn from this rank's own pairs only.
            embed_dim: Length of the embeddings.
            speech_shape: Frames of the longest utterance, and their width.
            image_shape: Number of patches, and their width.
            dtype: Type of the tokens.
            device: Where the model computes.
            on_host: Keep the tokens in the CPU's page-locked memory; drawn rows are copied to the device.
        """
        self.blocks, self.rows, self.world_size = size // (rows * world_size), rows, world_size
        self.keys = EmbeddingQueue(self.blocks * rows * world_size, embed_dim).to(device)
        pinned = on_host and torch.device(device).type == "cuda"

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            where = "cpu" if on_host else device
            return torch.zeros(self.blocks, rows, *shape, dtype=of, device=where, pin_memory=pinned)

        self.speech, self.image = empty(*speech_shape), empty(*image_shape)
        self.speech_mask = empty(speech_shape[0], of=torch.uint8)
        self.lengths = [0] * self.blocks
        self.block = 0
        self._written = torch.cuda.Event() if pinned else None

    @property
    def is_local(self) -> bool:
        """Whether it holds this rank's pairs alone; with one process it does."""
        return self.world_size == 1

    @property
    def length(self) -> int:
        """Frames of the longest of this rank's blocks."""
        return max(self.lengths, default=0)

    @torch.no_grad()
    def push(self, speech: Encoded, image: Encoded, speech_keys: Tensor, image_keys: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest micro-batch, without waiting for the device.

        Args:
            speech: This rank's B utterances.
            image: Their pictures.
            speech_keys: [W * B, D] embeddings of all ranks' pairs.
            image_keys: [W * B, D].
            ids: int64 [W * B].
        """
        if not self.blocks:
            return
        length = speech.tokens.shape[1]
        self.speech[self.block, :, :length].copy_(speech.tokens, non_blocking=True)
        self.speech_mask[self.block].zero_()
        self.speech_mask[self.block, :, :length].copy_(speech.mask, non_blocking=True)
        self.image[self.block].copy_(image.tokens, non_blocking=True)
        if self._written:
            self._written.record()
        self.keys.push(speech_keys, image_keys, ids)
        self.lengths[self.block] = length
        self.block = (self.block + 1) % self.blocks

    def global_rows(self, candidates: Tensor) -> Tensor:
        """Convert candidates to global rows (see the class), int64 of any shape; a local queue's owner is rank 0."""
        block, place = candidates // (self.world_size * self.rows), candidates % (self.world_size * self.rows)
        return (place // self.rows) * (1 + self.blocks) * self.rows + block * self.rows + place % self.rows

    def state(self, rank: int) -> dict[str, Tensor]:
        """Return the state of one rank's pairs for a checkpoint."""
        own = slice(rank * self.rows, (rank + 1) * self.rows)
        keys = {name: getattr(self.keys, name).unflatten(0, (self.blocks, -1))[:, own] for name in _KEYS}
        return {
            **{f"{name}_keys": rows.contiguous() for name, rows in keys.items()},
            **{name: getattr(self, name) for name in _TOKENS},
            "lengths": torch.tensor(self.lengths),
            "block": torch.tensor([self.block]),
        }

    @torch.no_grad()
    def load(self, states: Sequence[Callable[[str], Any]], rank: int) -> None:
        """Load the state of a queue of the same size, saved by any number of ranks.

        Args:
            states: For each rank that saved, a function from the name of a tensor in `state` to its slices.
            rank: This rank.

        Raises:
            ValueError: The queue or its micro-batches have another size.
        """
        pairs = self.rows * self.world_size
        shape = [self.blocks, pairs // len(states)]
        if any(list(state("ids_keys").get_shape()) != shape for state in states):
            raise ValueError(f"it does not consist of {self.blocks} micro-batches of {pairs} pairs")
        for name in _KEYS:
            every = torch.cat([state(f"{name}_keys")[:] for state in states], dim=1)
            getattr(self.keys, name).copy_(every.flatten(0, 1))
        self.block = int(states[0]("block")[:])
        self.keys.pointer.fill_(self.block * pairs)
        lengths = torch.zeros(self.blocks, dtype=torch.int64)
        for number, state in enumerate(states):  # its rows of a global micro-batch begin at number * shape[1]
            first, last = max(rank * self.rows, number * shape[1]), min((rank + 1) * self.rows, (number + 1) * shape[1])
            if first < last:
                ours, theirs = (slice(first - at, last - at) for at in (rank * self.rows, number * shape[1]))
                for name in _TOKENS:
                    getattr(self, name)[:, ours].copy_(state(name)[:, theirs])
                lengths = torch.maximum(lengths, state("lengths")[:])
        self.lengths = lengths.tolist()

    def tokens(self, length: int) -> QueuedTokens | None:
        """Return this rank's rows, cut to a number of frames; None: the queue has size 0."""
        if not self.blocks:
            return None
        if self._written:
            self._written.synchronize()
        speech, mask = self.speech[:, :, :length], self.speech_mask[:, :, :length]
        return QueuedTokens(speech.flatten(0, 1), mask.flatten(0, 1), self.image.flatten(0, 1))
