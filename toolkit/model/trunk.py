"""Trunks: pretrained weights from a folder or the hub, partly or completely frozen."""

import abc
import os
from collections.abc import Callable, Iterator, Sequence
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
    """

    name: str
    key: str
    standalone: tuple[str, ...]
    containers: tuple[str, ...] = ()
    key_mapping: dict[str, str] | None = None


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
    """Module with frozen parts, which have no gradients and are always in eval mode, without dropout."""

    @abc.abstractmethod
    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the parts that are never trained."""

    def freeze(self) -> None:
        """Freeze these parts; called at the end of the constructor."""
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)

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
    source = os.path.expanduser(source)
    if not os.path.isdir(source) and (source[0] in "/." or source.count("/") != 1):
        raise UserError(f"{kind.key}: no folder {source}: pass a folder written by transformers, or a hub id")
    try:
        with quiet():
            model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
            _check_kind(model_type, source, kind)
            if kind.key_mapping and model_type in kind.containers:
                options["key_mapping"] = kind.key_mapping
            model, info = load(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{kind.key}: cannot read {source}: {reason}") from error
    _drop_unread(model, info, optional)
    _check_weights(model, info, f"{kind.key}: {source}")
    return model


def _check_kind(model_type: str | None, source: str, kind: ModelKind) -> None:
    """Check `model_type`; without one in config.json, `_check_weights` decides."""
    supported = (*kind.standalone, *kind.containers)
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
    inner = name.removeprefix("hubert.").removeprefix("vision_model.")
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
