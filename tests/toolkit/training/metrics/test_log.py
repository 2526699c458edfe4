"""The log of a run: rates of an interval over all ranks, and one wandb ID for all restarts."""

import contextlib
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.files import read_records
from shards.logs import setup_logging
from tests.distributed import run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.log_lines import collect_lines
from toolkit.config import schema as config
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.metrics.flops import BatchStats
from toolkit.training.metrics.log import MetricsLogger, logger


def logger_of(rank: int, world_size: int, run: Path, progress: Progress) -> MetricsLogger:
    settings = config.Config(wandb=config.Wandb(mode="disabled"))
    return MetricsLogger(run, settings, progress, rank, world_size, torch.device("cpu"))


def intervals(rank: int, world_size: int, run: Path) -> None:
    """Two intervals of one step; rank r has (r + 1) times as much work in them."""
    log = logger_of(rank, world_size, run, progress := Progress())
    log.config.training.batch_size = 12
    for step, times in ((1, 1), (2, 3)):
        share = times * (rank + 1)
        log.stats.add(
            BatchStats(
                share, 2.0 * share, 3.0 * share, 10 * share, 20 * share, {"SIC": 3e9 * share, "SIM": 1e9 * share}
            )
        )
        log.step({"loss": torch.tensor(1.0), "contrastive": torch.tensor(1.0)}, 1e-3)
        progress.step = step
        log.flush(progress)


def test_an_interval_has_tokens_speech_and_flops_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(intervals, 2, tmp_path)
    records = list(read_records(tmp_path / "log.jsonl"))
    for record, times in zip(records, (1, 3), strict=True):
        elapsed = 12 / record["pairs_per_second"]
        assert record["tokens_per_second"] * elapsed == pytest.approx(30 * 3 * times)
        assert record["audio_per_second"] * elapsed == pytest.approx(2 * 3 * times)
        assert record["tflops"] * elapsed == pytest.approx(4e-3 * 3 * times / 2), "of a rank"


def controls(rank: int, world_size: int, run: Path) -> None:
    """Two intervals of two steps; the last step of the first has a control, greater on rank 1."""
    log = logger_of(rank, world_size, run, progress := Progress())
    for step in range(1, 5):
        losses = {"loss": 1.0, "contrastive": 1.0, "matching": float(step)}
        losses |= {"matching_control": 5.0 + rank} if step == 2 else {}
        log.step({name: torch.tensor(value) for name, value in losses.items()}, 1e-3)
        progress.step = step
        if step % 2 == 0:
            log.flush(progress)


def test_a_control_is_of_the_intervals_last_step_and_the_mean_of_the_ranks(tmp_path: Path) -> None:
    run_ranks(controls, 2, tmp_path)
    first, second = read_records(tmp_path / "log.jsonl")
    assert (first["matching"], first["matching_control"]) == (1.5, 5.5)
    assert second["matching"] == 3.5
    assert "matching_control" not in second


def begun_within(rank: int, world_size: int, run: Path) -> None:
    """An interval of three steps, in the last two of which SIM takes part."""
    log = logger_of(rank, world_size, run, progress := Progress())
    for step in range(1, 4):
        losses = {"loss": float(step), "contrastive": 1.0} | ({"matching": 10.0 * step + rank} if step > 1 else {})
        log.step({name: torch.tensor(value) for name, value in losses.items()}, 1e-3)
        progress.step = step
    log.flush(progress)


def test_a_loss_that_begins_within_an_interval_is_averaged_over_its_own_steps(tmp_path: Path) -> None:
    run_ranks(begun_within, 2, tmp_path)
    (record,) = read_records(tmp_path / "log.jsonl")
    assert (record["loss"], record["matching"]) == (2.0, 25.5)


def log_on_a_full_disk(rank: int, world_size: int, run: Path) -> None:
    """Nothing more can be written, then it can again."""
    log = logger_of(rank, world_size, run, Progress())
    lines = collect_lines()
    log._write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "log.jsonl").stat().st_size + 4, limits[1]))
    log.start(torch.nn.Module(), 3, [])
    for step in (2, 3):
        log._write({"step": step})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log._write({"step": 4})
    log.close(Progress())
    assert [line for line in lines if "training goes on" in line] == [
        f"{run / name} was not written: File too large; training goes on" for name in ("environment.json", "log.jsonl")
    ]


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path) -> None:
    run_ranks(log_on_a_full_disk, 1, tmp_path)
    steps = [record["step"] for record in read_records(tmp_path / "log.jsonl") if "step" in record]
    assert steps[0] == 1
    assert steps[-1] == 4
    assert (tmp_path / "report.html").exists()


def test_output_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        setup_logging()
        for _ in range(3000):
            logger.info("a line")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def identities(run: Path) -> set[str]:
    """The ids that wandb's own folders have in their names."""
    return {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}


@pytest.mark.timeout(200)
def test_a_run_keeps_its_wandb_id_over_restarts_and_in_another_folder(shards: Path, tmp_path: Path) -> None:
    def settings(name: str, **training: Any) -> config.Config:
        run = test_trainer.settings(shards, tmp_path / name, batch_size=4, **training)
        run.objectives.matching.weight = run.objectives.denoising.weight = 0.0
        run.wandb.mode = "offline"
        return run

    run_ranks(test_trainer.train, 1, settings("here", stop_after=1), settings("here", stop_after=1), timeout=90)
    here = identities(tmp_path / "here")
    assert len(here) == 1
    assert len(list((tmp_path / "here/wandb").glob("offline-run-*"))) == 2
    shutil.copytree(tmp_path / "here/checkpoints", tmp_path / "there/checkpoints")
    run_ranks(test_trainer.train, 1, settings("there", stop_after=1), settings("new", stop_after=1), timeout=90)
    assert identities(tmp_path / "there") == here
    assert identities(tmp_path / "new").isdisjoint(here)
    marker = json.loads((tmp_path / "there/checkpoints/step-00000003/progress.json").read_text())
    assert {marker["wandb_id"]} == here == {(tmp_path / "there/wandb_id").read_text()}


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_its_wandb_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "toolkit.training.metrics.wandb_run.WandbRun", lambda options, mode: opened.append(options["id"])
    )
    settings = config.Config(wandb=config.Wandb(mode="offline"))
    for _ in "12":
        MetricsLogger(tmp_path, settings, Progress(), 0, 1, torch.device("cpu"))
    MetricsLogger(tmp_path, settings, Progress(wandb_id="fromcheckpoint"), 0, 1, torch.device("cpu"))
    assert opened[0] == opened[1]
    assert opened[2] == "fromcheckpoint" == (tmp_path / "wandb_id").read_text()
