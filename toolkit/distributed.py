"""Tensors across ranks: gathers with and without gradient, and the fetch of single rows.

Rank and world size are arguments; a world of one touches no process group. Every rank calls each function, in the same
order. The global batch is the ranks' batches behind one another: row `r` of rank `o` is global row `o * B + r`.

Gradients are those of the sum of the ranks' losses. With the ranks' gradients averaged afterwards, as data parallelism
does, N ranks with a loss that is a mean over B rows give exactly one rank's gradient on N * B rows.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

# torch 2.13 renamed all_gather_into_tensor and warns of the old name; earlier versions know only that one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(tensor: Tensor, world_size: int) -> Tensor:
    """Put the ranks' tensors behind one another, without gradient.

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


def gather_with_grad(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """Put the ranks' tensors behind one another; every rank's use of a row flows back to the rank that owns it.

    Args:
        tensor: [B, ...], of equal shape and dtype on all ranks.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        [world_size * B, ...] in the order of ranks; with one rank the tensor itself.
    """
    return tensor if world_size == 1 else _Gather.apply(tensor, rank, world_size)


def fetch_rows(tensor: Tensor, index: Tensor, rank: int, world_size: int) -> Tensor:
    """Take rows of the global batch by index; only the rows asked for travel.

    Differentiable: the gradient of a row goes back to its owner, summed over all that asked for it. Reads the indices
    of all ranks on the host once, for the sizes of the exchange.

    Args:
        tensor: [B, ...], of equal shape and dtype on all ranks (see `pad_to_common_length`).
        index: int64 [n], global rows that this rank wants; n is the same on all ranks.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        [n, ...], the rows in the order of `index`.
    """
    if world_size == 1:
        return tensor.index_select(0, index)
    wanted = all_gather(index, world_size).view(world_size, -1).cpu()  # [asking rank, n]
    owner = wanted // tensor.shape[0]
    mine = owner == rank
    rows = (wanted[mine] % tensor.shape[0]).to(tensor.device)  # what the others want of this rank, by asking rank
    sent, received = mine.sum(1).tolist(), torch.bincount(owner[rank], minlength=world_size).tolist()
    arrived = _Exchange.apply(tensor.index_select(0, rows), sent, received)  # by owner
    place = owner[rank].argsort(stable=True).argsort()
    return arrived.index_select(0, place.to(tensor.device))


def pad_to_common_length(tokens: Tensor, mask: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Pad sequences with zeros to the longest of all ranks. Reads that length on the host.

    Args:
        tokens: [B, L, H]; L may differ between ranks.
        mask: bool [B, L], True = real.
        world_size: Number of ranks; with one nothing changes.

    Returns:
        Tokens [B, L', H] and mask [B, L'], L' the same on all ranks.
    """
    if world_size == 1:
        return tokens, mask
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the ranks' gradients and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.first, ctx.rows = rank * tensor.shape[0], tensor.shape[0]
        return all_gather(tensor, world_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # All-reduce and a cut, because gloo's reduce-scatter came later than the oldest torch that is supported.
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


def initialise() -> tuple[int, int, torch.device]:
    """Join the process group that the launcher's environment describes; alone, be a world of one.

    Understands what torchrun, the DeepSpeed launcher and `launch/job.py` set: RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT. A group that stands already is used as it is.

    Returns:
        Rank, world size and the device of this process.
    """
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


def agree(work: Callable[[], T], rank: int) -> T:
    """Do something on rank 0 alone and give its result, or the exception that it raised, to all ranks."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
