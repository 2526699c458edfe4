"""Activation checkpointing: the same losses and gradients, and less that is kept for the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.training.checkpointing import resumed_runs
from tests.toolkit.training.micro_batches import even_draws, tiny_batch
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.training.activation_checkpointing import recompute_activations
from toolkit.training.learner import Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


def with_dropout() -> config.Model:
    model = tiny_model()
    model.speech.dropout = model.fusion.dropout = 0.1
    model.speech.config |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    model.speech.train = "1"  # the layers below give an input without gradient
    return model


def step(again: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """Losses and gradients of a step of all objectives, and the bytes kept for its backward pass."""
    torch.manual_seed(0)
    objectives = config.Objectives(denoising=config.Denoising(side="both"))
    model = build_model(with_dropout())
    teacher = MomentumEncoder(model, 0.9)
    learner = Learner(model, objectives, 0, 1)
    if again:
        recompute_activations(learner)
    batch = tiny_batch(9000, 8000, 7000, 9000)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = learner(batch, teacher, EmbeddingQueue(4, 16), 0.4, even_draws(4))
    weights = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    return losses, gradients, sum(size for pointer, size in kept.items() if pointer not in weights)


def test_losses_and_gradients_are_the_same_and_less_is_kept() -> None:
    losses, gradients, kept = step(again=False)
    losses_again, gradients_again, kept_again = step(again=True)
    assert losses.keys() == losses_again.keys()
    assert all(torch.equal(losses[name], losses_again[name]) for name in losses)
    trained = {n for n, p in build_model(with_dropout()).named_parameters() if p.requires_grad}
    assert {f"model.{name}" for name in trained} <= gradients.keys() | {"model.temperature.log_temperature"}
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=0, atol=0, msg=name)
    assert kept_again < 0.5 * kept, (kept_again, kept)


@pytest.mark.timeout(240)
def test_it_trains_alike(shards: Path, tmp_path: Path) -> None:
    cases = [(0, "fp32"), (3, "fp32"), (2, "bf16")]
    runs = []
    for zero, precision in cases:
        for again in (False, True):
            options = {"zero_stage": zero, "precision": precision, "activation_checkpointing": again}
            run = resumed_runs.settings(shards, tmp_path / f"{zero}{again}", save_every=9, **options)
            run.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 300}}
            runs.append((run, None, ""))
    run_ranks(resumed_runs.train, 2, runs, timeout=220)
    for zero, _ in cases:
        resumed_runs.assert_equal(tmp_path / f"{zero}True", tmp_path / f"{zero}False")
