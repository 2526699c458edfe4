"""Hard negatives from the queue: SIM's value and gradient against plain lists, on one rank and on several."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shards.reading.dataset import Batch
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.outputs import Encoded
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.training.learner import Learner
from toolkit.training.queue import EmbeddingQueue, TokenQueue
from toolkit.training.step_randomness import StepRandomness

PAIRS, STEPS, SIZE = 6, 4, 14  # two micro-batches of six are kept, of three that were seen
FRAMES = 18


def micro_batch(step: int, rank: int, world_size: int) -> tuple[Batch, StepRandomness]:
    """This rank's part of a global micro-batch; captions differ in length, and pictures come again."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    waves = torch.randn(PAIRS, 12000, generator=generator)
    lengths = torch.randint(2000, 12000, (PAIRS,), generator=generator)
    ids = (torch.arange(PAIRS) + 4 * step) % 9
    uniforms = torch.rand(2, PAIRS, generator=generator)
    own = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    longest = int(lengths[own].max())
    waves = waves * (torch.arange(12000) < lengths[:, None])
    return (
        Batch(images[own], waves[own, :longest], lengths[own], ids[own]),
        StepRandomness(uniforms[:, own], CounterRNG(step, torch.arange(PAIRS)[own])),
    )


def make_learner(rank: int, world_size: int) -> tuple[Learner, TokenQueue]:
    torch.manual_seed(0)
    objectives = config.Objectives(
        matching=config.Matching(queue=SIZE),
        denoising=config.Denoising(weight=0),
        momentum=config.Momentum(enabled=False),
    )
    learner = Learner(build_model(tiny_model()), objectives, rank, world_size)
    queue = TokenQueue(SIZE, PAIRS // world_size, world_size, 16, (FRAMES, 32), (16, 32))
    return learner, queue


def train(rank: int, world_size: int) -> tuple[list[dict[str, float]], dict[str, Tensor], list[int]]:
    """Losses of all steps, gradients of the last, and the identities in the queue."""
    learner, queue = make_learner(rank, world_size)
    found = []
    for step in range(STEPS):
        batch, draws = micro_batch(step, rank, world_size)
        learner.zero_grad()
        losses, pairs = learner(batch, None, EmbeddingQueue(0, 16), 0.0, draws, token_queue=queue)
        losses["loss"].backward()
        found.append({name: value.item() for name, value in losses.items()})
        keys = (pairs.keys.speech.detach(), pairs.keys.image.detach(), pairs.keys.ids)
        queue.push(pairs.speech, pairs.image, *keys)
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    return found, gradients, queue.keys.ids.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_draw_from_the_queue_what_one_rank_draws(world_size: int) -> None:
    losses, gradients, ids = train(0, 1)
    ranks = run_ranks(train, world_size)
    assert len({each["matching"] for each in losses}) == STEPS
    for step, expected in enumerate(losses):
        mean = {name: sum(found[step][name] for found, _, _ in ranks) / world_size for name in expected}
        assert mean == pytest.approx(expected, rel=1e-5, abs=1e-6), f"step {step}"
    for name, gradient in gradients.items():
        mean = torch.stack([found[name] for _, found, _ in ranks]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert all(found == ids for _, _, found in ranks)


def test_value_and_gradient_equal_a_plain_reference() -> None:
    learner, queue = make_learner(0, 1)
    learner.objectives.contrastive.weight = 0.0
    model, parameters = learner.model, list(learner.model.fusion.parameters())
    history: list[Earlier] = []
    from_queue = 0
    for step in range(STEPS):
        batch, draws = micro_batch(step, 0, 1)
        losses, pairs = learner(batch, None, EmbeddingQueue(0, 16), 0.0, draws, token_queue=queue)
        gradients = torch.autograd.grad(losses["loss"], parameters)

        speech, image = model(batch.images, batch.waveforms, batch.lengths)
        kept = {number % (2 * PAIRS): pair for number, pair in list(enumerate(history))[-2 * PAIRS :]}
        earlier = [kept.get(slot) for slot in range(2 * PAIRS)]
        candidates = [Earlier(speech[n : n + 1], image[n : n + 1], int(batch.ids[n])) for n in range(PAIRS)]
        places = draw_plainly(candidates, [*candidates, *earlier], draws.negatives)
        from_queue += sum(place >= PAIRS for direction in places for place in direction)
        total = torch.zeros(())
        for row, own in enumerate(candidates):
            wrong_image, wrong_speech = ([*candidates, *earlier][direction[row]] for direction in places)
            for spoken, shown, label in ((own, own, 1), (own, wrong_image, 0), (wrong_speech, own, 0)):
                total = total - model.match(spoken.speech, shown.image).log_softmax(1)[0, label] / (3 * PAIRS)

        assert losses["matching"].item() == pytest.approx(total.item(), abs=1e-5), f"step {step}"
        for got, expected in zip(gradients, torch.autograd.grad(total, parameters), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        queue.push(pairs.speech, pairs.image, pairs.keys.speech.detach(), pairs.keys.image.detach(), pairs.keys.ids)
        history += [Earlier(pair.speech.detach(), pair.image.detach(), pair.identity) for pair in candidates]
    assert from_queue > 5, "hardly anything was drawn from the queue"


@dataclass
class Earlier:
    """One pair."""

    speech: Encoded
    image: Encoded
    identity: int


def draw_plainly(rows: list[Earlier], candidates: list[Earlier | None], uniforms: Tensor) -> list[list[int]]:
    """Places of wrong pictures, then of wrong speech, by the cumulative distribution over all others."""
    found: list[list[int]] = []
    for direction, (own, other) in enumerate((("speech", "image"), ("image", "speech"))):
        places = []
        for row, pair in enumerate(rows):
            allowed = [n for n, each in enumerate(candidates) if each is not None and each.identity != pair.identity]
            query = getattr(pair, own).embedding[0].detach()
            similar = [float(query @ getattr(candidates[n], other).embedding[0]) / 0.07 for n in allowed]
            passed = torch.tensor(similar).double().softmax(0).cumsum(0) > float(uniforms[direction, row])
            places.append(allowed[int(passed.float().argmax())])
        found.append(places)
    return found
