"""Low-rank adapters on the linear layers of a frozen trunk (LoRA, arXiv 2106.09685), by peft.

.. math:: y = W x + (alpha / rank) B A x

W is frozen; A and B are trained. An export has :math:`W + (alpha / rank) B A` in its place, and needs no peft.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shards.errors import UserError

MARK = "lora_"  # in the names of the adapters' weights, and of no other
_BASE = ".base_layer."


def add_adapters(
    trunk: nn.Module, layers: nn.ModuleList, rank: int, alpha: float, targets: Sequence[str], key: str
) -> None:
    """Add adapters to the layers of a trunk, in place; they change nothing before they are trained.

    Args:
        trunk: The trunk.
        layers: Its layers.
        rank: Rank of the adapters.
        alpha: Their output is scaled by `alpha / rank`.
        targets: Last parts of the names of the linear layers to adapt.
        key: Configuration key of the targets, for error messages.

    Raises:
        UserError: peft is not installed, or no layer has such a linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs peft: pip install 'speech-image-toolkit[lora]'") from None
    of_layers = {id(module) for module in layers.modules()}
    linear = [
        name for name, module in trunk.named_modules() if isinstance(module, nn.Linear) and id(module) in of_layers
    ]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if target not in known:
            raise UserError(f"{key}: the trunk's layers have no linear layer {target!r}; they have {', '.join(known)}")
    chosen = [name for name in linear if name.rpartition(".")[2] in targets]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), trunk)  # type: ignore[arg-type]
    for module in layers.modules():
        if next(module.children(), None) is not None:
            _hold_as_buffers(module)


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add adapters to the weights that they adapt.

    Args:
        model: The model, whose adapters' scales are read.
        state: Weights by their names in the model; all of an adapted layer.

    Returns:
        Weights by the names of a model without adapters; without adapters, those of `state`.
    """
    found = {}
    for name, value in state.items():
        if MARK in name:
            continue
        if name.endswith(f"{_BASE}weight"):
            layer = name.removesuffix(f"{_BASE}weight")
            module: Any = model.get_submodule(layer)
            down, up = (state[f"{layer}.{MARK}{part}.default.weight"].float() for part in "AB")
            value = (value.float() + module.scaling["default"] * (up @ down)).to(value.dtype)
        found[name.replace(_BASE, ".")] = value
    return found


def _hold_as_buffers(module: nn.Module) -> None:
    """Make the frozen parameters that a module uses beside those of its children buffers.

    The teacher shares the modules that hold frozen weights, and with them ZeRO-3's hooks. It cannot share a module with
    trained children, such as WavLM's attention, and ZeRO-3 would partition that module's own parameters.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
