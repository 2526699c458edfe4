"""Collectives on tensors: gathers with and without gradient, several tensors at once, and the exchange of single rows.

Rank and world size are arguments; with a world size of 1 no process group is used. Every rank calls each function, in
the same order. The global batch is the concatenation of the ranks' batches: row `i` of rank `r` is global row
`r * B + i`.

Gradients are those of the sum of the ranks' losses. With the ranks' gradients averaged afterwards, as in data
parallelism, N ranks with a loss that is a mean over B rows have exactly one rank's gradient on N * B rows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.launcher import check_alone

# torch 2.13 renamed all_gather_into_tensor and warns of the old name; earlier versions have only that one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(tensor: Tensor, world_size: int) -> Tensor:
    """Concatenate the ranks' tensors, without gradient.

    Args:
        tensor: [B, ...], of equal shape and dtype on all ranks.
        world_size: Number of ranks.

    Returns:
        [world_size * B, ...] in the order of ranks; with one rank the tensor itself.
    """
    if world_size == 1:
        return tensor
    gathered = tensor.new_empty((world_size * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_single(gathered, tensor.detach().contiguous())
    return gathered


def begin_all_gather(tensor: Tensor, world_size: int) -> tuple[Tensor, Any]:
    """Start an `all_gather` among two ranks or more, asynchronously.

    Args:
        tensor: [B, ...], contiguous, of equal shape and dtype on all ranks; must not change until it is sent.
        world_size: Number of ranks.

    Returns:
        [world_size * B, ...] in the order of ranks, and a handle: call its `wait()` before using them.
    """
    gathered = tensor.new_empty((world_size * tensor.shape[0], *tensor.shape[1:]))
    return gathered, _all_gather_single(gathered, tensor, async_op=True)


def gather_with_grad(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """Concatenate the ranks' tensors; gradients of all ranks flow back to the rank that owns a row.

    Args:
        tensor: [B, ...], of equal shape and dtype on all ranks.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        [world_size * B, ...] in the order of ranks; with one rank the tensor itself.
    """
    return tensor if world_size == 1 else _Gather.apply(tensor, rank, world_size)


def gather_packed(
    floats: Sequence[Tensor], integers: Sequence[Tensor], rank: int, world_size: int, differentiable: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Gather several tensors of the same rows in one collective.

    They are packed as columns of float32: narrower floats are converted, which is exact, and integers are stored as the
    bits of two float32 each, which the collective copies unchanged.

    Args:
        floats: [B, D_k], float32 or narrower; the shapes and types are the same on all ranks.
        integers: int64, int32 or bool [B], identities or flags.
        rank: This rank.
        world_size: Number of ranks; with one the tensors are returned as they are.
        differentiable: Gradients of the floats flow back as in `gather_with_grad`.

    Returns:
        The tensors with [world_size * B, ...], of their types, in the order of ranks.
    """
    if world_size == 1:
        return list(floats), list(integers)
    bits = [each.to(torch.int64).contiguous().view(-1, 1).view(torch.float32) for each in integers]
    columns = [*(each.float() for each in floats), *bits]
    packed = torch.cat(columns, dim=1)
    packed = gather_with_grad(packed, rank, world_size) if differentiable else all_gather(packed, world_size)
    parts = packed.split([column.shape[1] for column in columns], dim=1)
    numbers = [part.detach().contiguous().view(torch.int64).view(-1) for part in parts[len(floats) :]]
    return (
        [part.to(each.dtype) for part, each in zip(parts, floats, strict=False)],
        [number.to(each.dtype) for number, each in zip(numbers, integers, strict=True)],
    )


