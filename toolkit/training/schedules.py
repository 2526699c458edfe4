"""Schedules: functions of the step alone, so that a restarted run continues where it was."""

import math
from collections.abc import Iterable
from typing import Any

from toolkit.config.schema import Objectives, Training

SCALE = "lr_scale"  # key of a group's learning rate relative to `lr`, if it is another


def learning_rate(training: Training, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to `min_lr`."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.min_lr + (training.lr - training.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(groups: Iterable[dict[str, Any]], training: Training, step: int) -> None:
    """Set the learning rate of each of an optimizer's groups, which the schedule scales alike."""
    for group in groups:
        group["lr"] = learning_rate(training, step) * group.get(SCALE, 1.0)


def trunk_rate(training: Training, rate: float) -> dict[str, float]:
    """Return the trunks' learning rate, before `layer_decay`, for the log; empty if it is that of all weights."""
    return {} if training.trunk_lr is None else {"trunk_lr": rate * training.trunk_lr / training.lr}


def soft_target_weight(objectives: Objectives, step: int) -> float:
    """Return alpha, the weight of the teacher's soft targets: 0 in coarse steps, else a linear ramp from 0 (ALBEF)."""
    c = objectives.contrastive
    if is_coarse(objectives, step):
        return 0.0
    return c.alpha * min(1.0, step / c.alpha_ramp) if c.alpha_ramp else c.alpha


def is_coarse(objectives: Objectives, step: int) -> bool:
    """Return whether a step is one of the first `coarse_steps`, which train SIC alone."""
    return step < objectives.coarse_steps
