"""The lease of a run folder: a superseded process cannot write, and two running ones do not share a folder."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from tests.distributed import run_ranks
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config
from toolkit.run_folder import prepare_run, save_configuration
from toolkit.training.fault_tolerance import lease


def taken_by_another_host(run: Path) -> None:
    holder = {"host": "elsewhere", "pid": 7, "token": "other", "time": "2000-01-01 00:00:00"}
    (run / "lease.json").write_text(json.dumps(holder))


def lose_the_lease(rank: int, world_size: int, run: config.Config) -> str:
    """Lose the lease in step 3 of 6, and give the reason for which this rank ends."""
    from toolkit.training.trainer import Trainer

    real = Trainer.train_step

    def step(self: Trainer, number: int, batches: Any) -> Any:
        if rank == 0 and number == 2:
            taken_by_another_host(self.run)
        return real(self, number, batches)

    Trainer.train_step = step
    with pytest.raises(UserError) as error:
        test_trainer.train(rank, world_size, run)
    return str(error.value)


@pytest.mark.timeout(120)
def test_a_superseded_run_ends_on_all_ranks_before_it_writes(shards: Path, tmp_path: Path) -> None:
    run = test_trainer.settings(shards, tmp_path / "run", steps=6, save_every=1)
    reasons = run_ranks(lose_the_lease, 2, run, timeout=100)
    assert all("was taken over by process 7 on elsewhere, 2000-01-01 00:00:00" in reason for reason in reasons)
    assert [r["step"] for r in test_trainer.losses(tmp_path / "run")] == [1, 2]
    newest = max(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert newest in ("step-00000001", "step-00000002"), "that of step 2 may have been under way"
    assert json.loads((tmp_path / "run/lease.json").read_text())["token"] == "other"


def evaluate_without_the_lease(rank: int, world_size: int, run: config.Config) -> str:
    """Lose the lease while evaluating, and give the reason for which this rank ends."""
    from toolkit.training import trainer

    real = trainer.retrieve

    def retrieve(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        if rank == 0:
            taken_by_another_host(Path(run.run))
        return result

    trainer.retrieve = retrieve
    with pytest.raises(UserError) as error:
        test_trainer.train(rank, world_size, run)
    return str(error.value)


@pytest.mark.timeout(120)
def test_a_superseded_process_discards_its_evaluation(shards: Path, tmp_path: Path) -> None:
    run = test_trainer.settings(shards, tmp_path / "run", steps=2)
    run.evaluation.every = 1
    assert all("was taken over" in reason for reason in run_ranks(evaluate_without_the_lease, 2, run, timeout=100))
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there == {"environment.json", "lease.json", "log.jsonl"}
    assert '"dev"' not in (tmp_path / "run/log.jsonl").read_text()


@pytest.mark.timeout(120)
def test_a_save_that_is_under_way_when_the_folder_is_lost_is_not_completed(shards: Path, tmp_path: Path) -> None:
    from toolkit.training.checkpointing.checkpoint import Checkpoints

    mine = lease.take(tmp_path)
    checkpoints = Checkpoints(tmp_path, config.Config(), [], 0, 1, mine.check)
    taken_by_another_host(tmp_path)
    with pytest.raises(UserError, match="taken over"):
        checkpoints._complete(None, [])  # type: ignore[arg-type]


@pytest.fixture
def other() -> Any:
    """A living process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def held_by(process: subprocess.Popen[bytes], run: Path) -> dict[str, Any]:
    holder = {
        "host": platform.node(),
        "pid": process.pid,
        "began": lease._began(process.pid),
        "token": "theirs",
        "time": "2000-01-01 00:00:00",
    }
    (run / "lease.json").write_text(json.dumps(holder))
    return holder


def test_a_running_process_of_this_machine_keeps_its_folder(other: Any, tmp_path: Path) -> None:
    held_by(other, tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {other.pid} of this machine since 2000-01-01 00:00:00"):
        lease.take(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "theirs"


def test_a_start_that_is_refused_leaves_the_folder_as_it_was(other: Any, tmp_path: Path) -> None:
    run = config.Config(run=str(tmp_path))
    prepare_run(run)
    save_configuration(run)
    held_by(other, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run.data.workers = 7
    with pytest.raises(UserError, match="is in use"):
        prepare_run(run)
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    taken_by_another_host(tmp_path)
    before[tmp_path / "lease.json"] = (tmp_path / "lease.json").read_bytes()
    run.training.resume = "never"
    with pytest.raises(UserError, match="holds checkpoints"):  # nor does it take the lease of a run elsewhere
        prepare_run(run)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel does not tell when a process began")
def test_a_killed_process_and_another_with_its_pid_do_not(other: Any, tmp_path: Path) -> None:
    holder = held_by(other, tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps(holder | {"began": holder["began"] - 1}))
    lease.take(tmp_path).check()  # its number was given to another process
    held_by(other, tmp_path)
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    lease.take(tmp_path).check()


def test_a_released_lease_is_free_and_its_former_owner_cannot_write(other: Any, tmp_path: Path) -> None:
    ghost = lease.take(tmp_path)
    later = lease.take(tmp_path)
    later.check()
    ghost.release()  # not its own any more
    assert not json.loads((tmp_path / "lease.json").read_text()).get("released")
    later.release()
    with pytest.raises(UserError, match="taken over"):
        ghost.check()
    owner = held_by(other, tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps(owner | {"released": True}))
    lease.take(tmp_path).check()


def test_a_job_that_begins_again_takes_over_from_its_former_ranks(other: Any, tmp_path: Path, monkeypatch: Any) -> None:
    owner = held_by(other, tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for theirs in (
        {"job": "6", "restart": "0"},
        {"job": "7", "restart": "1"},
    ):  # another job; a second training of this
        (tmp_path / "lease.json").write_text(json.dumps(owner | theirs))
        with pytest.raises(UserError, match="is in use"):
            lease.take(tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps(owner | {"job": "7", "restart": "0"}))
    lease.take(tmp_path).check()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_lease_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "lease.json").write_text(text)
    lease.take(tmp_path).check()


def test_a_lease_that_was_removed_is_lost(tmp_path: Path) -> None:
    mine = lease.take(tmp_path)
    (tmp_path / "lease.json").unlink()
    with pytest.raises(UserError, match="removal of its lease"):
        mine.check()
