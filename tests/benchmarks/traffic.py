"""Bytes that a rank exchanges with the others, counted where torch.distributed is called.

What is counted is what a ring moves, the least that can be: of N ranks each sends and receives, on the average,
(N - 1) / N of what a broadcast, reduction or scattering reduction is given, twice that in an all-reduce, and N - 1
times its own part in a gather. An exchange of rows is counted as it is, without the rows that a rank keeps.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

import toolkit.distributed


class Traffic:
    """Bytes received by kind of collective, and how many collectives there were."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.on = False
        self._inside = False

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.bytes.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done inside."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def watch(self) -> None:
        """Wrap the collectives, for the rest of the process; before DeepSpeed is imported."""
        for names, measure in _MEASURES:
            for name in names:
                if hasattr(dist, name):
                    wrapped = self._wrapped(names[0], getattr(dist, name), measure)
                    setattr(dist, name, wrapped)
                    setattr(distributed_c10d, name, wrapped)
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        toolkit.distributed._all_gather_single = getattr(dist, gather)

    def _wrapped(self, kind: str, function: Callable[..., Any], measure: Callable[..., float]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.on or self._inside:  # one collective may be made of another
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            self.bytes[kind] = self.bytes.get(kind, 0.0) + measure(dist.get_world_size(), *bound.args)
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return counted


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shared(ranks: int, tensor: Tensor, *_: Any) -> float:
    return (ranks - 1) / ranks * _size(tensor)


def _all_reduced(ranks: int, tensor: Tensor, *_: Any) -> float:
    return 2 * (ranks - 1) / ranks * _size(tensor)


def _gathered(ranks: int, _: Any, own: Tensor, *__: Any) -> float:
    return (ranks - 1) * _size(own)


def _scattered(ranks: int, own: Tensor, *_: Any) -> float:
    return (ranks - 1) * _size(own)


def _exchanged(ranks: int, arrived: Tensor, _: Tensor, received: list[int], *__: Any) -> float:
    return (1 - received[dist.get_rank()] / max(1, sum(received))) * _size(arrived)


# Names of one collective, of several versions of torch, and what a rank receives in it.
_MEASURES: list[tuple[tuple[str, ...], Callable[..., float]]] = [
    (("all_reduce",), _all_reduced),
    (("broadcast",), _shared),
    (("reduce",), _shared),
    (("all_gather", "all_gather_single", "all_gather_into_tensor", "_all_gather_base"), _gathered),
    (("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base"), _scattered),
    (("all_to_all_single",), _exchanged),
]
