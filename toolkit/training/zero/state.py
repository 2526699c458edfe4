"""This rank's optimizer state as fragments of complete parameters, at every ZeRO stage.

DeepSpeed stores the float32 weights ("masters") and Adam's moments differently at every stage:

    stage  precision  masters                                                moments of
    0      fp32       the model's parameters, all on every rank              each parameter
    0      bf16       one float32 copy a parameter, all on every rank        each copy
    1, 2   any        one flat tensor a group, partitioned at any element    the flat tensor
    3      any        flat tensors of each parameter's equal partition       the flat tensor

An `OptimizerFragment` is a view of that memory: writing to it changes the optimizer's state, also where DeepSpeed
stores it on the CPU (`offload_optimizer`).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.training.zero.deepspeed_import import deepspeed
from toolkit.training.zero.fragments import Fragment, Partition

PARTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class OptimizerFragment(Fragment):
    """A fragment of the weights that the optimizer updates and of AdamW's moments, each float32 [stop - start]."""

    parts: ClassVar[tuple[str, ...]] = PARTS

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def partitions(engine: deepspeed.DeepSpeedEngine) -> list[Partition]:
    """List the partitions of the float32 weights, in the same order on all ranks; they are views."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if stage == 0:
        return [Partition(_master(optimizer, p).detach().view(-1), {name: 0}) for p, name in names.items()]
    if stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
        positions = {name: optimizer.grad_position[optimizer.get_param_id(p)] for p, name in names.items()}
        return [
            Partition(flats[group].detach().narrow(0, offset, size), {name: 0})
            for name, (group, offset, size) in positions.items()
        ]
    result = []
    flats = (optimizer.bit16_groups_flat, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    for flat, group, master in zip(*flats, strict=True):  # the model's parameters are views of `flat`
        offsets = {names[p]: (p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in group}
        result.append(Partition(master.detach(), offsets))
    return result


def fragments(engine: deepspeed.DeepSpeedEngine) -> list[OptimizerFragment]:
    """List this rank's fragments, in the order of the learner's parameters.

    At stages 1 to 3 the ranks' fragments together cover every trained parameter exactly once; at stage 0 every rank
    has all of them, with the same values.
    """
    locate = {0: _complete, 1: _partitioned, 2: _partitioned, 3: _sharded}[engine.zero_optimization_stage()]
    result = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for optimizer_tensor, offset, start, stop in locate(engine.optimizer, parameter, math.prod(shape)):
            state = _moments(engine, optimizer_tensor)
            views = [
                tensor.detach().view(-1).narrow(0, offset, stop - start)
                for tensor in (optimizer_tensor, state["exp_avg"], state["exp_avg_sq"])
            ]
            result.append(OptimizerFragment(name, start, stop, shape, *views))
    return result


def applied_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Return AdamW's step count, which its bias correction uses; skipped steps are not counted."""
    counts = [int(_moments(engine, optimizer_tensor)["step"]) for optimizer_tensor in _optimizer_tensors(engine)]
    return max(counts, default=0)


@contextlib.contextmanager
def editable(engine: deepspeed.DeepSpeedEngine, steps: int) -> Iterator[list[OptimizerFragment]]:
    """Let the caller overwrite fragments, then copy the masters to the model's weights; every rank calls this.

    Args:
        engine: The engine, between `engine.step()` and the next forward.
        steps: New step count of AdamW.

    Yields:
        This rank's fragments. At stage 0 every rank must write the same values.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    with torch.no_grad():
        if stage == 3:
            optimizer.checkpoint_event_prologue()  # gathered weights would go stale
        yield fragments(engine)
        for optimizer_tensor in _optimizer_tensors(engine):
            _moments(engine, optimizer_tensor)["step"].fill_(steps)
        if stage == 3:
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()  # gathers the small parameters, which are not partitioned
        elif stage:
            optimizer.update_lp_params()
        else:
            for parameter in engine.module.parameters():
                if parameter.requires_grad and (master := _master(optimizer, parameter)) is not parameter:
                    parameter.copy_(master)


def _complete(optimizer: Any, parameter: nn.Parameter, size: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield the optimizer's tensor, offset in it and range in the parameter of this rank's elements at stage 0: all."""
    yield _master(optimizer, parameter), 0, 0, size


def _partitioned(optimizer: Any, parameter: Any, size: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield the optimizer's tensor, offset and range of this rank's elements at stages 1 and 2, if it has any."""
    mapping = parameter._hp_mapping
    if mapping is not None:
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        yield flat, mapping.hp_fragment_address.start, start, start + size


def _sharded(optimizer: Any, parameter: Any, size: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield the optimizer's tensor, offset and range of this rank's elements at stage 3.

    The partitions are equal, so the last may end, or start, beyond the parameter.
    """
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = deepspeed.comm.get_rank(parameter.ds_process_group) * length
    if start < size:
        yield optimizer.fp32_partitioned_groups_flat[group], offset, start, min(start + length, size)


def _master(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """Return the tensor that the optimizer updates at stage 0: under bf16 DeepSpeed's float32 copy."""
    for group, masters in zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    ):
        for model, master in zip(group, masters, strict=True):
            if model is parameter:
                return master
    return parameter


def _optimizer_tensors(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """List the tensors that AdamW updates on this rank."""
    if engine.zero_optimization_stage() == 3:  # AdamW's groups have them during a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def _moments(engine: deepspeed.DeepSpeedEngine, optimizer_tensor: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a tensor; before the first step, zeros as AdamW would create them."""
    adam = engine.basic_optimizer
    state = adam.state[optimizer_tensor]
    if not state:
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=optimizer_tensor.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(optimizer_tensor), torch.zeros_like(optimizer_tensor)
    return state