class RowExchange:
    """Exchange of rows of the global batch between ranks; only the requested rows are sent.

    The host has to know the sizes of the exchange, and the requested rows are computed on the device: this is the one
    place of a training step that waits for the device. All requests are gathered in one collective; their copy to the
    host starts at once and is waited for at its first use, so that work queued in between hides the wait. The padded
    lengths of the ranks are gathered with them.
    """

    def __init__(self, index: Tensor, lengths: Sequence[int], rank: int, world_size: int) -> None:
        """Gather the requests of all ranks.

        Args:
            index: int64 [K, n], the global rows that this rank requests of K batches; n is the same on all ranks.
            lengths: This rank's sequence length in each of the K batches.
            rank: This rank.
            world_size: Number of ranks; with one nothing is sent or read.
        """
        self.index, self.lengths = index, list(lengths)
        self.rank, self.world_size = rank, world_size
        self._plans: dict[tuple[int, int], _Plan] = {}
        if world_size > 1:
            own = [index.flatten(), *(index.new_full((1,), length) for length in lengths)]  # filled on the device
            every = all_gather(torch.cat(own), world_size)
            self._host = every.to("cpu", non_blocking=True).view(world_size, -1)  # into pinned memory
            self._arrived = torch.cuda.Event() if index.is_cuda else None
            if self._arrived:
                self._arrived.record()

    def longest(self, batch: int) -> int:
        """Return the greatest of the ranks' lengths in a batch."""
        if self.world_size == 1:
            return self.lengths[batch]
        return int(self._read()[:, self.index.numel() + batch].max())

    def fetch(self, batch: int, tensor: Tensor, constant: Tensor | None = None) -> Tensor:
        """Fetch the requested rows.

        Differentiable: the gradient of a row is sent back to its owner, summed over the ranks that requested it.

        Args:
            batch: Index of the batch, below K.
            tensor: [B, ...], of equal shape and dtype on all ranks.
            constant: [C, ...], further rows after those of `tensor`, without gradient, on the device or the CPU; rank r
                then owns the global rows from r * (B + C) on.

        Returns:
            [n, ...], the rows in the order of the index.
        """
        if self.world_size == 1:
            return _select(tensor, constant, self.index[batch], None)
        plan = self._plan(batch, tensor.shape[0] + (0 if constant is None else constant.shape[0]), tensor.device)
        rows = _select(tensor, constant, plan.rows, plan.host_rows)
        arrived = _Exchange.apply(rows, plan.sent, plan.received)  # by owner
        return arrived.index_select(0, plan.place)

    def _plan(self, batch: int, rows: int, device: torch.device) -> "_Plan":
        count = self.index.shape[1]
        if (batch, rows) not in self._plans:
            wanted = self._read()[:, batch * count : (batch + 1) * count]  # [requesting rank, n]
            self._plans[batch, rows] = _plan(wanted, rows, self.rank, device)
        return self._plans[batch, rows]

    def _read(self) -> Tensor:
        if self._arrived:
            self._arrived.synchronize()
        return self._host


@dataclass
class _Plan:
    """An exchange of rows: numbers sent to and received from each rank, own rows to send, places of received rows."""

    sent: list[int]
    received: list[int]
    rows: Tensor
    host_rows: Tensor
    place: Tensor


def _plan(wanted: Tensor, rows: int, rank: int, device: torch.device) -> _Plan:
    """Plan the exchange of the requests of all ranks, [requesting rank, n] on the host, with `rows` rows a rank.

    Global row g is row `g % rows` of rank `g // rows`.
    """
    owner = wanted // rows
    mine = owner == rank
    sent, received = mine.sum(1).tolist(), torch.bincount(owner[rank], minlength=len(wanted)).tolist()
    requested = wanted[mine] % rows  # by requesting rank
    place = owner[rank].argsort(stable=True).argsort()
    if device.type == "cuda":
        requested, place = requested.pin_memory(), place.pin_memory()  # for asynchronous copies
    return _Plan(
        sent, received, requested.to(device, non_blocking=True), requested, place.to(device, non_blocking=True)
    )


def _select(tensor: Tensor, constant: Tensor | None, rows: Tensor, host_rows: Tensor | None) -> Tensor:
    """Select rows [n, ...] of a tensor [B, ...] and of the constant rows after it, which may be on the CPU."""
    if constant is None or not len(constant):
        return tensor.index_select(0, rows)
    first = len(tensor)
    if constant.device != tensor.device:
        picked = (rows.cpu() if host_rows is None else host_rows).sub(first).clamp(min=0)
        behind = constant.index_select(0, picked).to(tensor.device, non_blocking=True)
    else:
        behind = constant.index_select(0, rows.sub(first).clamp(min=0))
    within = (rows < first).view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(within, tensor.index_select(0, rows.clamp(max=first - 1)), behind)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the ranks' gradients and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.first, ctx.rows = rank * tensor.shape[0], tensor.shape[0]
        return all_gather(tensor, world_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # All-reduce and a slice: in the oldest supported torch, gloo has no reduce-scatter.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.rows], None, None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, `sent[r]` to and `received[r]` from rank r; its backward sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent), None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived


def init_distributed() -> tuple[int, int, torch.device]:
    """Initialize the process group from the launcher's environment; without a launcher, with a world size of 1.

    Reads the variables of torchrun, the DeepSpeed launcher and `launch/job.py`: RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT. An initialized process group is used as it is.

    Returns:
        Rank, world size and the device of this process.

    Raises:
        UserError: There are several processes without rank variables.
    """
    check_alone(os.environ)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), device
