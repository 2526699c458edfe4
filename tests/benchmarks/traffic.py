"""Bytes that a rank exchanges with other ranks, counted by wrapping the collectives of torch.distributed.

Counts are those of a ring algorithm, which is the lower bound: with N ranks, each sends and receives on average
(N - 1) / N of the input of a broadcast or reduce, twice that in an all-reduce, and N - 1 times its own shard in an
all-gather or reduce-scatter. An all-to-all is counted as it is, without the rows that a rank keeps.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

import toolkit.distributed


class Traffic:
    """Counter of the collectives that this process calls.

    Attributes:
        bytes: Bytes received, by kind of collective.
        enabled: Whether calls are counted.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        self.enabled = False
        self._in_collective = False

    @property
    def total(self) -> float:
        """Bytes received in all collectives."""
        return sum(self.bytes.values())

    def wrap_collectives(self) -> None:
        """Wrap the collectives for the rest of the process; call this before DeepSpeed is imported."""
        for names, received_bytes in _RECEIVED_BYTES:
            for name in names:
                if hasattr(dist, name):
                    wrapped = self._wrap(names[0], getattr(dist, name), received_bytes)
                    setattr(dist, name, wrapped)
                    setattr(distributed_c10d, name, wrapped)
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        toolkit.distributed._all_gather_single = getattr(dist, gather)

    def _wrap(
        self, kind: str, function: Callable[..., Any], received_bytes: Callable[..., float]
    ) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled or self._in_collective:  # a collective may be implemented by another
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            self.bytes[kind] = self.bytes.get(kind, 0.0) + received_bytes(dist.get_world_size(), *bound.args)
            self._in_collective = True
            try:
                return function(*args, **kwargs)
            finally:
                self._in_collective = False

        return counted


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_broadcast(ranks: int, tensor: Tensor, *_: Any) -> float:
    return (ranks - 1) / ranks * _nbytes(tensor)


def _bytes_all_reduce(ranks: int, tensor: Tensor, *_: Any) -> float:
    return 2 * (ranks - 1) / ranks * _nbytes(tensor)


def _bytes_all_gather(ranks: int, _: Any, own: Tensor, *__: Any) -> float:
    return (ranks - 1) * _nbytes(own)


def _bytes_reduce_scatter(ranks: int, own: Tensor, *_: Any) -> float:
    return (ranks - 1) * _nbytes(own)


def _bytes_all_to_all(ranks: int, output: Tensor, _: Tensor, output_split_sizes: list[int], *__: Any) -> float:
    return (1 - output_split_sizes[dist.get_rank()] / max(1, sum(output_split_sizes))) * _nbytes(output)


# Names of each collective across PyTorch versions, and the bytes that a rank receives in it.
_RECEIVED_BYTES: list[tuple[tuple[str, ...], Callable[..., float]]] = [
    (("all_reduce",), _bytes_all_reduce),
    (("broadcast",), _bytes_broadcast),
    (("reduce",), _bytes_broadcast),
    (("all_gather", "all_gather_single", "all_gather_into_tensor", "_all_gather_base"), _bytes_all_gather),
    (
        ("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base"),
        _bytes_reduce_scatter,
    ),
    (("all_to_all_single",), _bytes_all_to_all),
]
