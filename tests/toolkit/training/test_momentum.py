"""The momentum encoder: an exact average, under bf16 too, the same on any ranks, that shares what is frozen."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.training.zero.test_state import slope
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.training.momentum import MomentumEncoder, is_averaged

CPU = torch.device("cpu")
CASES = [(zero, precision, "none") for precision in ("fp32", "bf16") for zero in range(4)]
CASES += [(2, "bf16", "cpu"), (3, "fp32", "cpu")]
DECAY, STEPS = 0.9, 3


class Driven(nn.Module):
    """A model whose gradients are set by the step, the same on every rank and of a few bits, exact in bfloat16."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build_model(model)
        self.shapes = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, step: int) -> torch.Tensor:
        """A loss whose gradients are `slope`."""
        pulls = {name: slope(name, shape, step) for name, shape in self.shapes.items()}
        return torch.stack([(p.float() * pulls[n]).sum() for n, p in self.named_parameters() if n in pulls]).sum()


def driven(
    rank: int, world_size: int, case: tuple[int, str, str], model: config.Model, decay: float, lr: float
) -> tuple[Any, Any]:
    """An engine at some stage and the teacher that follows it."""
    import deepspeed

    from toolkit.training.zero.engine import make_engine

    zero, precision, offload = case
    settings: dict[str, Any] = {"stage": zero}
    if offload != "none":
        settings["offload_optimizer"] = {"device": offload}
    training = config.Training(
        batch_size=world_size,
        lr=lr,
        weight_decay=0.1,
        grad_clip=0.0,
        zero_stage=zero,
        precision=precision,
        betas=[0.5, 0.9],
    )
    learner = Driven(model)
    teacher = MomentumEncoder(learner.model, decay)
    made = config.Config(training=training, deepspeed={"zero_optimization": settings})
    engine = make_engine(learner, made, world_size, CPU)
    for p in learner.parameters() if zero == 3 else ():
        deepspeed.zero.register_external_parameter(learner, p)  # read by the learner itself: whole in its `forward`
    return engine, teacher.attach(engine, rank, world_size)


def step(engine: Any, number: int) -> None:
    engine.backward(engine(number))
    engine.step()


def of_stages(rank: int, world_size: int, cases: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """In every case: this rank's part of the average, how much it keeps and updates, the weights that encode."""
    seen = []
    for case in cases:
        engine, teacher = driven(rank, world_size, case, tiny_model(), DECAY, 0.05)
        for number in range(STEPS):
            step(engine, number)
            teacher.update()
        teacher.wait_pending()
        with teacher.editable() as again:
            fragments = {(each.name, each.start): each.average.clone() for each in again}
            for each in again:
                each.average.add_(1.0)
        seen.append(
            {
                "held": fragments,
                "kept": sum(average.numel() for average in teacher.average),
                "working": dict(zip(teacher.names, [w.detach().clone() for w in teacher.working_copy], strict=True)),
                "memory": {average.untyped_storage().data_ptr() for average in teacher.average}
                & {working.untyped_storage().data_ptr() for working in teacher.working_copy},
            }
        )
        engine.destroy()
    return seen


def reference(low: torch.dtype) -> dict[str, torch.Tensor]:
    """The average of AdamW's weights on one float32 model, from the weights in the precision of the model."""
    student = Driven(tiny_model())
    weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for p in weights.values():
        p.data = p.data.to(low).float()
    groups = [
        {"params": [p for p in weights.values() if (p.ndim > 1) == matrices], "weight_decay": 0.1 * matrices}
        for matrices in (True, False)
    ]
    adam = torch.optim.AdamW(groups, lr=0.05, betas=(0.5, 0.9))
    average = {name: p.detach().double().clone() for name, p in weights.items() if is_averaged(name)}
    for number in range(STEPS):
        for name, p in weights.items():
            p.grad = slope(name, p.shape, number)
        adam.step()
        for name, value in average.items():
            value.mul_(DECAY).add_(weights[name].detach().double(), alpha=1 - DECAY)
    return average


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_on_any_ranks_has_the_same_teacher(world_size: int) -> None:
    ranks = run_ranks(of_stages, world_size, CASES, timeout=180)
    for number, case in enumerate(CASES):
        zero, precision, _ = case
        low = torch.bfloat16 if precision == "bf16" else torch.float32
        expected = reference(low)
        total = sum(value.numel() for value in expected.values())
        found = {name: torch.full((value.numel(),), math.nan) for name, value in expected.items()}
        for seen in ranks[:1] if zero == 0 else ranks:
            for (name, start), average in seen[number]["held"].items():
                assert found[name][start : start + len(average)].isnan().all(), "held twice"
                found[name][start : start + len(average)] = average
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name].double(), value.flatten(), rtol=1e-6, atol=1e-6, msg=f"{case} {name}"
            )
        for seen in ranks:
            share = world_size if zero else 1
            assert total / share <= seen[number]["kept"] <= 1.1 * total / share + 100, case
            for name, working in seen[number]["working"].items():
                assert torch.equal(working.flatten(), (found[name] + 1).to(low)), f"{case} {name}"
            if precision == "fp32" and share == 1 and case[2] == "none":
                assert seen[number]["memory"], "in fp32 a whole average is what encodes: no second copy"


