"""Trunks: pretrained weights from a folder or the hub, partly or completely frozen."""

import abc
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging
from typing_extensions import Self

from shards.errors import UserError
from toolkit.model.lora import MARK, add_adapters

OUTSIDE = "beside."  # prefix for weights of a larger model that are not the trunk's


@dataclass(frozen=True)
class ModelKind:
    """Kinds of saved models that a trunk can be loaded from.

    Attributes:
        name: Name for error messages.
        key: Configuration key of the source, for error messages.
        standalone: Values of `model_type` in config.json if the folder holds the trunk only.
        containers: Values of `model_type` for larger models that contain the trunk.
        key_mapping: Regular expressions and replacements from weight names of a larger model to those of the trunk.
            Other weights get the prefix `OUTSIDE`, because their names may equal those of the trunk's parts.
        unused: Last parts of the names of weights that the folder may have and the trunk does not need.
    """

    name: str
    key: str
    standalone: tuple[str, ...]
    containers: tuple[str, ...] = ()
    key_mapping: dict[str, str] | None = None
    unused: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        """All values of `model_type` that are accepted."""
        return (*self.standalone, *self.containers)


def trained_layers(train: str, total: int, key: str) -> int | None:
    """Return the number of top layers that are trained; None: the complete trunk including its input layers.

    Args:
        train: "none", "all" or a number.
        total: Number of layers of the trunk.
        key: Configuration key, for the error message.

    Raises:
        UserError: The value is neither of these, or exceeds `total`.
    """
    if train == "all":
        return None
    count = 0 if train == "none" else int(train) if train.isdecimal() else -1
    if not 0 <= count <= total:
        raise UserError(f"{key}: expected none, all or a number of layers from 0 to {total}, got {train!r}")
    return count


class PartlyFrozen(nn.Module, abc.ABC):
    """Module with frozen parts, which have no gradients and are always in eval mode, without dropout.

    Attributes:
        trunk: The trunk.
        frozen_layers: Number of its layers, from the input up, that run once for student and teacher, without gradient;
            None: nothing of it does.
        lora: LoRA adapts the trunk.
    """

    trunk: Any
    frozen_layers: int | None
    lora = False

    @abc.abstractmethod
    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the parts that are never trained."""

    @abc.abstractmethod
    def inputs_and_layers(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList]:
        """Return the trunk's modules before its layers, and its layers."""

    def freeze(self) -> None:
        """Freeze these parts; called at the end of the constructor."""
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)
        if self.lora:  # attention pooling, SigLIP's `head`, is trained like a head
            for name, parameter in self.trunk.named_parameters():
                parameter.requires_grad_(MARK in name or name.startswith("head."))

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str], key: str) -> None:
        """Adapt all layers of a frozen trunk by LoRA (see `add_adapters`); they then run with the trained part.

        Args:
            rank: Rank of the adapters.
            alpha: Their output is scaled by `alpha / rank`.
            targets: Last parts of the names of the linear layers to adapt.
            key: Configuration key of the targets, for error messages.

        Raises:
            UserError: peft is not installed, or there are no such linear layers.
        """
        add_adapters(self.trunk, self.inputs_and_layers()[1], rank, alpha, targets, key)
        self.lora, self.frozen_layers = True, 0
        self.freeze()

    def shared_modules(self) -> Iterator[nn.Module]:
        """Yield modules with frozen weights only that the trained part calls, which student and teacher share."""
        if self.lora:
            for module in self.trunk.modules():
                weights = list(module.parameters())
                if weights and next(module.children(), None) is None and not any(w.requires_grad for w in weights):
                    yield module

    def depths(self) -> dict[int, tuple[int, int]]:
        """Map the id of each of the trunk's parameters to its layer and the number of layers.

        Layers count from 1; what is before them is layer 0, and what is after them belongs to the last.
        """
        inputs, layers = self.inputs_and_layers()
        found = {id(parameter): len(layers) for parameter in self.trunk.parameters()}
        found |= {id(parameter): 0 for module in inputs for parameter in module.parameters()}
        for depth, layer in enumerate(layers, start=1):
            found |= {id(parameter): depth for parameter in layer.parameters()}
        return {number: (depth, len(layers)) for number, depth in found.items()}

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for the frozen parts."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


def run_layer(layer: nn.Module, hidden: Tensor, *rest: Any) -> Tensor:
    """Call a layer of a transformers model, whose output is a tensor or, before transformers 5, a tuple."""
    output = layer(hidden, *rest)
    return output[0] if isinstance(output, tuple) else output


def masks_of(layer: nn.Module) -> tuple[None, ...]:
    """Return None for each attention mask that the signature of a layer requires, but a trunk does not need."""
    parameters = inspect.signature(layer.forward).parameters.values()
    required = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return (None,) * (len(required) - 1)


