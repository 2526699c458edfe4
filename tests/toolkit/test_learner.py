"""A micro-batch's losses: what depends on what."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from shards.stream import Batch
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from toolkit import config
from toolkit import distributed as across_ranks
from toolkit.model.build import build_model
from toolkit.objectives.row_random import RowRandom
from toolkit.training.learner import Draws, Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


def losses(learner: Learner, images: torch.Tensor, waveforms: torch.Tensor) -> dict[str, float]:
    rows = len(images)
    batch = Batch(images, waveforms, torch.full((rows,), waveforms.shape[1]), torch.arange(rows))
    draws = Draws(torch.full((2, rows), 0.5), RowRandom(0, torch.arange(rows)))
    found, _ = learner(batch, None, EmbeddingQueue(0, 16), 0.0, draws)
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("side", ["image", "speech"])
def test_the_withheld_loss_does_not_see_the_other_modality(side: str) -> None:
    torch.manual_seed(0)
    denoising = config.Denoising(side=side, target="own", layers=1)
    objectives = config.Objectives(denoising=denoising, momentum=config.Momentum(enabled=False))
    learner = Learner(build_model(tiny_model()), objectives, rank=0, world_size=1)
    images, others = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    waves, voices = torch.randn(2, 4, 9000)
    before = losses(learner, images, waves)
    after = losses(learner, images, voices) if side == "image" else losses(learner, others, waves)
    assert after["denoising_withheld"] == before["denoising_withheld"]
    assert after["denoising"] != before["denoising"], "the other modality is not looked at"


def collectives(rank: int, world_size: int, objectives: config.Objectives) -> list[str]:
    """The collectives of a micro-batch's forward pass, in order; the ranks' captions differ in length."""
    seen: list[str] = []

    def spy(name: str, function: Any) -> Any:
        def spied(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return spied

    across_ranks._all_gather_single = spy("all_gather", across_ranks._all_gather_single)
    for name in ("all_reduce", "all_to_all_single", "broadcast", "all_gather", "all_gather_object"):
        setattr(dist, name, spy(name, getattr(dist, name)))
    torch.manual_seed(0)
    model = build_model(tiny_model())
    teacher = MomentumEncoder(model, 0.9) if objectives.momentum.enabled else None
    learner = Learner(model, objectives, rank, world_size)
    rows, samples = 2, 6000 + 3000 * rank
    lengths, ids = torch.full((rows,), samples), torch.arange(rows) + rows * rank + 2**40
    batch = Batch(torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8), torch.randn(rows, samples), lengths, ids)
    draws = Draws(torch.full((2, rows), 0.5), RowRandom(0, torch.arange(rows)))
    _, keys = learner(batch, teacher, EmbeddingQueue(4, 16), 0.0, draws)
    assert keys.ids.tolist() == [2**40 + row for row in range(rows * world_size)]
    return seen


@pytest.mark.parametrize("teacher", [True, False])
def test_keys_and_identities_travel_in_one_collective_and_negatives_in_five(teacher: bool) -> None:
    momentum = config.Momentum(enabled=teacher)
    near = config.Matching(negatives="local")
    local = config.Objectives(momentum=momentum, matching=near, denoising=config.Denoising(weight=0))
    assert run_ranks(collectives, 2, local) == [["all_gather"]] * 2
    everywhere = config.Objectives(momentum=momentum)
    fetched = ["all_gather", "all_gather", *["all_to_all_single"] * 4]
    assert run_ranks(collectives, 2, everywhere) == [fetched] * 2