def drift(rank: int, world_size: int) -> list[float]:
    """Squared errors, on this rank's part, of the teacher, of a bf16 average and of one of bf16 weights; and the size.

    A thousand steps of the optimizer at m = 0.995; the reference averages its float32 weights in float64.
    """
    model = tiny_model()
    model.speech.train = model.image.train = "none"  # fewer parameters, of both heads: faster
    engine, teacher = driven(rank, world_size, (2, "bf16", "none"), model, 0.995, 1e-3)
    masters = [each.master for each in teacher._partitions]
    exact, naive, halfway = (
        [m.clone().to(to) for m in masters] for to in (torch.float64, torch.bfloat16, torch.float32)
    )
    for number in range(1000):
        step(engine, number)
        teacher.update()
        for reference, low, half, master in zip(exact, naive, halfway, masters, strict=True):
            reference.mul_(0.995).add_(master.double(), alpha=0.005)
            low.mul_(0.995).add_(master.bfloat16(), alpha=0.005)
            half.lerp_(master.bfloat16().float(), 0.005)
    found = [
        sum(float((a.double() - e).square().sum()) for a, e in zip(averages, exact, strict=True))
        for averages in (teacher.average, naive, halfway)
    ]
    engine.destroy()
    return [*found, sum(float(e.square().sum()) for e in exact)]


@pytest.mark.timeout(200)
def test_the_average_is_exact_under_bf16_where_a_bf16_average_is_not() -> None:
    ranks = run_ranks(drift, 2, timeout=180)
    ours, naive, of_low_weights, size = (math.fsum(column) for column in zip(*ranks, strict=True))
    assert math.sqrt(ours / size) < 1e-5
    assert math.sqrt(naive / size) > 1e-3, "a bf16 average would have done: this test shows nothing"
    assert of_low_weights > 100 * ours, "an average of the bf16 weights would have done"


def wander(student: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every trained weight a little, as an optimizer would."""
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))


def some_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    return pictures, torch.randn(2, 9000), torch.tensor([9000, 8000])


def test_in_float32_the_average_is_what_encodes() -> None:
    torch.manual_seed(0)
    student = build_model(tiny_model())
    teacher = MomentumEncoder(student, decay=0.5).to(CPU, torch.float32)
    features = student.frozen_features(*some_input())
    before = teacher(*features)[0].embedding
    wander(student, torch.Generator().manual_seed(0))
    teacher.update()
    after = teacher(*features)[0].embedding
    assert not torch.allclose(before, after), "an update did not reach the forward pass"
    assert not after.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_engine_it_follows_the_student_itself(dtype: torch.dtype) -> None:
    student = build_model(tiny_model())
    start = [p.detach().clone() for p in student.parameters() if p.requires_grad]
    teacher = MomentumEncoder(student, decay=0.75)
    student.to(dtype)
    teacher.to(CPU, dtype)
    wander(student, torch.Generator().manual_seed(0))
    teacher.update()
    end = dict(student.named_parameters())
    begun = dict(zip([n for n, p in student.named_parameters() if p.requires_grad], start, strict=True))
    for name, working in zip(teacher.names, teacher.working_copy, strict=True):
        expected = 0.75 * begun[name] + 0.25 * end[name].detach().float()
        torch.testing.assert_close(
            working.data, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


def test_frozen_weights_are_shared_and_not_averaged() -> None:
    model = tiny_model()
    model.speech.train, model.image.train = "1", "none"
    student = build_model(model)
    teacher = MomentumEncoder(student, decay=0.9).to(CPU, torch.float32)
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    addresses = {p.data_ptr() for p in teacher.encoder.parameters()}
    assert frozen <= addresses, "the teacher has its own copy of frozen weights"
    assert not frozen & {a.data_ptr() for a in teacher.average}
    assert all(name.startswith(("speech.", "image.")) for name in teacher.names)