def find_kind(source: str, kinds: Iterable[ModelKind], default: ModelKind) -> ModelKind:
    """Return the kind of a saved model, by `model_type` in its config.json.

    Args:
        source: Local folder or hub id.
        kinds: Accepted kinds, of one configuration key.
        default: Kind of a folder whose config.json does not say; its weights decide then.

    Raises:
        UserError: The source does not exist or is of no accepted kind.
    """
    source, kinds = _checked_source(source, default.key), tuple(kinds)
    with _reading(source, default.key):
        model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    for kind in kinds:
        if model_type in kind.types:
            return kind
    if model_type is None:
        return default
    expected = ", ".join(f"{kind.name} ({' or '.join(kind.types)})" for kind in kinds)
    raise UserError(
        f"{default.key}: {source} holds a model of type {model_type!r} (config.json); expected one of {expected}"
    )


def read_weights(
    load: Callable[..., Any], source: str | Path, kind: ModelKind, optional: Sequence[str] = (), **options: Any
) -> Any:
    """Load a model saved by transformers, and check that all weights were found.

    safetensors files are preferred; a `pytorch_model.bin` is read with torch's weights-only unpickler.

    Args:
        load: `from_pretrained` of the model's class; the source may be a larger model that contains one.
        source: Local folder or hub id.
        kind: Accepted kinds of models.
        optional: Children of the model that are set to None if the source lacks them or has another size of them.
        options: Passed to `load`.

    Raises:
        UserError: The source does not exist, is another kind of model, or has missing, misshapen or unexpected weights.
    """
    source = _checked_source(source, kind.key)
    with _reading(source, kind.key):
        model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
        _check_kind(model_type, source, kind)
        if kind.key_mapping and model_type in kind.containers:
            options["key_mapping"] = kind.key_mapping
        model, info = load(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.endswith(kind.unused)]
    _drop_unread(model, info, optional)
    _check_weights(model, info, f"{kind.key}: {source}")
    return model


def _checked_source(source: str | Path, key: str) -> str:
    """Return a source with the user's home folder filled in; raise an error if it can only be a missing folder."""
    source = os.path.expanduser(source)
    if not os.path.isdir(source) and (source[0] in "/." or source.count("/") != 1):
        raise UserError(f"{key}: no folder {source}: pass a folder written by transformers, or a hub id")
    return source


@contextmanager
def _reading(source: str, key: str) -> Iterator[None]:
    """Read a folder without output; an error becomes one line."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: cannot read {source}: {reason}") from error


def _check_kind(model_type: str | None, source: str, kind: ModelKind) -> None:
    """Check `model_type`; without one in config.json, `_check_weights` decides."""
    supported = kind.types
    if model_type is not None and model_type not in supported:
        raise UserError(
            f"{kind.key}: {source} holds a model of type {model_type!r} (config.json); expected {kind.name}: "
            f"{' or '.join(supported)}"
        )


def _drop_unread(model: nn.Module, info: dict[str, Any], optional: Sequence[str]) -> None:
    """Set optional children that could not be loaded to None, and remove their weights from the loading report."""
    for child in optional:
        of_child = [
            weight
            for problem in ("missing_keys", "mismatched_keys")
            for weight in info[problem]
            if _weight_name(weight).startswith(f"{child}.")
        ]
        if of_child:
            setattr(model, child, None)
            for problem in ("missing_keys", "mismatched_keys"):
                info[problem] = [weight for weight in info[problem] if weight not in of_child]


def _weight_name(weight: Any) -> str:
    """Name of a weight in transformers' loading report, which may be a tuple of name and shapes."""
    return weight if isinstance(weight, str) else weight[0]


def _check_weights(model: nn.Module, info: dict[str, Any], name: str) -> None:
    """Raise an error if weights are missing, of another shape, or more than the configuration has parameters for."""
    unexpected = [weight for weight in info["unexpected_keys"] if _belongs(weight, model)]
    for problem, weights in (
        ("lacks", info["missing_keys"]),
        ("has other shapes of", info["mismatched_keys"]),
        ("has no room in its config.json for", unexpected),
    ):
        if weights:
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            raise UserError(f"{name} {problem} weights of {type(model).__name__}: {min(map(str, weights))}{more}")


def _belongs(name: str, model: nn.Module) -> bool:
    """Whether an unexpected weight belongs to this model, rather than to a larger model that contains it."""
    children = {child for child, _ in model.named_children()}
    inner = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.").removeprefix("vision_model.")
    return name.split(".")[0] in children or inner.split(".")[0] in children


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' loading report and progress bars."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
