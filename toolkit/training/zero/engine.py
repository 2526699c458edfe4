"""The DeepSpeed engine around the learner."""

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.config.schema import Config, Training
from toolkit.model.trunk import PartlyFrozen
from toolkit.training.momentum import is_averaged
from toolkit.training.schedules import SCALE
from toolkit.training.zero.deepspeed_import import deepspeed
from toolkit.training.zero.settings import deepspeed_config


def make_engine(
    learner: nn.Module,
    config: Config,
    world_size: int,
    device: torch.device,
    settings: dict[str, Any] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Wrap the learner with AdamW at the configured ZeRO stage and precision.

    Raises:
        UserError: The `deepspeed` section holds an unknown key, or the batch does not divide.
    """
    settings = settings or deepspeed_config(config, world_size)
    training = config.training
    groups = _parameter_groups(learner, training.weight_decay, _rate_scales(learner, training))
    # Stage 0 under bf16 takes a step with zero gradients while it is built: at this rate it changes no weight.
    # Fused: on a CPU in a fifth of the time, and nothing is allocated for intermediate results.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(training.betas[0], training.betas[1]), fused=True)
    engine, *_ = deepspeed.initialize(model=learner.to(device), optimizer=optimizer, config=settings)
    for group in optimizer.param_groups:
        group["lr"] = training.lr * group.get(SCALE, 1.0)
    for state in optimizer.state.values():
        state["step"].zero_()
    if engine.optimizer is optimizer:  # stage 0 in float32: the others check and clip gradients themselves
        optimizer.overflow = False  # DeepSpeed reads it after a step
        optimizer.register_step_pre_hook(partial(_clip_or_skip, training.grad_clip))
        engine.clip_fp32_gradients = lambda: None  # it takes one norm after the other, and another collective
    return engine


def gathered_parameters(
    engine: deepspeed.DeepSpeedEngine, parameters: list[nn.Parameter]
) -> contextlib.AbstractContextManager[Any]:
    """Gather sharded parameters for reading (ZeRO-3); does nothing in the other stages."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(parameters)


def backward(engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
    """Add a micro-batch's gradients; a loss that is not finite makes all of them NaN, so that the step is skipped.

    The reduction of the gradients spreads NaN to all ranks, without a further collective and without reading the loss
    on the host. `engine.was_step_applied()` is the same on all ranks; a skipped step only clears the gradients.
    """
    engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))


def _clip_or_skip(max_norm: float, optimizer: Any, *_: Any) -> None:
    """Before a step of PyTorch's optimizer: clip gradients; if one is not finite, clear all, and set the overflow flag.

    DeepSpeed's optimizers do the same. Reads the norm of the gradients on the host once a step, as they do. The
    gradients are reduced already, so all ranks decide alike.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or torch.inf, foreach=True)
    optimizer.overflow = not bool(norm.isfinite())
    if optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None


def _rate_scales(learner: nn.Module, training: Training) -> dict[int, float]:
    """Map the id of each of the trunks' parameters to its learning rate, relative to `lr`; empty if it is that."""
    if training.trunk_lr is None and training.layer_decay == 1:
        return {}
    top = (training.trunk_lr or training.lr) / training.lr
    depths = {id: depth for m in learner.modules() if isinstance(m, PartlyFrozen) for id, depth in m.depths().items()}
    return {number: top * training.layer_decay ** (total - depth) for number, (depth, total) in depths.items()}


def _parameter_groups(module: nn.Module, weight_decay: float, scales: dict[int, float]) -> list[dict[str, Any]]:
    """Group parameters by weight decay: matrices have it, biases, norms and the temperature do not.

    ZeRO 1 and 2 partition each group equally among the ranks. Parameters with a momentum average are in separate
    groups, so that the average is partitioned equally, too. Each learning rate has groups of its own.
    """
    trained = [
        (is_averaged(name), p.ndim > 1, scales.get(id(p), 1.0), p)
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    rates = list(dict.fromkeys(scale for *_, scale, _ in trained))
    groups = [
        {
            "params": [p for *kind, p in trained if kind == [of_teacher, matrices, scale]],
            "weight_decay": weight_decay if matrices else 0.0,
            **({} if scale == 1 else {SCALE: scale}),
        }
        for of_teacher in (True, False)
        for matrices in (True, False)
        for scale in rates
    ]
    return [group for group in groups if group["params"]]
