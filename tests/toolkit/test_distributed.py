"""N ranks equal one rank on the concatenated batch: losses, gradients of shared weights, gradients of inputs."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shards.errors import TransientError, UserError
from tests.distributed import RankError, run_ranks
from toolkit.distributed import RowExchange, all_gather, gather_packed, gather_with_grad
from toolkit.objectives.contrastive import contrastive_loss
from toolkit.objectives.denoising import denoising_loss
from toolkit.objectives.matching import draw_negatives, matching_loss
from toolkit.rank_sync import RemoteRankError, run_on_all_ranks

ROWS, INPUT, WIDTH = 8, 5, 6
OBJECTIVES = ("SIC, queue", "SIC, own keys", "SIM", "SIM, drawn", "CMD, cosine", "CMD, mse", "CMD, infonce")


class Pairs:
    """This rank's part of one global batch, and linear encoders whose weights are the same on all ranks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
        lengths = torch.tensor([3, 7, 2, 4, 6, 5, 3, 1])[own]  # the longest differs between ranks
        longest = int(lengths.max())
        self.mask = torch.arange(longest) < lengths[:, None]
        self.all_ids = torch.tensor([3, 1, 4, 1, 5, 9, 3, 6])
        self.ids = self.all_ids[own]
        self.speech_input = random(ROWS, 7, INPUT)[own, :longest].clone().requires_grad_()
        self.image_input = random(ROWS, 4, INPUT)[own].clone().requires_grad_()
        self.noised = random(ROWS, 7, WIDTH)[own, :longest]
        self.positions = (torch.rand(ROWS, 7, generator=generator) < 0.5)[own, :longest] & self.mask
        self.uniforms = torch.rand(2, ROWS, generator=generator)[:, own]
        # Wrong pictures all from the first rank, so that the others are asked for none; speech from everywhere.
        self.negatives = torch.stack([torch.tensor([1, 0, 1, 0, 0, 1, 1, 0]), torch.arange(ROWS).flip(0)])[:, own]
        self.valid = (torch.rand(2, ROWS, generator=generator) < 0.8)[:, own]
        self.queue = [F.normalize(random(5, WIDTH), dim=1) for _ in range(2)]
        self.queue_ids = torch.tensor([1, -1, 3, 8, -1])
        self.weights = {name: random(INPUT, WIDTH) / 2 for name in ("speech", "image")}
        self.weights |= {"fusion": random(2 * WIDTH, 2), "denoiser": random(2 * WIDTH, WIDTH)}
        self.weights["temperature"] = torch.tensor(0.3)
        self.teacher = {name: self.weights[name] + 0.2 * random(INPUT, WIDTH) for name in ("speech", "image")}
        for weight in self.weights.values():
            weight.requires_grad_()

    def encode(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give tokens and vectors of speech, then of image."""
        speech, image = self.speech_input @ weights["speech"], self.image_input @ weights["image"]
        return speech, F.normalize(_mean(speech, self.mask), dim=1), image, F.normalize(image.mean(1), dim=1)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _match(pairs: Pairs, speech: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    return torch.cat([_mean(speech, mask), image.mean(1)], dim=1).tanh() @ pairs.weights["fusion"]


def contrastive(pairs: Pairs, _name: str) -> Tensor:
    _, speech, _, image = pairs.encode(pairs.weights)
    with torch.no_grad():
        _, own_speech, _, own_image = pairs.encode(pairs.teacher)
    gathered = [all_gather(own, pairs.world_size) for own in (own_speech, own_image)]
    keys = [torch.cat([own, queue]) for own, queue in zip(gathered, pairs.queue, strict=True)]
    key_ids = torch.cat([all_gather(pairs.ids, pairs.world_size), pairs.queue_ids])
    return contrastive_loss(
        speech, image, *keys, pairs.ids, key_ids, pairs.weights["temperature"], 0.4, own_speech, own_image
    )


def contrastive_own_keys(pairs: Pairs, _name: str) -> Tensor:
    _, speech, _, image = pairs.encode(pairs.weights)
    keys, (ids,) = gather_packed([speech, image], [pairs.ids], pairs.rank, pairs.world_size, differentiable=True)
    return contrastive_loss(speech, image, *keys, pairs.ids, ids, pairs.weights["temperature"])


def matching(pairs: Pairs, name: str) -> Tensor:
    speech, _, image, _ = pairs.encode(pairs.weights)
    negatives, valid = draw(pairs) if name == "SIM, drawn" else (pairs.negatives, pairs.valid)
    requests = RowExchange(negatives, [image.shape[1], speech.shape[1]], pairs.rank, pairs.world_size)
    missing = requests.longest(1) - speech.shape[1]
    wrong_image = requests.fetch(0, image)
    wrong_speech = requests.fetch(1, F.pad(speech, (0, 0, 0, missing)))
    wrong_mask = requests.fetch(1, F.pad(pairs.mask, (0, missing)))
    return matching_loss(
        _match(pairs, speech, pairs.mask, image),
        _match(pairs, speech, pairs.mask, wrong_image),
        _match(pairs, wrong_speech, wrong_mask, image),
        valid,
    )


def draw(pairs: Pairs) -> tuple[Tensor, Tensor]:
    _, speech, _, image = pairs.encode(pairs.weights)
    keys = [all_gather(own, pairs.world_size) for own in (speech, image)]
    drawn = draw_negatives(speech, image, *keys, pairs.ids, pairs.all_ids, torch.tensor(0.3), pairs.uniforms)
    return torch.stack([drawn.image, drawn.speech]), drawn.valid


def denoising(pairs: Pairs, name: str) -> Tensor:
    speech, _, image, _ = pairs.encode(pairs.weights)
    noised = torch.where(pairs.positions[..., None], pairs.noised, speech)
    neighbors = _mean(noised, pairs.mask)[:, None]
    context = image.mean(1, keepdim=True).expand_as(noised)
    predicted = torch.cat([noised + neighbors, context], dim=-1) @ pairs.weights["denoiser"]
    return denoising_loss(predicted, speech, pairs.positions, pairs.mask, name.split(", ")[1], 0.1)


LOSSES = {"SIC, queue": contrastive, "SIC, own keys": contrastive_own_keys, "SIM": matching, "SIM, drawn": matching}


def everything(rank: int, world_size: int) -> dict[str, tuple[Tensor, dict[str, Tensor], list[Tensor]]]:
    """Loss, gradients of the weights and gradients of speech and image inputs, for each objective."""
    results = {}
    for name in OBJECTIVES:
        pairs = Pairs(rank, world_size)
        loss = LOSSES.get(name, denoising)(pairs, name)
        loss.backward()
        weights = {key: weight.grad for key, weight in pairs.weights.items() if weight.grad is not None}
        speech = F.pad(pairs.speech_input.grad, (0, 0, 0, 7 - pairs.mask.shape[1]))
        results[name] = (loss.detach(), weights, [speech, pairs.image_input.grad])
    return results


def on_ranks(rank: int, world_size: int) -> tuple[dict, tuple[Tensor, Tensor], list[str]]:
    return everything(rank, world_size), draw(Pairs(rank, world_size)), wrong_fetches(rank, world_size)


def wrong_fetches(rank: int, world_size: int) -> list[str]:
    """Gather and fetch with every kind of request and dtype; name what comes back wrong."""
    wrong, batch = [], 3
    rows = torch.arange(world_size * batch * 2).view(-1, 2)
    requests = {
        "everything from one rank": torch.zeros(4, dtype=torch.int64),
        "only from itself": torch.tensor([2, 0, 0]) + rank * batch,
        "only from the next": torch.tensor([1, 2]) + (rank + 1) % world_size * batch,
        "in no order, some twice": torch.tensor([5, 0, 4, 5, 1, 3]),
        "nothing": torch.zeros(0, dtype=torch.int64),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        table = (rows % 4).to(dtype)
        own = table[rank * batch : (rank + 1) * batch]
        if not all_gather(own, world_size).equal(table):
            wrong.append(f"all_gather of {dtype}")
        for name, index in requests.items():
            wishes = RowExchange(torch.stack([index, index.flip(0)]), [rank, 9 - rank], rank, world_size)
            if not wishes.fetch(1, own).equal(table[index.flip(0)]) or not wishes.fetch(0, own).equal(table[index]):
                wrong.append(f"{name}, {dtype}")
            if (wishes.longest(0), wishes.longest(1)) != (world_size - 1, 9):
                wrong.append(f"{name}, lengths")
    return [*wrong, *wrong_packing(rank, world_size)]


def wrong_packing(rank: int, world_size: int) -> list[str]:
    """Pack floats of several widths with integers whose bits are no ordinary floats; name what comes back wrong."""
    every = [
        torch.randn(world_size * 3, 2, generator=torch.Generator().manual_seed(0)),
        torch.randn(world_size * 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        torch.tensor([2**63 - 1, -(2**63), 0x7FC00001_FFC00001] * (world_size - 1) + [-1, 1, 0x00000001_80000000]),
        (torch.arange(world_size * 3) % 3 == 1),
        torch.arange(world_size * 3, dtype=torch.int32) - 2,
    ]
    own = [each[3 * rank : 3 * rank + 3] for each in every]
    wrong = []
    for differentiable in (False, True):
        vectors, integers = gather_packed(own[:2], own[2:], rank, world_size, differentiable)
        for number, (got, expected) in enumerate(zip([*vectors, *integers], every, strict=True)):
            if got.dtype != expected.dtype or not got.equal(expected):
                wrong.append(f"packed tensor {number}, differentiable: {differentiable}")
    return wrong


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> list:
    return run_ranks(on_ranks, request.param)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_equal_one_rank_on_the_whole_batch(ranks, name):
    loss, weights, inputs = everything(0, 1)[name]
    losses, rank_weights, rank_inputs = zip(*(results[name] for results, _, _ in ranks), strict=True)

    def assert_equal(got: Tensor, expected: Tensor, what: str) -> None:
        assert expected.abs().max() > 1e-3, f"{what} is nothing to compare with"
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda text: f"{what}: {text}")

    assert_equal(torch.stack(losses).mean(), loss, "mean of the ranks' losses")
    for key, gradient in weights.items():
        mean = torch.stack([of_rank[key] for of_rank in rank_weights]).mean(0)
        assert_equal(mean, gradient, f"mean of the ranks' gradients of {key}")
    for side, gradient in enumerate(inputs):
        stacked = torch.cat([of_rank[side] for of_rank in rank_inputs]) / len(ranks)
        assert_equal(stacked, gradient, f"gradient of {('speech', 'image')[side]} inputs")


def test_ranks_draw_the_negatives_that_one_rank_draws(ranks):
    negatives, valid = draw(Pairs(0, 1))
    assert torch.cat([own for _, (own, _), _ in ranks], dim=1).tolist() == negatives.tolist()
    assert torch.cat([own for _, (_, own), _ in ranks], dim=1).tolist() == valid.tolist()


def test_rows_come_back_as_asked(ranks):
    for rank, (_, _, wrong) in enumerate(ranks):
        assert not wrong, f"rank {rank}: {wrong}"


def test_a_world_of_one_needs_no_process_group():
    x, ids = torch.randn(3, 4), torch.arange(3)
    assert not dist.is_initialized()
    assert all_gather(x, 1) is x
    assert gather_with_grad(x, 0, 1) is x
    assert gather_packed([x], [ids], 0, 1) == ([x], [ids])
    requests = RowExchange(torch.tensor([[2, 0], [1, 1]]), [4, 7], 0, 1)
    assert requests.fetch(0, x).equal(x[[2, 0]])
    assert requests.fetch(1, x).equal(x[[1, 1]])
    assert (requests.longest(0), requests.longest(1)) == (4, 7)


def do_nothing(rank: int, world_size: int) -> None:
    pass


def fail_second(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def die_second(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def sleep_second(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1000)
    dist.barrier()


def test_harness_names_the_rank_that_failed():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*fail_second.*ValueError: broken on purpose"):
        run_ranks(fail_second, 2)
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 3"):
        run_ranks(die_second, 2)
    assert not multiprocessing.active_children()


def test_harness_ends_hanging_ranks_and_shows_where_they_stood():
    run_ranks(do_nothing, 2)  # the server of processes stands, so that the time is the ranks' own
    start = time.time()
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\] of 2 did not finish.*barrier.*sleep_second"):
        run_ranks(sleep_second, 2, timeout=6)
    assert time.time() - start < 20
    assert not multiprocessing.active_children()


def one_fails(rank: int, world_size: int, failing: tuple[int, ...], kind: type[Exception] = UserError) -> str:
    def work() -> int:
        if rank in failing:
            raise kind(f"shard {rank} is\nmissing")
        return 10 * rank

    try:
        return str(run_on_all_ranks(work, rank, world_size))
    except UserError as error:
        return str(error)


def kind_of_failure(rank: int, world_size: int, kind: type[Exception]) -> str:
    try:
        return one_fails(rank, world_size, (1,), kind)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_what_fails_on_one_rank_fails_on_all_with_its_reason() -> None:
    assert run_ranks(one_fails, 3, ()) == ["0", "10", "20"]
    from_afar = "rank 1: shard 1 is missing"
    assert run_ranks(one_fails, 3, (1,)) == [from_afar, "shard 1 is\nmissing", from_afar]
    assert run_ranks(one_fails, 3, (1, 2))[0] == from_afar
    assert one_fails(0, 1, (0,)) == "shard 0 is\nmissing"


def test_only_a_users_mistake_is_one_on_the_other_ranks_too() -> None:
    other, own = run_ranks(kind_of_failure, 2, ValueError)
    assert (other, own) == ("RemoteRankError: rank 1: shard 1 is missing", "ValueError: shard 1 is\nmissing")
    assert run_ranks(kind_of_failure, 2, TransientError)[0] == "rank 1: shard 1 is missing"
    assert issubclass(RemoteRankError, torch.distributed.DistError)  # by which a job knows it
