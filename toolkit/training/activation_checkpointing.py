"""Activation checkpointing: recompute trained layers' activations in the backward pass.

Only the input of each layer is stored, and the activations of one layer at a time; the cost is a second forward pass of
these layers. Dropout masks are the same in both, so that losses and gradients do not change.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.model.fusion import FusionLayer
from toolkit.model.layers import EncoderLayer
from toolkit.training.learner import Learner


def recompute_activations(learner: Learner) -> None:
    """Recompute every trained layer of trunks, heads, fusion encoder and denoisers in the backward pass.

    Call this before DeepSpeed wraps the learner, and after the teacher was made, which has no backward pass.
    """
    for layer in _layers(learner):
        _recompute(layer)


def _layers(learner: Learner) -> Iterator[nn.Module]:
    stacks = (learner.model.speech.parts.layers, learner.model.image.layers)
    for layer in (layer for stack in stacks for layer in stack):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            yield layer
    for module in learner.modules():
        if isinstance(module, EncoderLayer | FusionLayer):
            yield module


def _recompute(layer: nn.Module) -> None:
    plain = layer.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return checkpoint(plain, *inputs, use_reentrant=False, **options)
        return plain(*inputs, **options)

    layer.forward = forward
