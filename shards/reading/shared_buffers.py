"""Memory in which a worker leaves its batches, the same pages again and again.

New shared memory is zeroed page by page as it is first written, which takes a tenth as long as decoding what goes in.
So a worker has a few slots of a batch each. It fills a free one and sends its number; the reader's tensors lie on the
slot, and when the last of them is gone the slot is free again. Where none is free, a batch has memory of its own.
"""

import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

_ALIGNED = 64  # bytes

Layout = list[tuple[torch.dtype, tuple[int, ...]]]  # of tensors that lie behind one another


class SharedBuffers:
    """The slots of one worker; made before it is forked, and known to both sides."""

    def __init__(self, count: int, size: int) -> None:
        """Set aside `count` slots of `size` bytes; pages that are never written take no memory."""
        self.memory = _inherited(count, -(-size // _ALIGNED) * _ALIGNED)
        self.used = _inherited(count)  # 1 from when a worker takes a slot until the reader lets go of it

    def take(self, size: int) -> int | None:
        """Take a free slot of at least `size` bytes, if there is one; called by the worker only."""
        free = np.flatnonzero(self.used.numpy() == 0)
        if not len(free) or size > self.memory.shape[1]:
            return None
        self.used[int(free[0])] = 1
        return int(free[0])

    def give_back(self, slot: int) -> None:
        """Let a slot be filled again; called by the reader only."""
        self.used[slot] = 0

    def tensors(self, slot: int, wanted: Layout) -> list[torch.Tensor]:
        """Lay tensors of the given types and shapes on a slot, one behind the other."""
        return _laid_out(self.memory[slot], wanted)

    def lend(self, slot: int, wanted: Layout) -> list[torch.Tensor]:
        """The same for the reader: the slot is given back when the last of these tensors and their views is gone."""
        array = self.memory[slot].numpy()
        weakref.finalize(array, self.give_back, slot)
        return _laid_out(torch.from_numpy(array), wanted)


@dataclass
class SharedBatch:
    """A batch on its way: its pictures and waveforms in a slot, the rest here."""

    worker: int
    slot: int
    wanted: Layout
    rest: Any

    def open(self, slots: Sequence[SharedBuffers]) -> Any:
        """Put the batch together again, on the slot."""
        images, waveforms = slots[self.worker].lend(self.slot, self.wanted)
        return replace(self.rest, images=images, waveforms=waveforms)


def bytes_of(wanted: Layout) -> int:
    """Bytes that tensors of the given types and shapes take in a slot."""
    return sum(_bytes(*one) for one in wanted)


def _inherited(*shape: int) -> torch.Tensor:
    """Make bytes, all zero, that this process shares with those it forks; a page is taken when it is first written.

    They have no name, so that no kill leaves them behind, and do not count against the size of /dev/shm.
    """
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape), flags=flags), dtype=torch.uint8).view(shape)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED


def _laid_out(memory: torch.Tensor, wanted: Layout) -> list[torch.Tensor]:
    tensors, start = [], 0
    for dtype, shape in wanted:
        exact = math.prod(shape) * dtype.itemsize
        tensors.append(memory[start : start + exact].view(dtype).view(shape))
        start += _bytes(dtype, shape)
    return tensors
