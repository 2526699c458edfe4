"""Shared memory through which a worker hands its batches over, allocated once and reused.

New shared memory is zeroed page by page on first write, which takes a tenth as long as decoding what is stored in it.
Therefore each worker has a few slots, each large enough for a batch. It writes a batch into a free slot and sends the
slot's number; the reader's tensors are views of the slot, which is free again once the last of them is deleted. A batch
for which no slot is free gets memory of its own.
"""

import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64  # bytes

Layout = list[tuple[torch.dtype, tuple[int, ...]]]  # types and shapes of consecutive tensors


class SharedBuffers:
    """The slots of one worker; created before it is forked, and visible to both processes."""

    def __init__(self, count: int, size: int) -> None:
        """Reserve `count` slots of `size` bytes; pages that are never written take no memory."""
        self.memory = _shared_bytes(count, -(-size // _ALIGNMENT) * _ALIGNMENT)
        self.used = _shared_bytes(count)  # 1 from when the worker takes a slot until the reader frees it

    def take(self, size: int) -> int | None:
        """Take a free slot of at least `size` bytes, if there is one; called by the worker only."""
        free = np.flatnonzero(self.used.numpy() == 0)
        if not len(free) or size > self.memory.shape[1]:
            return None
        self.used[int(free[0])] = 1
        return int(free[0])

    def give_back(self, slot: int) -> None:
        """Mark a slot as free; called by the reader only."""
        self.used[slot] = 0

    def tensors(self, slot: int, layout: Layout) -> list[torch.Tensor]:
        """Return consecutive tensors of the given types and shapes that are views of a slot."""
        return _views(self.memory[slot], layout)

    def lend(self, slot: int, layout: Layout) -> list[torch.Tensor]:
        """Return the same for the reader: the slot is freed when the last of these tensors and their views is gone."""
        array = self.memory[slot].numpy()
        weakref.finalize(array, self.give_back, slot)
        return _views(torch.from_numpy(array), layout)


@dataclass
class SharedBatch:
    """A batch on its way from a worker."""

    worker: int
    slot: int  # slot that holds images and waveforms
    layout: Layout  # their types and shapes
    batch: Any  # the batch with empty images and waveforms

    def open(self, buffers: Sequence[SharedBuffers]) -> Any:
        """Return the batch, with images and waveforms as views of the slot."""
        images, waveforms = buffers[self.worker].lend(self.slot, self.layout)
        return replace(self.batch, images=images, waveforms=waveforms)


def bytes_of(layout: Layout) -> int:
    """Bytes that tensors of the given types and shapes take in a slot."""
    return sum(_bytes(*one) for one in layout)


def _shared_bytes(*shape: int) -> torch.Tensor:
    """Allocate zeroed bytes that this process shares with its forks; a page is allocated on first write.

    The memory has no name, so that no killed process leaves it behind, and does not count against the size of /dev/shm.
    """
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape), flags=flags), dtype=torch.uint8).view(shape)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _views(memory: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    tensors, start = [], 0
    for dtype, shape in layout:
        exact = math.prod(shape) * dtype.itemsize
        tensors.append(memory[start : start + exact].view(dtype).view(shape))
        start += _bytes(dtype, shape)
    return tensors
