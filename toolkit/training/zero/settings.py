"""DeepSpeed's configuration: derived from the sections of ours, with the section `deepspeed` on top."""

import copy
import sys
from collections.abc import Iterator, KeysView
from typing import Any

from shards.errors import UserError
from toolkit.config.load import merged, nearest
from toolkit.config.schema import Config, micro_batch

# Keys of DeepSpeed that are derived from other sections, and the keys there. The log, the dry run, the estimate of
# memory and the exported model read those, so that another value here would make them wrong.
_DECIDED_BY = {
    "train_batch_size": "--training.batch_size",
    "train_micro_batch_size_per_gpu": "--training.batch_size and --training.accumulation",
    "gradient_accumulation_steps": "--training.accumulation",
    "gradient_clipping": "--training.grad_clip",
    "optimizer": "--training.lr, weight_decay and betas",
    "scheduler": "--training.lr, warmup_steps and min_lr",
    "zero_optimization.stage": "--training.zero_stage",
    "bf16.enabled": "--training.precision bf16 or fp32",
    "bfloat16.enabled": "--training.precision bf16 or fp32",
    "fp16.enabled": "--training.precision bf16 or fp32; there is no fp16",
    "torch_autocast.enabled": "--training.precision bf16 or fp32",
    "data_types.param_dtype": "--training.precision bf16 or fp32",
    "wandb.enabled": "--wandb.mode",
}
# Keys with the only value that the trainer supports: PyTorch's AdamW on float32 weights, for the mean loss of the
# ranks, which have different samples.
_FIXED = {
    "zero_force_ds_cpu_optimizer": False,  # offloading works with torch's AdamW too, and compiles nothing
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "fp16.fp16_master_weights_and_grads": False,
    "gradient_allreduce_op": "mean",
    "sequence_parallel_size": 1,
    "bf16.check_grad_overflow": True,  # else a step with non-finite gradients would be applied
    "zero_optimization.compute_grad_norm": True,
}
_SECTIONS = list(dict.fromkeys(key.split(".")[0] for key in (*_DECIDED_BY, *_FIXED) if "." in key))
_AUTO_SECTIONS = ("zero_optimization", "bf16", "fp16")  # DeepSpeed reads "auto" in them as its own default
_AUTO_KEYS = ("data_types.keep_in_fp32_modules", "pipeline.stages")  # "auto" is a value of these


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Derive the dictionary that `deepspeed.initialize` takes; the optimizer is made by the trainer.

    Under bf16 the gradients of accumulated micro-batches are added up in bf16, which loses the small ones;
    `deepspeed.data_types.grad_accum_dtype: fp32` adds them up in float32, at the stages that can.

    Args:
        config: Its section `deepspeed` overrides the settings derived from the others. It may repeat a derived key with
            the same value, and in one of its sections also as "auto".
        world_size: Number of ranks.

    Raises:
        UserError: DeepSpeed does not have a key or rejects a value; a derived key has another value; the batch does not
            divide.
    """
    training = config.training
    bf16 = training.precision == "bf16"
    derived = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.grad_clip,
        "zero_optimization": {"stage": training.zero_stage},
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,  # the trainer writes the log
    }
    unset = {
        "fp16": {"enabled": False},
        "bfloat16": {"enabled": bf16},
        "torch_autocast": {"enabled": False},
        "data_types": {"param_dtype": training.precision},
        "wandb": {"enabled": False},
    }
    settings = merged(derived, _remove_derived(config.deepspeed, merged(unset, derived)))
    _check(settings)
    _refuse(settings)
    return settings


def _remove_derived(free: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return the section `deepspeed` without the keys that are derived from other sections.

    Args:
        free: The section; it is not changed.
        ours: The derived values, nested as in DeepSpeed's configuration.

    Raises:
        UserError: One of the keys has another value, or the value "auto" where DeepSpeed does not support it.
    """
    free = copy.deepcopy(free)
    for name in _SECTIONS:
        if not isinstance(free.get(name, {}), dict):
            raise UserError(f"deepspeed.{name} is {free[name]!r}; expected a section with keys in it")
    for key in (*_DECIDED_BY, *_FIXED):
        *path, name = key.split(".")
        section = _lookup(free, path)
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        decided = _FIXED[key] if key in _FIXED else _lookup(ours, key.split("."))
        if value != decided and not (path and value == "auto"):
            fix = f"it is always {decided!r} here" if key in _FIXED else f"set {_DECIDED_BY[key]}"
            raise UserError(f"deepspeed.{key} cannot be set here; {fix}")
    _refuse_auto(free)
    return {name: value for name, value in free.items() if value != {}}


