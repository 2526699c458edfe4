"""Cached-gradient steps: the accumulated batch counts as one, in loss and gradients, whatever the micro-batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shards.reading.dataset import Batch
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.training import test_trainer
from tests.toolkit.training.micro_batches import even_draws
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.training.grad_cache import cache_gradients
from toolkit.training.learner import Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue

ROWS, SAMPLES = 8, 6000
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 3, 6])  # some pictures have two captions


class Setting:
    """A learner with its teacher and queue, and one global batch: the same on all ranks, whatever their number."""

    def __init__(self, rank: int, world_size: int, teacher: bool, model: config.Model) -> None:
        objectives = config.Objectives(
            contrastive=config.Contrastive(weight=0.7),
            matching=config.Matching(weight=0.0),
            denoising=config.Denoising(weight=0.0),
        )
        torch.manual_seed(0)
        self.learner = Learner(build_model(model), objectives, rank, world_size)
        self.teacher = MomentumEncoder(self.learner.model, 0.9) if teacher else None
        if self.teacher:
            for average in self.teacher.average:
                average += 0.02 * torch.randn_like(average)
            self.teacher.to(torch.device("cpu"), torch.float32)
        self.queue = EmbeddingQueue(4, 16)
        self.queue.push(*torch.nn.functional.normalize(torch.randn(2, 3, 16), dim=-1), torch.tensor([1, 7, 9]))
        images, waves = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8), torch.randn(ROWS, SAMPLES)
        each = ROWS // world_size
        own = slice(rank * each, (rank + 1) * each)
        self.batch = Batch(images[own], waves[own], torch.full((each,), SAMPLES), IDS[own])

    def accumulation(self, count: int) -> list[Batch]:
        columns = [getattr(self.batch, name).chunk(count) for name in ("images", "waveforms", "lengths", "ids")]
        return [Batch(*part) for part in zip(*columns, strict=True)]


def step(rank: int, world_size: int, teacher: bool, count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """SIC of each micro-batch, and the gradients that the optimizer would get; one micro-batch: without a cache."""
    setting = Setting(rank, world_size, teacher, tiny_model())
    accumulation, others = setting.accumulation(count), (setting.teacher, setting.queue, 0.4)
    caches = cache_gradients(setting.learner, accumulation, lambda _: None, *others) if count > 1 else [None]
    found, ids = [], []
    for micro, cache in zip(accumulation, caches, strict=True):
        losses, pairs = setting.learner(micro, *others, even_draws(len(micro.ids)), cache)
        (losses["loss"] / count).backward()
        found.append(float(losses["contrastive"]))
        ids.append(pairs.keys.ids.view(world_size, -1))
    assert torch.cat(ids, dim=1).flatten().tolist() == IDS.tolist(), "each key once, with its own micro-batch"
    gradients = {name: p.grad for name, p in setting.learner.named_parameters() if p.grad is not None}
    for gradient in gradients.values() if world_size > 1 else ():
        dist.all_reduce(gradient)
        gradient /= world_size
    mean = torch.tensor(found)
    if world_size > 1:
        dist.all_reduce(mean)
    return (mean / world_size).tolist(), gradients


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("world_size", "count"), [(1, 2), (1, 4), (2, 2)])
def test_equals_one_big_batch(teacher: bool, world_size: int, count: int) -> None:
    (expected,), reference = step(0, 1, teacher, 1)
    losses, gradients = step(0, 1, teacher, count) if world_size == 1 else run_ranks(step, 2, teacher, count)[0]
    assert losses == pytest.approx([expected] * count, abs=1e-5)
    assert gradients.keys() == reference.keys()
    assert any("temperature" in name and gradient.abs() > 1e-3 for name, gradient in reference.items())
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_both_passes_draw_the_same_dropout() -> None:
    model = tiny_model()
    model.speech.dropout = 0.3
    setting = Setting(0, 1, True, model)
    seen: list[torch.Tensor] = []
    encode = setting.learner.model.encode

    def watched(*features: Any) -> Any:
        speech, image = encode(*features)
        seen.append(speech.embedding.detach())
        return speech, image

    setting.learner.model.encode = watched
    accumulation, others = setting.accumulation(2), (setting.teacher, setting.queue, 0.4)
    caches = cache_gradients(setting.learner, accumulation, torch.manual_seed, *others)
    for place, (micro, cache) in enumerate(zip(accumulation, caches, strict=True)):
        torch.manual_seed(place)
        setting.learner(micro, *others, even_draws(len(micro.ids)), cache)
    first, second = seen[:2], seen[2:]
    torch.testing.assert_close(first, second)
    torch.manual_seed(5)
    assert not torch.allclose(setting.learner.encode(accumulation[0], None)[0].embedding, first[0]), (
        "there is no dropout to draw"
    )


def settings(shards: Path, run: Path, alone: bool, **training: Any) -> config.Config:
    chosen = test_trainer.settings(shards, run, **training)
    if alone:
        chosen.objectives.matching.weight = chosen.objectives.denoising.weight = 0.0
    return chosen


@pytest.mark.timeout(240)
def test_a_run_equals_one_with_big_batches(shards: Path, tmp_path: Path) -> None:
    big = settings(shards, tmp_path / "big", True)
    cached = settings(shards, tmp_path / "cached", True, accumulation=4, grad_cache=True)
    split = settings(shards, tmp_path / "split", True, accumulation=4)
    run_ranks(test_trainer.train, 1, big, cached, split, timeout=100)
    sharded = settings(shards, tmp_path / "sharded", True, accumulation=2, grad_cache=True, zero_stage=3)
    run_ranks(test_trainer.train, 2, sharded, timeout=100)
    reference = test_trainer.losses(tmp_path / "big")
    test_trainer.assert_same(test_trainer.losses(tmp_path / "cached"), reference, 1e-5)
    test_trainer.assert_same(test_trainer.losses(tmp_path / "sharded"), reference, 1e-5)
    assert test_trainer.losses(tmp_path / "split")[0]["loss"] != pytest.approx(reference[0]["loss"], rel=1e-2)


@pytest.mark.timeout(240)
def test_matching_and_denoising_train_beside_it_in_every_zero_stage(shards: Path, tmp_path: Path) -> None:
    stages = [
        settings(shards, tmp_path / str(zero), False, accumulation=2, grad_cache=True, zero_stage=zero)
        for zero in range(4)
    ]
    run_ranks(test_trainer.train, 2, *stages, timeout=200)
    reference = test_trainer.losses(tmp_path / "0")
    assert {"contrastive", "matching", "denoising"} < reference[0].keys()
    assert reference[0]["loss"] != pytest.approx(reference[3]["loss"], rel=1e-3), "nothing was learned"
    for zero in (1, 2, 3):
        test_trainer.assert_same(test_trainer.losses(tmp_path / str(zero)), reference, 1e-5)
