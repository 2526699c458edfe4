"""Learning rates of trunks by layer, and LoRA: the same at every ZeRO stage, and after a restart at another one."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shards.files import read_records
from tests.distributed import run_ranks
from tests.tiny import PARTITIONED, tiny_model
from tests.toolkit.training.test_trainer import losses, make_trainer, settings, train
from toolkit.config import schema as config
from toolkit.config.validate import check_config
from toolkit.model.build import build_model
from toolkit.run_folder import fingerprint
from toolkit.training.learner import Learner
from toolkit.training.metrics.log import MetricsLogger
from toolkit.training.schedules import learning_rate, set_learning_rates, trunk_rate
from toolkit.training.zero.engine import _parameter_groups, _rate_scales


def groups_of(run: config.Config) -> tuple[Learner, list[dict[str, Any]]]:
    learner = Learner(build_model(run.model), run.objectives, 0, 1)
    return learner, _parameter_groups(learner, 0.02, _rate_scales(learner, run.training))


def test_by_default_the_groups_are_matrices_and_the_rest_with_and_without_a_teacher() -> None:
    _, groups = groups_of(config.Config(model=tiny_model()))
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0, 0.02, 0.0]
    assert [sorted(group) for group in groups] == [["params", "weight_decay"]] * 4


@pytest.mark.parametrize(("trunk_lr", "decay"), [(None, 0.5), (2e-5, 1.0), (2e-5, 0.5)])
def test_every_weight_is_in_one_group_with_its_learning_rate(trunk_lr: float | None, decay: float) -> None:
    run = config.Config(model=tiny_model())
    run.training.trunk_lr, run.training.layer_decay, run.training.lr = trunk_lr, decay, 1e-4
    learner, groups = groups_of(run)
    set_learning_rates(groups, run.training, 12000)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == sum(len(group["params"]) for group in groups)
    at_step = learning_rate(run.training, 12000)
    for name, parameter in trained.items():
        expected = at_step
        if ".trunk." in name:
            expected *= 1.0 if trunk_lr is None else trunk_lr / 1e-4
            if "embed" in name or "feature_" in name or "pre_layrnorm" in name:
                expected *= decay**2
            elif ".layers.0." in name:
                expected *= decay
        assert rates[id(parameter)] == pytest.approx(expected, rel=1e-12), name
        assert decays[id(parameter)] == (0.02 if parameter.ndim > 1 else 0.0)


def test_the_log_has_the_trunks_rate_only_if_it_differs() -> None:
    assert trunk_rate(config.Training(), 1e-4) == {}
    assert trunk_rate(config.Training(layer_decay=0.5), 1e-4) == {}
    assert trunk_rate(config.Training(lr=1e-4, trunk_lr=1e-5), 5e-5) == {"trunk_lr": pytest.approx(5e-6)}


def test_the_step_line_has_the_trunks_rate_only_if_it_differs() -> None:
    log = SimpleNamespace(config=config.Config(), dev=None, seconds_before=0.0, first_step=0)
    record: dict[str, Any] = dict.fromkeys(("pairs_per_second", "waiting", "memory_gb", "skipped", "bad_samples"), 0)
    record |= {"step": 5, "lr": 1e-4, "seconds": 9.0}
    plain = MetricsLogger._line(log, record)  # type: ignore[arg-type]
    assert "lr 1.0e-04  0 pairs/s" in plain
    both = MetricsLogger._line(log, record | {"trunk_lr": 1e-5})  # type: ignore[arg-type]
    assert both == plain.replace("lr 1.0e-04", "lr 1.0e-04 (trunk 1.0e-05)")


def test_newer_keys_count_where_they_are_not_the_default() -> None:
    default = config.Config()
    for edit in (
        lambda c: setattr(c.training, "trunk_lr", 1e-5),
        lambda c: setattr(c.training, "layer_decay", 0.9),
        lambda c: setattr(c.model.speech, "lora_rank", 4),
        lambda c: setattr(c.model.image, "lora_alpha", 4.0),
        lambda c: setattr(c.model.speech, "architecture", "wavlm"),
    ):
        other = config.Config()
        edit(other)
        assert fingerprint(other) != fingerprint(default)


@pytest.mark.parametrize(("key", "value"), [("trunk_lr", 1e-5), ("layer_decay", 0.5)])
def test_a_rate_of_frozen_trunks_is_refused(key: str, value: float) -> None:
    run = config.Config()
    setattr(run.training, key, value)
    with pytest.raises(Exception, match=rf"--training\.{key} has no effect: both trunks are frozen"):
        check_config(run)
    run.model.image.lora_rank = 2
    check_config(run)


@pytest.mark.parametrize(("key", "value"), [("trunk_lr", 0.0), ("layer_decay", 0.0), ("layer_decay", 1.1)])
def test_rates_out_of_range_are_refused(key: str, value: float) -> None:
    run = config.Config(model=tiny_model())
    setattr(run.training, key, value)
    with pytest.raises(Exception, match=rf"--training\.{key} is "):
        check_config(run)


def tuned(shards: Path, folder: Path, **training: Any) -> config.Config:
    """The speech trunk trains with its own rates, the image trunk by LoRA."""
    run = settings(shards, folder, trunk_lr=4e-4, layer_decay=0.5, **training)
    run.model.image.stem, run.model.image.train, run.model.image.lora_rank = "patches", "none", 2
    if training.get("zero_stage") == 3:
        run.deepspeed = PARTITIONED
    return run


def first_step(rank: int, world_size: int, *runs: config.Config) -> list[dict[str, float]]:
    """How far each trained weight of the student moves in a run's first step."""
    from toolkit.training.zero.engine import gathered_parameters

    moved = []
    for run in runs:
        trainer = make_trainer(rank, world_size, run)
        parameters = dict(trainer.learner.named_parameters())
        with gathered_parameters(trainer.engine, list(parameters.values())):
            before = {name: p.detach().float().clone() for name, p in parameters.items() if p.requires_grad}
        trainer.train_step(0, trainer.batches(range(1)))
        with gathered_parameters(trainer.engine, list(parameters.values())):
            moved.append({name: float((parameters[name] - value).abs().max()) for name, value in before.items()})
        trainer.close()
    return moved


