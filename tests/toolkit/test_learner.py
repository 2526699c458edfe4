"""A micro-batch's losses: what depends on what."""

import pytest
import torch

from shards.stream import Batch
from tests.tiny import tiny_model
from toolkit import config
from toolkit.model.build import build_model
from toolkit.training.learner import Draws, Learner
from toolkit.training.queue import EmbeddingQueue


def losses(learner: Learner, images: torch.Tensor, waveforms: torch.Tensor) -> dict[str, float]:
    rows = len(images)
    batch = Batch(images, waveforms, torch.full((rows,), waveforms.shape[1]), torch.arange(rows))
    draws = Draws(torch.full((2, rows), 0.5), torch.Generator().manual_seed(0))
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
