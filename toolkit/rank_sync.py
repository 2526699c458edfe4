"""Keep ranks in step: run something on rank 0 or on all ranks, and fail on all of them if it fails on one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shards.errors import UserError

T = TypeVar("T")


class RemoteRankError(dist.DistError):
    """Raised here because another rank failed; see its log."""


def run_on_rank_zero(work: Callable[[], T], rank: int) -> T:
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


def run_on_all_ranks(work: Callable[[], T], rank: int, world_size: int) -> T:
    """Do something on every rank and give each its result; if it fails on one, it fails on all, with that one's reason.

    Costs one reduction of two numbers between the hosts.

    Raises:
        UserError: It failed so on another rank; here it raises what it raised.
        PeerError: It failed on another rank, by an error that no user can mend.
    """
    return run_on_all_ranks_with_max(lambda: 0, work, rank, world_size)[0]


def run_on_all_ranks_with_max(
    number: Callable[[], int], work: Callable[[], T], rank: int, world_size: int
) -> tuple[T, int]:
    """Do `run_on_all_ranks`, and in its reduction agree on a number: the greatest of those that the ranks name afterwards."""
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    greatest = number()
    if world_size > 1:
        agreed = torch.tensor([failure is not None, greatest], dtype=torch.int32)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        failed, greatest = agreed.tolist()
        if failed and failure is None:
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
    return result, greatest
