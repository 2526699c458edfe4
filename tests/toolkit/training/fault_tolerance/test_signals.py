"""Signals: one to any rank stops all, the run is saved, and resumes as if it had not been stopped."""

import contextlib
import io
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ExitCode
from tests.distributed import run_ranks
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config
from toolkit.run_folder import to_yaml
from toolkit.training.fault_tolerance.signals import STOP_SIGNALS, StopSignals

STEPS = 6


def settings(shards: Path, run: Path, **training: Any) -> config.Config:
    return test_trainer.settings(shards, run, **({"steps": STEPS, "save_every": STEPS} | training))


def start(rank: int, world_size: int, file: Path, hits: dict[int, tuple[int, int]], during: str) -> tuple[int, str]:
    """Run the command on this rank, and signal it at steps; give its exit code and what it printed.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        file: The configuration.
        hits: Rank and signal, by step.
        during: Method of the trainer before whose call of that step the signal comes.
    """
    from toolkit import train
    from toolkit.training.trainer import Trainer

    method = getattr(Trainer, during)

    def hit(self: Any, *args: Any) -> Any:
        victim, number = hits.get(self.progress.step, (-1, 0))
        if rank == victim:
            os.kill(os.getpid(), number)
        return method(self, *args)

    setattr(Trainer, during, hit)
    sys.argv = ["train.py"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            train.main(["--config", str(file)])
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
    return 0, output.getvalue()


def codes(ends: list[tuple[int, str]]) -> list[int]:
    return [code for code, _ in ends]


def configured(run: config.Config, folder: Path) -> Path:
    file = folder / f"{Path(run.run).name}.yaml"
    file.write_text(to_yaml(run))
    return file


@pytest.mark.timeout(240)
def test_stopped_at_random_steps_and_started_again_equals_never_stopped(shards: Path, tmp_path: Path) -> None:
    chance = random.Random()
    first, second = sorted(chance.sample(range(STEPS - 1), 2))
    hits = [{first: (1, signal.SIGTERM)}, {second: (0, signal.SIGUSR1)}, {}]
    broken = configured(settings(shards, tmp_path / "broken", zero_stage=2), tmp_path)
    ends = [run_ranks(start, 2, broken, hit, "train_step", timeout=100) for hit in hits]
    assert [codes(end) for end in ends] == [[ExitCode.REQUEUE] * 2, [ExitCode.REQUEUE] * 2, [0, 0]], (
        f"signals at {first} and {second}"
    )
    for (step, name), end in zip(((first, "SIGTERM"), (second, "SIGUSR1")), ends, strict=False):
        assert end[0][1].count(f"{name}: stopped after step {step + 1} of {STEPS}, exit code 75; ") == 1
        assert end[1][1] == "", "rank 0 speaks for all"
    again = run_ranks(start, 2, broken, {}, "train_step", timeout=60)
    assert codes(again) == [0, 0], "a complete run is not to be requeued"

    unbroken = configured(settings(shards, tmp_path / "unbroken", zero_stage=2), tmp_path)
    assert codes(run_ranks(start, 2, unbroken, {}, "train_step", timeout=100)) == [0, 0]
    assert len(test_trainer.losses(tmp_path / "unbroken")) == STEPS
    assert test_trainer.losses(tmp_path / "broken") == test_trainer.losses(tmp_path / "unbroken")


@pytest.mark.timeout(120)
def test_a_signal_while_saving_and_one_in_the_last_step_do_no_harm(shards: Path, tmp_path: Path) -> None:
    run = settings(shards, tmp_path / "run", steps=3, save_every=1)
    file = configured(run, tmp_path)
    hits = {2: (0, signal.SIGTERM), 3: (1, signal.SIGTERM)}  # in the save of step 2, and in that of the last
    assert codes(run_ranks(start, 2, file, hits, "save", timeout=100)) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000003"


@pytest.mark.timeout(120)
def test_a_second_signal_in_the_save_of_the_first_does_no_harm(shards: Path, tmp_path: Path) -> None:
    file = configured(settings(shards, tmp_path / "run", zero_stage=1, save_every=2), tmp_path)
    hits = {2: (0, signal.SIGTERM), 3: (0, signal.SIGTERM)}  # in a save, and in the one that follows from that
    assert codes(run_ranks(start, 2, file, hits, "save", timeout=60)) == [ExitCode.REQUEUE] * 2
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000003"


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    signals = StopSignals()
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.number == signal.SIGUSR2
    signals.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
