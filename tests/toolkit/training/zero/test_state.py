"""Fragments of the optimizer's state: against a plain AdamW, at every ZeRO stage and precision."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks
from toolkit.config import schema as config

LR, STEPS = 0.1, 3
CASES = [(zero, precision, "none") for precision in ("fp32", "bf16") for zero in range(4)]
CASES += [(1, "fp32", "cpu"), (2, "bf16", "cpu"), (3, "fp32", "cpu")]


class Part(nn.Module):
    """One parameter; a module of its own, since ZeRO 3 gathers by module."""

    def __init__(self, *shape: int, trained: bool = True) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape), requires_grad=trained)

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        """A loss whose gradient is `slope`."""
        return (self.value.float() * slope).sum()


class Small(nn.Module):
    """Parameters of odd sizes, one smaller than the number of ranks, one frozen; the step sets their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.wide, self.bias, self.still = Part(7, 5), Part(7), Part(4, trained=False)
        self.narrow, self.scale = Part(3, 7), Part(1)

    def forward(self, step: int) -> torch.Tensor:
        """A loss whose gradients are of a few bits, exact in bfloat16."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.named_parameters()}
        return torch.stack(
            [part(slope(f"{n}.value", shapes[f"{n}.value"], step)) for n, part in self.named_children()]
        ).sum()


def slope(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    count = torch.arange(math.prod(shape)).view(shape)
    return ((count * 5 + len(name) + step * 3) % 8 - 3.5) / 4


def reference(start: dict[str, torch.Tensor], state: dict[str, tuple[torch.Tensor, ...]], first: int) -> nn.Module:
    """Take the steps from `first` on with torch's AdamW on one float32 model, from moments given by name."""
    model = Small()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(start[name])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.5},
            {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.8, 0.9),
    )
    for name, (average, square) in state.items():
        adam.state[trained[name]] = {"step": torch.tensor(float(first)), "exp_avg": average, "exp_avg_sq": square}
    for step in range(first, first + STEPS):
        for name, p in trained.items():
            p.grad = slope(name, p.shape, step)
        adam.step()
    model.adam = adam
    return model


def settings(world_size: int, zero: int, precision: str, offload: str) -> config.Config:
    training = config.Training(
        batch_size=world_size,
        lr=LR,
        weight_decay=0.5,
        betas=[0.8, 0.9],
        grad_clip=0.0,
        zero_stage=zero,
        precision=precision,
    )
    options: dict[str, Any] = {"stage3_param_persistence_threshold": 10}  # gathers the larger ones when they are used
    if offload != "none":
        options["offload_optimizer"] = {"device": offload}
    return config.Config(training=training, deepspeed={"zero_optimization": options})