def _lookup(values: Any, path: list[str]) -> Any:
    """Look up a path in nested mappings; None: there is no such key."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _refuse_auto(values: dict[str, Any], prefix: str = "") -> None:
    """Reject "auto" where DeepSpeed would read it as true, or fail at the first step only."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            if key not in _AUTO_SECTIONS:
                _refuse_auto(value, f"{key}.")
        elif value == "auto" and key not in _AUTO_KEYS:
            raise UserError(f"deepspeed.{key} is 'auto', which is for other trainers; give a value, or leave it out")


def _refuse(settings: dict[str, Any]) -> None:
    """Reject settings that the trainer does not support, or that DeepSpeed rejects late.

    State on NVMe has no address, which checkpoints and the teacher's average need. Accumulating gradients in another
    type than the model's disables stage 0, and at stage 1 the flat tensors of the masters, unless the optimizer is
    offloaded.
    """
    zero, model = settings["zero_optimization"], "bf16" if settings["bf16"].get("enabled") else "fp32"
    accumulation_dtype = (settings.get("data_types") or {}).get("grad_accum_dtype") or model
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if accumulation_dtype not in ("bf16", "fp32"):
        raise UserError(f"deepspeed.data_types.grad_accum_dtype is {accumulation_dtype!r}; expected bf16 or fp32")
    if accumulation_dtype != model and int(zero["stage"]) < (1 if offloaded else 2):
        raise UserError(
            f"deepspeed.data_types.grad_accum_dtype is {accumulation_dtype} and the model {model}, which "
            f"ZeRO {zero['stage']} cannot do; set --training.zero_stage 2 or 3"
        )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            raise UserError(f"deepspeed.zero_optimization.{section}.device is nvme, which cannot be saved; set cpu")


def _check(settings: dict[str, Any]) -> None:
    """Let DeepSpeed parse the settings; reject what it rejects, and unknown keys that it would ignore.

    It ignores unknown keys outside its typed sections. The keys that it has are recorded as it reads them.
    """
    from toolkit.training.zero import deepspeed_import  # noqa: F401  # isort: skip  before all else of DeepSpeed
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    # Without the product of micro-batch, accumulation and ranks DeepSpeed does not need a process group here.
    watched = _Watched({key: value for key, value in settings.items() if key != "train_batch_size"})
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        raise UserError(_explain(error, settings)) from None
    except (AssertionError, AttributeError, DeepSpeedConfigError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"deepspeed: {' '.join(str(error).split())}") from None
    for key, known in watched.unread("deepspeed"):
        raise UserError(f"{key}: unknown key; did you mean {nearest(key, known)}?")


class _Watched(dict[str, Any]):
    """A mapping that records which of its keys are read, and so do the mappings in it."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: _Watched(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.read_keys: set[Any] = set()

    def __getitem__(self, key: str) -> Any:
        self.read_keys.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read_keys.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        self.read_keys.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.read_keys.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        """A view that reads through this object."""
        return KeysView(self)

    def unread(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Yield each key that was not read, with those that were; of a mapping without reads, all keys are valid."""
        for key, value in super().items():
            if self.read_keys and key not in self.read_keys:
                yield f"{name}.{key}", [f"{name}.{known}" for known in self.read_keys]
            elif isinstance(value, _Watched):
                yield from value.unread(f"{name}.{key}")


def _explain(error: Any, settings: dict[str, Any]) -> str:
    """Format a pydantic error in one line: the key with its section, and the problem."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = f"deepspeed.{_locate(path, settings) or '.'.join(path)}"
    if first["type"] == "extra_forbidden":
        section = key.rpartition(".")[0]
        return f"{key}: unknown key; did you mean {nearest(key, [f'{section}.{name}' for name in _model_fields()])}?"
    return f"{key} is {first['input']!r}: {first['msg']}"


def _locate(path: list[str], settings: dict[str, Any]) -> str | None:
    """Return the full key of a path that starts in some section."""
    value: Any = settings
    for part in path:
        value = value.get(part, _locate) if isinstance(value, dict) else _locate
    if value is not _locate:
        return ".".join(path)
    for name, section in settings.items():
        inside = _locate(path, section) if isinstance(section, dict) else None
        if inside:
            return f"{name}.{inside}"
    return None


def _model_fields() -> set[str]:
    """Return the keys of all of DeepSpeed's typed sections."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models, names = [DeepSpeedConfigModel], set()
    while models:
        model = models.pop()
        names.update(model.model_fields)
        models.extend(model.__subclasses__())
    return names
