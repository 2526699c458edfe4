"""The DeepSpeed engine around the learner; all that knows DeepSpeed's ways is here and in `deepspeed_config.py`."""

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import deepspeed.ops

from toolkit.config import Config
from toolkit.training.deepspeed_config import deepspeed_config

if not torch.cuda.is_available():
    # Its first use compiles for half a minute, and a compile that was killed blocks every later run; gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", r"`torch\.distributed", FutureWarning)  # DeepSpeed calls what torch has renamed


def make_engine(learner: nn.Module, config: Config, world_size: int, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """Wrap the learner with AdamW at the configured ZeRO stage and precision.

    Raises:
        UserError: The `deepspeed` section holds an unknown key, or the batch does not divide.
    """
    settings = deepspeed_config(config, world_size)
    training = config.training
    groups = _parameter_groups(learner, training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(training.betas[0], training.betas[1]))
    engine, *_ = deepspeed.initialize(model=learner.to(device), optimizer=optimizer, config=settings)
    if engine.optimizer is optimizer:  # stage 0 in float32: the others look for bad gradients
        optimizer.overflow = False  # DeepSpeed asks for it after a step
        optimizer.register_step_pre_hook(_skip_bad_step)
    return engine


def whole(engine: deepspeed.DeepSpeedEngine, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Gather sharded parameters for reading (ZeRO-3); does nothing in the other stages."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(parameters)


def backward(engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
    """Add a micro-batch's gradients; a loss that is not finite makes them all NaN, and so the step one to skip.

    The reduction of the gradients then tells all ranks, with no word more between them and nothing read on the host.
    `engine.was_step_applied()` is the same on all ranks; a step that is skipped clears the gradients, and no more.
    """
    engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))


def _skip_bad_step(optimizer: Any, *_: Any) -> None:
    """Before a step of PyTorch's optimizer: with a gradient that is not finite take all away, and tell DeepSpeed.

    Its own optimizers do the same, and also read the norm of the reduced gradients on the host, once a step: whether to
    skip decides what is run next. The gradients are reduced, so all ranks see the same.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch._foreach_norm([p.grad for p in parameters]) if parameters else [torch.zeros(())]
    optimizer.overflow = not bool(torch.stack(norms).isfinite().all())
    if optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases, norms and the temperature alone."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
