"""A micro-batch's losses: what depends on what."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shards.reading.dataset import Batch
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.training.micro_batches import even_draws, tiny_batch
from toolkit import distributed as across_ranks
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.outputs import Encoded
from toolkit.training.learner import Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


def learner_of(**objectives: Any) -> Learner:
    torch.manual_seed(0)
    made = config.Objectives(momentum=config.Momentum(enabled=False), **objectives)
    return Learner(build_model(tiny_model()), made, rank=0, world_size=1)


def losses(learner: Learner, batch: Batch, controls: bool = True) -> dict[str, float]:
    draws = even_draws(len(batch.ids))
    found, _ = learner(batch, None, EmbeddingQueue(0, 16), 0.0, draws, measure_controls=controls)
    return {name: value.item() for name, value in found.items()}


def pairs() -> Batch:
    torch.manual_seed(1)
    return tiny_batch(9000, 9000, 9000, 9000)


NEIGHBOURS = [1, 0, 3, 2]


@pytest.mark.parametrize("side", ["image", "speech"])
def test_the_control_of_denoising_attends_to_the_neighbors_tokens(side: str) -> None:
    learner = learner_of(denoising=config.Denoising(side=side, target="own", layers=1, noise="mask"))
    batch = pairs()
    right = losses(learner, batch)
    other = "waveforms" if side == "image" else "images"
    swapped = losses(learner, replace(batch, **{other: getattr(batch, other)[NEIGHBOURS]}))
    assert right["denoising_control"] == pytest.approx(swapped["denoising"], rel=1e-5)
    assert right["denoising_control"] != pytest.approx(right["denoising"], rel=1e-5), "the other modality is not used"


def test_a_denoiser_that_ignores_the_other_modality_has_a_control_like_its_loss() -> None:
    learner = learner_of(denoising=config.Denoising(target="own", layers=1))
    for layer in learner.denoisers["image"].fusion.layers:
        torch.nn.init.zeros_(layer.cross_attention.output.weight)
    found = losses(learner, pairs())
    assert found["denoising_control"] == pytest.approx(found["denoising"], abs=1e-7)


def test_matching_and_its_control_read_tokens_and_nothing_else() -> None:
    learner = learner_of(denoising=config.Denoising(weight=0))
    found = losses(learner, pairs())
    assert found["matching_control"] != pytest.approx(found["matching"], rel=1e-5)
    assert 0 <= found["matching_control_accuracy"] <= 1
    match, seen = learner.model.match, []

    def without_vectors(speech: Encoded, image: Encoded) -> torch.Tensor:
        seen.append(len(speech.tokens))
        nothing = torch.full_like(speech.embedding, torch.nan), torch.full_like(image.embedding, torch.nan)
        return match(replace(speech, embedding=nothing[0]), replace(image, embedding=nothing[1]))

    learner.model.match = without_vectors
    assert losses(learner, pairs()) == found
    assert seen == [12, 12]


def test_controls_leave_the_losses_and_their_dropout_alone() -> None:
    learner = learner_of(denoising=config.Denoising(target="own", layers=1))
    for module in learner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch, found = pairs(), []
    for controls in (False, True):
        torch.manual_seed(3)
        measured = losses(learner, batch, controls)
        found.append({name: measured[name] for name in ("contrastive", "matching", "denoising")})
    assert found[0] == found[1]


def test_controls_are_measured_only_when_asked_for() -> None:
    found, _ = learner_of()(pairs(), None, EmbeddingQueue(0, 16), 0.0, even_draws(4))
    assert set(found) == {"loss", "contrastive", "matching", "denoising", "temperature"}


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
    batch = replace(tiny_batch(samples, samples), ids=torch.arange(rows) + rows * rank + 2**40)
    _, found = learner(batch, teacher, EmbeddingQueue(4, 16), 0.0, even_draws(rows))
    assert found.keys.ids.tolist() == [2**40 + row for row in range(rows * world_size)]
    return seen


@pytest.mark.parametrize("teacher", [True, False])
def test_keys_and_identities_travel_in_one_collective_and_negatives_in_four(teacher: bool) -> None:
    momentum = config.Momentum(enabled=teacher)
    near = config.Matching(negatives="local")
    local = config.Objectives(momentum=momentum, matching=near, denoising=config.Denoising(weight=0))
    assert run_ranks(collectives, 2, local) == [["all_gather"]] * 2
    everywhere = config.Objectives(momentum=momentum)
    fetched = ["all_gather", "all_gather", *["all_to_all_single"] * 3]
    assert run_ranks(collectives, 2, everywhere) == [fetched] * 2
