"""Keep ranks in step: run a function on rank 0 or on all ranks, and raise on every rank if it fails on one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shards.errors import UserError

T = TypeVar("T")


class RemoteRankError(dist.DistError):
    """Raised here because another rank failed; see its log."""


def run_on_rank_zero(function: Callable[[], T], rank: int) -> T:
    """Call a function on rank 0 only, and broadcast its result, or the exception that it raised, to all ranks."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run_on_all_ranks(function: Callable[[], T], rank: int, world_size: int) -> T:
    """Call a function on every rank, and return each rank its own result; if one call fails, all ranks raise.

    Raises:
        UserError: The function raised one on this rank or, with that rank named, on another.
        RemoteRankError: The function raised another exception on another rank.
        Exception: What the function raised on this rank.
    """
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure, rank, world_size)
    return result


def raise_on_all_ranks(failure: Exception | None, rank: int, world_size: int, reduce_max: int = 0) -> int:
    """Raise on every rank if one of them has failed; costs one reduction of two integers between the hosts.

    Args:
        failure: What this rank caught; None: it succeeded. It is raised here if there is one.
        rank: This process.
        world_size: Number of processes.
        reduce_max: A number of this rank, to be reduced in the same collective.

    Returns:
        The maximum of `reduce_max` over the ranks.

    Raises:
        UserError: Another rank failed with one.
        RemoteRankError: Another rank failed with another exception.
    """
    if world_size > 1:
        reduced = torch.tensor([failure is not None, reduce_max], dtype=torch.int32)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        any_failed, reduce_max = reduced.tolist()
        if any_failed and failure is None:
            reasons: list[Any] = [None] * world_size
            dist.all_gather_object(reasons, None)
            first = next(other for other, reason in enumerate(reasons) if reason)
            kind, line = reasons[first]
            raise kind(f"rank {first}: {line}")
        if failure is not None:
            kind = type(failure) if isinstance(failure, UserError) else RemoteRankError
            line = " ".join(str(failure).split()) or type(failure).__name__
            dist.all_gather_object([None] * world_size, (kind, line))
    if failure is not None:
        raise failure
    return reduce_max
