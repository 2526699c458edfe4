"""The watchdog: a rank that stalls ends all, and each leaves the stacks of its threads."""

import os
import time
from pathlib import Path

import pytest

from shards.errors import ExitCode
from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config
from toolkit.training.fault_tolerance.watchdog import Watchdog


def stall_at_step_2(rank: int, world_size: int, run: config.Config, folder: Path) -> None:
    from toolkit.training.trainer import Trainer

    with (folder / f"err{rank}").open("wb") as file:
        os.dup2(file.fileno(), 2)
    real = Trainer.train_step

    def fall_asleep() -> None:
        time.sleep(1000)

    def step(self: Trainer, number: int, batches: object) -> object:
        if rank == 1 and number == 2:
            fall_asleep()
        return real(self, number, batches)

    Trainer.train_step = step
    test_trainer.train(rank, world_size, run)


@pytest.mark.timeout(120)
def test_a_rank_that_stalls_ends_all_and_all_stacks_are_there(shards: Path, tmp_path: Path) -> None:
    run = test_trainer.settings(shards, tmp_path / "run", watchdog=8.0)
    with pytest.raises(RankError, match=f"died with exit code {ExitCode.TRANSIENT}"):
        run_ranks(stall_at_step_2, 2, run, tmp_path, timeout=100)
    for rank, place in ((0, "in next_batch"), (1, "in fall_asleep")):
        stacks = (tmp_path / "run" / f"stacks-rank{rank}.txt").read_text()
        assert f"rank {rank}: no step was completed for 8 s (--training.watchdog); all threads:" in stacks
        assert place in stacks
        assert stacks.count("most recent call first") >= 2, "the watchdog's own thread and the main one"
        output = (tmp_path / f"err{rank}").read_text()
        assert f"rank {rank}: no step" in output
        assert place in output


def test_beats_and_pauses_restart_the_timeout_and_the_first_step_has_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("toolkit.training.fault_tolerance.watchdog.os._exit", lambda code: ended.append(code))
    monkeypatch.setattr("toolkit.training.fault_tolerance.watchdog._LINGER", 0.0)
    with Watchdog(tmp_path, 0, 1.0) as watchdog:
        time.sleep(2.0)  # the first step
        for _ in range(6):
            watchdog.beat()
            time.sleep(0.3)
        with watchdog.paused():
            time.sleep(1.5)
        assert ended == []
        time.sleep(1.8)
        assert ended
    ended.clear()
    with Watchdog(tmp_path, 0, 0.0):
        time.sleep(0.3)
    assert ended == []
