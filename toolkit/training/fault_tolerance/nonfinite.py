"""Detection of the first module whose output is not finite."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NonFiniteDetector:
    """Checks the output of every module in a step, and names the first that is not finite.

    The results stay on the device until they are read; each check reads its module's output once more.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Register forward hooks on all submodules of modules, given by a prefix of the submodules' names."""
        self._checks: list[tuple[str, Tensor]] = []
        for prefix, module in modules.items():
            for name, part in module.named_modules():
                full = ".".join(filter(None, (prefix, name))) or "the learner's output"
                part.register_forward_hook(lambda part, inputs, output, full=full: self._check(full, output))

    def reset(self) -> None:
        """Discard the results of the previous step."""
        self._checks.clear()

    def first_module(self) -> str | None:
        """Return the first module of this step with an output that is not finite; waits for the device."""
        if not self._checks:
            return None
        nonfinite = torch.stack([check for _, check in self._checks]).tolist()
        return next(
            (name for (name, _), is_nonfinite in zip(self._checks, nonfinite, strict=True) if is_nonfinite), None
        )

    def describe(self, world_size: int) -> str:
        """Name the first module on every rank that has one; every rank calls this."""
        names: list[str | None] = [None] * world_size
        dist.all_gather_object(names, self.first_module())
        named = [f"rank {rank}: {name}" for rank, name in enumerate(names) if name]
        return "first in " + ", ".join(named) if named else "every module's output is finite: in the backward pass"

    def _check(self, name: str, output: Any) -> None:
        finite = [tensor.detach().isfinite().all() for tensor in _tensors(output) if tensor.is_floating_point()]
        if finite:
            self._checks.append((name, ~torch.stack(finite).all()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
