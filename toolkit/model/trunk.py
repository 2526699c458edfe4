"""Trunks: pretrained weights from a folder or the hub, frozen in part or whole."""

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

BESIDE = "beside."  # put before the names of a larger model's weights that are not the trunk's


@dataclass(frozen=True)
class Kind:
    """What a trunk may be read from.

    Attributes:
        name: As a message shows it.
        key: Configuration value that names the source, for the messages.
        whole: Values of `model_type` in config.json for folders that hold the trunk as a model of its own.
        within: The same for folders of a larger model.
        renamed: Names of a larger model's weights to those of the trunk: regular expressions and what takes their
            place. What is not the trunk's is put under `BESIDE`, since it may bear the name of one of its parts.
    """

    name: str
    key: str
    whole: tuple[str, ...]
    within: tuple[str, ...] = ()
    renamed: dict[str, str] | None = None


def trained_layers(train: str, total: int, key: str) -> int | None:
    """How many top layers of a trunk of `total` are trained; None: the whole trunk, from the input on.

    Args:
        train: "none", "all" or a number.
        total: layers the trunk has.
        key: name of the configuration value, for the message.

    Raises:
        UserError: it is none of these, or more than there are.
    """
    if train == "all":
        return None
    count = 0 if train == "none" else int(train) if train.isdecimal() else -1
    if not 0 <= count <= total:
        raise UserError(f"{key}: expected none, all or a number of layers from 0 to {total}, got {train!r}")
    return count


class PartlyFrozen(nn.Module, abc.ABC):
    """A module of which some parts are never trained: no gradients, and always in eval mode, so without dropout."""

    @abc.abstractmethod
    def frozen_modules(self) -> Iterator[nn.Module]:
        """The parts that are never trained."""

    def freeze(self) -> None:
        """Take the frozen parts out of training; to be called once they are there."""
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


def run_layer(layer: nn.Module, hidden: Tensor, *rest: Any) -> Tensor:
    """Call a layer of a transformers model, which returns a tensor or, before transformers 5, a tuple."""
    output = layer(hidden, *rest)
    return output[0] if isinstance(output, tuple) else output


def read_weights(
    load: Callable[..., Any], source: str | Path, kind: Kind, optional: Sequence[str] = (), **options: Any
) -> Any:
    """Read a model with all its weights from what transformers wrote.

    safetensors are preferred; a `pytorch_model.bin` is read with torch's weights-only unpickler.

    Args:
        load: `from_pretrained` of the model's class; the folder may hold a larger model that contains one.
        source: local folder or hub id.
        kind: what the source has to be.
        optional: children of the model that the source may lack, or hold at another size: they become None.
        options: passed to `load`.

    Raises:
        UserError: nothing there, another kind of model, or weights that are missing, of another shape or too many.
    """
    source = os.path.expanduser(source)
    if not os.path.isdir(source) and (source[0] in "/." or source.count("/") != 1):
        raise UserError(f"{kind.key}: no folder {source}: give a folder that transformers wrote, or a hub id")
    try:
        with quiet():
            model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
            _check_kind(model_type, source, kind)
            if kind.renamed and model_type in kind.within:
                options["key_mapping"] = kind.renamed
            model, info = load(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{kind.key}: cannot read {source}: {reason}") from error
    _drop_unread(model, info, optional)
    _check_weights(model, info, f"{kind.key}: {source}")
    return model


def _check_kind(model_type: str | None, source: str, kind: Kind) -> None:
    """Refuse another kind of model by its name; a config.json without one is left to the check of the weights."""
    supported = (*kind.whole, *kind.within)
    if model_type is not None and model_type not in supported:
        raise UserError(
            f"{kind.key}: {source} holds a model of type {model_type!r} (config.json); expected {kind.name}: "
            f"{' or '.join(supported)}"
        )


def _drop_unread(model: nn.Module, info: dict[str, Any], optional: Sequence[str]) -> None:
    """Set optional children that could not be read to None, and forget what was said of their weights."""
    for child in optional:
        of_child = [
            weight
            for problem in ("missing_keys", "mismatched_keys")
            for weight in info[problem]
            if _name_of(weight).startswith(f"{child}.")
        ]
        if of_child:
            setattr(model, child, None)
            for problem in ("missing_keys", "mismatched_keys"):
                info[problem] = [weight for weight in info[problem] if weight not in of_child]


def _name_of(weight: Any) -> str:
    """Name of a weight in transformers' report, which gives the shapes of some beside it."""
    return weight if isinstance(weight, str) else weight[0]


def _check_weights(model: nn.Module, info: dict[str, Any], name: str) -> None:
    """Refuse a model part of which is random, or whose file holds more of it than `config.json` makes room for."""
    unplaced = [weight for weight in info["unexpected_keys"] if _belongs(weight, model)]
    for problem, weights in (
        ("lacks", info["missing_keys"]),
        ("has other shapes of", info["mismatched_keys"]),
        ("has no room in its config.json for", unplaced),
    ):
        if weights:
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            raise UserError(f"{name} {problem} weights of {type(model).__name__}: {min(map(str, weights))}{more}")


def _belongs(name: str, model: nn.Module) -> bool:
    """Whether a weight that found no place is of this model, rather than of a larger one around it."""
    children = {child for child, _ in model.named_children()}
    inner = name.removeprefix("hubert.").removeprefix("vision_model.")
    return name.split(".")[0] in children or inner.split(".")[0] in children


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading report and progress bars off the terminal."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
