"""Where numbers that are not finite come from: the first module whose output holds one."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteDetector:
    """Looks at the output of every module of a step, and names the first that is not finite.

    The looks stay on the device until a name is asked for; each costs a pass over the output.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Watch some modules and all that are in them.

        Args:
            modules: By the name that is put before those of their parts; empty: none is.
        """
        self._looks: list[tuple[str, Tensor]] = []
        for prefix, module in modules.items():
            for name, part in module.named_modules():
                full = ".".join(filter(None, (prefix, name))) or "the losses"
                part.register_forward_hook(lambda part, inputs, output, full=full: self._look(full, output))

    def begin(self) -> None:
        """Forget the step before."""
        self._looks.clear()

    def name(self) -> str | None:
        """The first module of this step with a bad output; waits for the device. None: every output is finite."""
        if not self._looks:
            return None
        bad = torch.stack([look for _, look in self._looks]).tolist()
        return next((name for (name, _), is_bad in zip(self._looks, bad, strict=True) if is_bad), None)

    def _look(self, name: str, output: Any) -> None:
        finite = [tensor.detach().isfinite().all() for tensor in _tensors(output) if tensor.is_floating_point()]
        if finite:
            self._looks.append((name, ~torch.stack(finite).all()))


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