def values(engine: Any) -> dict[str, Any]:
    """What this rank holds, by (name, start, part)."""
    from toolkit.training.zero.state import PARTS, fragments

    local_fragments = fragments(engine)
    for each in local_fragments:
        assert all(getattr(each, part).shape == (each.stop - each.start,) for part in PARTS)
        assert each.shape == tuple(dict(Small().named_parameters())[each.name].shape)
    return {(each.name, each.start, part): getattr(each, part).clone() for each in local_fragments for part in PARTS}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    from toolkit.training.zero.engine import gathered_parameters

    with gathered_parameters(engine, list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def step(engine: Any, steps: range) -> None:
    for number in steps:
        engine.backward(engine(number))
        engine.step()


def stages(rank: int, world_size: int) -> list[dict[str, Any]]:
    """In every case: train, look, overwrite everything, look, train, look."""
    from toolkit.training.zero.engine import make_engine
    from toolkit.training.zero.state import PARTS, applied_steps, editable

    outcomes = []
    for case in CASES:
        engine = make_engine(Small(), settings(world_size, *case), world_size, torch.device("cpu"))
        seen: dict[str, Any] = {"fresh": values(engine)}
        step(engine, range(STEPS))
        seen["trained"], seen["counted"], seen["weights"] = values(engine), applied_steps(engine), weights(engine)
        step(engine, range(STEPS, STEPS + 1))  # and leave weights gathered where ZeRO 3 does
        with editable(engine, 10) as local_fragments:
            for each in local_fragments:
                for part in PARTS:
                    getattr(each, part).copy_(given(each.name, each.shape, part)[each.start : each.stop])
        seen["given"] = weights(engine)
        step(engine, range(10, 10 + STEPS))
        seen["after"], seen["counted after"] = values(engine), applied_steps(engine)
        outcomes.append(seen)
        engine.destroy()
    return outcomes


def given(name: str, shape: tuple[int, ...], part: str) -> torch.Tensor:
    """Values to write over the state: all different, and moments that AdamW may have."""
    chance = torch.Generator().manual_seed(len(name) * 10 + len(part))
    return torch.rand(math.prod(shape), generator=chance) + 0.5


def assembled(ranks: list[dict[Any, torch.Tensor]], zero: int) -> dict[str, dict[str, torch.Tensor]]:
    """Complete tensors by part and name; every element must occur exactly once."""
    shapes = {name: p.shape for name, p in Small().named_parameters() if p.requires_grad}
    together: dict[str, dict[str, torch.Tensor]] = {}
    for local_fragments in ranks[:1] if zero == 0 else ranks:
        for (name, start, part), tensor in local_fragments.items():
            complete = together.setdefault(part, {}).setdefault(name, torch.full((shapes[name].numel(),), torch.nan))
            assert complete[start : start + len(tensor)].isnan().all(), f"{name} is there twice"
            complete[start : start + len(tensor)] = tensor
    for part in ("master", "exp_avg", "exp_avg_sq"):
        assert together[part].keys() == shapes.keys()
        assert not any(tensor.isnan().any() for tensor in together[part].values()), "not all of it is there"
    return {part: {n: t.view(shapes[n]) for n, t in tensors.items()} for part, tensors in together.items()}


@pytest.mark.timeout(180)
def test_fragments_are_the_state_of_adam_and_writing_to_them_changes_it() -> None:
    ranks = run_ranks(stages, 3, timeout=150)
    start = dict(Small().named_parameters())
    for case, seen in zip(CASES, zip(*ranks, strict=True), strict=True):
        zero, precision, _ = case
        low = torch.bfloat16 if precision == "bf16" else torch.float32
        begun = {name: p.detach().to(low).float() for name, p in start.items()}

        trained = assembled([each["trained"] for each in seen], zero)
        assert_state(trained, reference(begun, {}, 0), case)
        assert {each["counted"] for each in seen} == {STEPS}, case
        fresh = assembled([each["fresh"] for each in seen], zero)
        assert all(torch.equal(fresh["master"][name], begun[name]) for name in fresh["master"]), case
        for each in seen:
            for name, master in trained["master"].items():
                assert torch.equal(each["weights"][name], master.to(low)), (case, name)

        wanted = {name: given(name, p.shape, "master").view(p.shape) for name, p in start.items()}
        for each in seen:
            assert each["counted after"] == 10 + STEPS, case
            for name in trained["master"]:
                assert torch.equal(each["given"][name], wanted[name].to(low)), (case, name)
            assert torch.equal(each["given"]["still.value"], start["still.value"].detach().to(low)), case
        moments = {
            name: tuple(given(name, p.shape, part).view(p.shape) for part in ("exp_avg", "exp_avg_sq"))
            for name, p in start.items()
            if p.requires_grad
        }
        assert_state(assembled([each["after"] for each in seen], zero), reference(wanted, moments, 10), case)


def assert_state(result: dict[str, dict[str, torch.Tensor]], model: nn.Module, case: tuple[Any, ...]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = {"master": parameter.detach(), **model.adam.state[parameter]}
            for part in result:
                where = f"{case} {name} {part}"
                torch.testing.assert_close(
                    result[part][name], expected[part], rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, where)
                )