@pytest.mark.timeout(240)
def test_adams_first_step_is_as_long_as_the_learning_rate(shards: Path, tmp_path: Path) -> None:
    runs = [
        tuned(shards, tmp_path / str(zero), zero_stage=zero, warmup_steps=0, weight_decay=0.0, steps=2)
        for zero in (0, 2, 3)
    ]
    for moved in run_ranks(first_step, 2, *runs, timeout=200)[0]:
        assert len(moved) > 50
        for name, distance in moved.items():
            expected = 1e-3
            if ".trunk." in name:
                expected = 4e-4
                if ".encoder.layers.0." in name:
                    expected *= 0.5
                elif ".encoder.layers.1." not in name and "encoder.layer_norm" not in name:
                    expected *= 0.25
            if "k_proj.bias" in name or "key_value.bias" in name or "lora_A" in name:
                continue  # rounding alone; B is zero, and A has no gradient yet
            assert distance == pytest.approx(expected, rel=0.02), name


@pytest.mark.timeout(300)
def test_every_zero_stage_trains_with_the_same_losses(shards: Path, tmp_path: Path) -> None:
    runs = [tuned(shards, tmp_path / str(zero), zero_stage=zero) for zero in range(4)]
    runs.append(tuned(shards, tmp_path / "recomputed", zero_stage=2, activation_checkpointing=True))
    run_ranks(train, 2, *runs, timeout=240)
    reference = losses(tmp_path / "0")
    assert reference[0]["loss"] != pytest.approx(reference[3]["loss"], rel=1e-3), "nothing was learned"
    for zero in ("1", "2", "3", "recomputed"):
        for found, expected in zip(losses(tmp_path / zero), reference, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), f"step {expected['step']}, ZeRO {zero}"
    for record in read_records(tmp_path / "0/log.jsonl"):
        if "lr" in record:
            assert record["trunk_lr"] == pytest.approx(0.4 * record["lr"])
    check_saved(tmp_path / "0")
    check_saved(tmp_path / "3")


def check_saved(run: Path) -> None:
    """A checkpoint holds what is trained; the export has the adapters merged."""
    names = set()
    for path in (run / "checkpoints/step-00000004").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {key.partition(":")[2] or key for key in file.keys()}  # noqa: SIM118
    image = {name for name in names if "image.trunk" in name}
    assert image
    assert all("lora_" in name for name in image), "the frozen trunk is in the checkpoint"
    exported = load_file(run / "export/last/model.safetensors")
    assert not [name for name in exported if "lora_" in name or "base_layer" in name]
    torch.manual_seed(0)
    fresh = build_model(tiny_model()).state_dict()
    assert {name for name in exported if "image.trunk" in name} == {name for name in fresh if "image.trunk" in name}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "zero"), [(2, 2), (1, 3), (3, 0)])
def test_stopped_and_continued_equals_unbroken_at_another_stage_and_world_size(
    shards: Path, tmp_path: Path, ranks: int, zero: int
) -> None:
    def run(name: str, stage: int, **more: Any) -> config.Config:
        made = tuned(shards, tmp_path / name, zero_stage=stage, batch_size=12, **more)
        made.objectives.denoising.swap_group = 2
        made.objectives.matching.queue = 0
        return made

    run_ranks(train, 2, run("unbroken", 2), timeout=100)
    run_ranks(train, 2, run("halves", 2, stop_after=2), timeout=100)
    run_ranks(train, ranks, run("halves", zero), timeout=100)
    tolerance = 0 if (ranks, zero) == (2, 2) else 1e-5
    pairs = zip(losses(tmp_path / "halves"), losses(tmp_path / "unbroken"), strict=True)
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    shutil.rmtree(tmp_path / "halves")
