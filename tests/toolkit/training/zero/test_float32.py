"""Temperature and exports in float32 beside a model in bf16, at every ZeRO stage."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.toolkit.training.test_trainer import make_trainer, settings, train
from toolkit.config import schema as config
from toolkit.run_folder import load_model


def plain(each: config.Config) -> config.Config:
    """In bf16, and of the objectives SIC alone."""
    each.training.precision = "bf16"
    each.model.image.stem = "patches"  # a CPU refuses another in bf16
    each.objectives.matching.weight = each.objectives.denoising.weight = 0.0
    return each


def watch(rank: int, world_size: int, *runs: config.Config) -> list[tuple[list[float], list[float], float]]:
    """Train, and give what each step computed with, the optimizer's own value after it, and one resumed from there."""
    from toolkit.training.zero.state import fragments

    result = []
    for each in runs:
        trainer = make_trainer(rank, world_size, each)
        name = "model.temperature.log_temperature"
        seen, masters = [], []
        batches = trainer.batches(range(each.training.steps))
        for step in range(each.training.steps):
            own = [float(one.master[0].exp()) for one in fragments(trainer.engine) if one.name == name]
            masters += own
            seen.append(float(trainer.train_step(step, batches)["temperature"]))
        trainer.progress.step = each.training.steps
        trainer.save()
        trainer.checkpoints.wait()
        trainer.close()
        again = make_trainer(rank, world_size, each)
        shown = again.learner.model.temperature.exact
        own = [float(one.master[0].exp()) for one in fragments(again.engine) if one.name == name]
        again.close()
        result.append((seen, masters, own, None if shown is None else float(shown.exp())))
    return result


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("world_size", "stages"), [(1, (2,)), (2, (0, 1, 3))])
def test_the_temperature_moves_by_its_float32_steps(
    shards: Path, tmp_path: Path, world_size: int, stages: tuple[int, ...]
) -> None:
    """Steps of 1e-3 of its logarithm, where bf16 has 1.6e-2 between two numbers."""
    runs = [
        plain(settings(shards, tmp_path / f"{zero}", zero_stage=zero, warmup_steps=0, min_lr=1e-3)) for zero in stages
    ]
    by_rank = run_ranks(watch, world_size, *runs, timeout=200)
    for zero in range(len(stages)):
        for seen, _, _, resumed in (result[zero] for result in by_rank):
            masters = next(result[zero][1] for result in by_rank if result[zero][1])
            assert seen == pytest.approx(masters, rel=1e-6), f"stage {stages[zero]}"
            assert len(set(seen)) == len(seen) == 4, "it did not move at each step"
            assert max(abs(math.log(b / a)) for a, b in itertools.pairwise(seen)) < 2e-3
            kept = next(result[zero][2] for result in by_rank if result[zero][2])
            assert resumed == pytest.approx(kept[0], rel=1e-6)


@pytest.mark.timeout(120)
def test_a_fixed_temperature_is_the_configured_one(shards: Path, tmp_path: Path) -> None:
    fixed = plain(settings(shards, tmp_path / "fixed", zero_stage=1, steps=2))
    fixed.objectives.contrastive.learn_temperature = False
    ((seen, _, _, _),) = run_ranks(watch, 1, fixed)[0]
    assert seen == pytest.approx([0.07] * 2, rel=1e-6), "bf16 holds 0.0698"


def export_weights(rank: int, world_size: int, *runs: config.Config) -> list[dict[str, torch.Tensor]]:
    """Train each; on every rank the float32 weights that the optimizer has of the last step, by name, in parts."""
    from toolkit.training.zero.state import fragments

    kept: list[Any] = []
    for each in runs:
        trainer = make_trainer(rank, world_size, each)
        trainer.train()
        kept.append([(one.name, one.start, one.stop, one.master.clone()) for one in fragments(trainer.engine)])
        trainer.close()
    return kept


@pytest.mark.timeout(240)
def test_exports_can_hold_the_optimizers_weights(shards: Path, tmp_path: Path) -> None:
    runs = [
        plain(settings(shards, tmp_path / f"{zero}", zero_stage=zero, steps=2, export_dtype="fp32"))
        for zero in range(4)
    ]
    by_rank = run_ranks(export_weights, 2, *runs, timeout=200)
    for zero in range(4):
        folder = tmp_path / f"{zero}" / "export" / "last"
        written = load_file(folder / "model.safetensors")
        assert {value.dtype for value in written.values() if value.is_floating_point()} == {torch.float32}
        seen = 0
        for local_fragments in by_rank:
            for name, start, stop, master in local_fragments[zero]:
                if name.startswith("model."):
                    exact = written[name.removeprefix("model.")].view(-1)[start:stop]
                    assert torch.equal(exact, master), f"stage {zero}: {name}"
                    seen += stop - start
        assert seen > 10_000
        weights = [value for value in written.values() if value.is_floating_point()]
        assert any(not torch.equal(value, value.bfloat16().float()) for value in weights)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}


@pytest.mark.timeout(120)
def test_exports_are_in_the_models_precision_unless_requested(shards: Path, tmp_path: Path) -> None:
    run_ranks(train, 1, plain(settings(shards, tmp_path / "run", zero_stage=1, steps=1)))
    folder = tmp_path / "run" / "export" / "last"
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
