"""Numbers that are not finite: one rank's are every rank's, and the step leaves no trace but its count."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shards.files import read_records
from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.log_lines import collect_lines
from toolkit.config import schema as config
from toolkit.training.fault_tolerance.nonfinite import NonFiniteDetector

STEPS, BAD = 5, 2  # of which the step with number 2 is bad


def settings(shards: Path, run: Path, **training: Any) -> config.Config:
    return test_trainer.settings(shards, run, **({"steps": STEPS, "accumulation": 2} | training))


def train(rank: int, world_size: int, runs: list[config.Config], how: str) -> list[dict[str, Any]]:
    """Train several runs with a bad step, and tell what each has counted and kept.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        runs: The runs.
        how: "loss", "gradient" or "picture" is not finite in the step's first micro-batch on the last rank, or the
            step is "left out".
    """
    ends = []
    for each in runs:
        trainer = test_trainer.make_trainer(rank, world_size, each)
        if how == "left out":
            leave_out(trainer)
        else:
            micro = BAD * each.training.accumulation if rank == world_size - 1 else -1
            spoil(trainer, how, micro)
        lines = collect_lines()
        progress = trainer.train()
        counted = {"skipped": progress.skipped, "step": progress.step, "in a row": progress.skipped_in_a_row}
        Path(each.run, f"output{rank}").write_text("\n".join(lines))
        ends.append(counted | {"queue": trainer.queue.ids.tolist(), "pointer": int(trainer.queue.pointer)})
        trainer.close()
    return ends


def spoil(trainer: Any, how: str, bad_micro: int) -> None:
    from toolkit.training import trainer as module
    from toolkit.training.zero.engine import backward

    micro = iter(range(10**6))
    now = [-1]
    real = trainer.next_batch

    def fetch(batches: Any) -> Any:
        batch = real(batches)
        now[0] = next(micro)
        if how == "picture" and now[0] == bad_micro:
            batch.images = batch.images * math.nan
        return batch

    def spoil_loss(engine: Any, loss: torch.Tensor) -> None:
        bad = how == "loss" and now[0] == bad_micro
        backward(engine, loss + math.nan if bad else loss)  # the gradient of the sum is finite

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if how == "gradient" and now[0] == bad_micro else gradient

    trainer.next_batch = fetch
    module.backward = spoil_loss
    next(p for name, p in trainer.learner.named_parameters() if "fusion" in name).register_hook(spoil_gradient)


def leave_out(trainer: Any) -> None:
    take = trainer.train_step

    def step(number: int, batches: Any) -> Any:
        if number != BAD:
            return take(number, batches)
        for _ in range(trainer.config.training.accumulation):
            trainer.next_batch(batches)
        return {"loss": torch.zeros(()), "contrastive": torch.zeros(()), "temperature": torch.zeros(())}

    trainer.train_step = step


@pytest.mark.timeout(300)
def test_a_non_finite_loss_on_one_rank_of_four_changes_nothing_at_any_stage(shards: Path, tmp_path: Path) -> None:
    runs = [settings(shards, tmp_path / str(zero), zero_stage=zero) for zero in range(4)]
    ends = run_ranks(train, 4, runs, "loss", timeout=200)
    reference = run_ranks(train, 4, [settings(shards, tmp_path / "left out")], "left out", timeout=100)
    expected = reference[0][0] | {"skipped": 1}
    assert [end for rank in ends for end in rank] == [expected] * 16, "equal on all ranks, at all stages"
    left_out = [r for r in test_trainer.losses(tmp_path / "left out") if r["step"] != BAD + 1]
    for zero in range(4):
        after = test_trainer.losses(tmp_path / str(zero))
        assert [r["step"] for r in after] == [1, 2, 4, 5]
        for one, other in zip(after, left_out, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
        intervals = [r for r in read_records(tmp_path / f"{zero}/log.jsonl") if "skipped" in r]
        assert [r["skipped"] for r in intervals] == [0, 0, 1, 1, 1]
        output = (tmp_path / str(zero) / "output0").read_text()
        assert output.count("step 3 skipped: loss or gradient not finite") == 1
        assert output.count("skipped 1") == 3, "in the lines of the steps from then on"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_non_finite_gradient_is_skipped_at_any_stage(shards: Path, tmp_path: Path, precision: str) -> None:
    runs = [settings(shards, tmp_path / str(zero), zero_stage=zero, precision=precision) for zero in range(4)]
    for run in runs:
        run.training.accumulation = 1
    for ends in run_ranks(train, 2, runs, "gradient", timeout=200):
        assert [(end["skipped"], end["step"]) for end in ends] == [(1, STEPS)] * 4
    for zero in range(4):
        after = test_trainer.losses(tmp_path / str(zero))
        assert [r["step"] for r in after] == [1, 2, 4, 5]
        assert all(math.isfinite(value) for r in after for value in r.values())


@pytest.mark.timeout(120)
def test_the_first_bad_module_is_named_with_its_rank(shards: Path, tmp_path: Path) -> None:
    run = settings(shards, tmp_path / "run", detect_nonfinite=True)
    run_ranks(train, 2, [run], "picture", timeout=100)
    named = [r["first bad module"] for r in read_records(tmp_path / "run/log.jsonl") if r.get("event") == "skipped"]
    assert len(named) == 1
    assert named[0].startswith("first in rank 0: ")
    assert ", rank 1: model.image." in named[0], "where the picture went in"


@pytest.mark.timeout(120)
def test_skips_in_a_row_end_the_run_with_one_line_and_keep_the_last_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = settings(shards, tmp_path / "run", lr=1e30, warmup_steps=0, save_every=1, keep_checkpoints=1, steps=STEPS)
    run.training.max_skipped_in_a_row = 3
    with pytest.raises(RankError, match=r"UserError: loss or gradient not finite by step 4, 3 times in a row: "):
        run_ranks(test_trainer.train, 2, run, timeout=100)
    (kept,) = (tmp_path / "run/checkpoints").iterdir()
    assert kept.name == "step-00000001", "the last before the first skipped step"
    assert (kept / "progress.json").exists()


def test_the_first_module_is_found_in_any_kind_of_output() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.divide, self.add = nn.ReLU(), nn.Linear(2, 2)

        def forward(self, value: torch.Tensor) -> dict[str, Any]:
            return {"sum": (self.add(self.divide(value)), [torch.tensor(1)])}

    root = Root()
    first = NonFiniteDetector({"": root, "other": nn.Identity()})
    root(torch.ones(2))
    assert first.first_module() is None
    first.reset()
    root(torch.tensor([math.inf, 1.0]))
    assert first.first_module() == "divide"
    first.reset()
    with torch.no_grad():
        root.add.weight.fill_(math.nan)
    root(torch.ones(2))
    assert first.first_module() == "add"
