"""The replay of a log: one wandb run with each step once, whatever restarts a training had."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import runs
from shards.errors import UserError
from shards.files import read_records
from tests.distributed import run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.log_lines import collect_lines
from tests.toolkit.training.metrics import test_wandb_run
from tests.toolkit.training.metrics.wandb_file import configuration, history, summary
from tests.toolkit.training.metrics.wandb_server import WandbServer
from toolkit.training.metrics.wandb_replay import read_history, replay

environment, server = test_wandb_run.environment, test_wandb_run.server
ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.timeout(120)
DEV = {"coarse": {"mean_R@1": 12.5}}


def write_log(run: Path, *starts: tuple[int, range]) -> None:
    """A log of some starts: the step that each began at, and the steps that it logged."""
    lines = []
    for attempt, (at, steps) in enumerate(starts):
        lines.append({"time": 1.0, "event": "began", "at": at, "ranks": 2})
        for step in steps:
            lines.append({"time": 1000.0 * attempt + step, "step": step, "loss": 1 / step, "attempt": attempt})
            if step % 20 == 0:
                lines.append({"time": 1000.0 * attempt + step + 1, "step": step, "dev": DEV})
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
    (run / "config.yaml").write_text("seed: 3\nwandb:\n  project: mine\n")
    (run / "environment.json").write_text('{"host": "node7"}')
    (run / "wandb_id").write_text("abc\n")


# Killed after step 30 with a checkpoint at 20, and after step 60 with one at 50.
RESTARTED = (0, range(10, 31, 10)), (20, range(30, 61, 10)), (50, range(60, 81, 10))
ATTEMPTS = {10: 0, 20: 0, 30: 1, 40: 1, 50: 1, 60: 2, 70: 2, 80: 2}


def wandb_file(folder: Path) -> Path:
    (path,) = folder.glob("run-*.wandb")
    return path


def test_each_step_occurs_once_and_is_that_of_the_last_attempt(tmp_path) -> None:
    run = tmp_path / "run"
    write_log(run, *RESTARTED)
    (run / "recall.json").write_text(json.dumps({"split": "test", "coarse": {"mean_R@1": 57.2}}))
    done = replay(run)
    assert (done.id, done.mode, done.project) == ("abc-replay", "offline", "mine")
    assert (done.history.starts, done.history.replaced) == (3, 2)
    assert done.folder
    path = wandb_file(done.folder)
    rows = history(path)
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == list(ATTEMPTS)
    for row in rows:
        step, attempt = row["step"], ATTEMPTS[row["step"]]
        assert (row["loss"], row["attempt"]) == (1 / step, attempt)
        assert row["_timestamp"] == 1000 * attempt + step + (step % 20 == 0)
        assert row.get("dev/coarse/mean_R@1") == (12.5 if step % 20 == 0 else None)
    assert summary(path)["final/coarse/mean_R@1"] == 57.2
    stored = configuration(path)
    assert (stored["seed"], stored["environment"], stored["starts"]) == (3, {"host": "node7"}, 3)
    assert sorted(path.name for path in (run / "wandb").iterdir()) == ["replay"]


def test_a_further_replay_replaces_the_last(tmp_path, server) -> None:
    run = tmp_path / "run"
    for starts in (RESTARTED[:2], RESTARTED):
        write_log(run, *starts)
        done = replay(run, "offline")
        command = [str(Path(sys.executable).with_name("wandb")), "sync", "--yes", str(done.folder)]
        synced = subprocess.run(command, cwd=run, capture_output=True, text=True)
        assert synced.returncode == 0, synced.stderr
    assert len(list((run / "wandb/replay/wandb").glob("offline-run-*"))) == 1
    assert list(server.history) == ["abc-replay"]
    assert server.steps("abc-replay") == list(ATTEMPTS)


def test_online_a_further_replay_continues(tmp_path, server) -> None:
    run = tmp_path / "run"
    write_log(run, (0, range(10, 51, 10)))
    for _ in range(2):
        assert replay(run).mode == "online"
        assert server.steps("abc-replay") == [10, 20, 30, 40, 50]
    write_log(run, (0, range(10, 51, 10)), (50, range(60, 81, 10)))
    replay(run)
    assert server.steps("abc-replay") == list(ATTEMPTS)
    assert list((run / "wandb").iterdir()) == []


def test_a_dry_run_and_the_command(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    write_log(run, *RESTARTED)
    before = sorted(run.rglob("*"))
    runs.main(["wandb", str(run), "--dry-run"])
    what = f"{run}: 8 steps from 10 to 80, of 3 starts (2 steps were done again after a restart, and count once)"
    assert capsys.readouterr().out == f"{what}: would be run abc-replay of project mine, offline\n"
    assert sorted(run.rglob("*")) == before
    runs.main(["wandb", str(run)])
    written, upload = capsys.readouterr().out.splitlines()
    assert written == f"{what}: is now run abc-replay of project mine, offline"
    assert len(history(wandb_file(Path(upload.removeprefix("to upload it: wandb sync "))))) == 8


def test_mistakes_are_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read: No such file"):
        replay(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "began", "at": 0}\n')
    with pytest.raises(UserError, match="has no step yet"):
        replay(tmp_path)
    write_log(tmp_path / "run", *RESTARTED)
    with pytest.raises(UserError, match=r"there is no key: .*; or give --mode offline"):
        replay(tmp_path / "run", "online")
    server = WandbServer("fail")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with pytest.raises(UserError, match="--mode offline needs no server"):
        replay(tmp_path / "run", "online")
    server.close()
    (tmp_path / "run/wandb").rmdir()
    (tmp_path / "run/wandb").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        replay(tmp_path / "run", "offline")


def test_a_run_that_was_stopped_and_resumed_twice(shards, tmp_path) -> None:
    """The training names the command that makes one run of its parts."""
    run, attempts = tmp_path / "run", []
    for stop in (2, 2, None):
        attempts.append(test_trainer.settings(shards, run, batch_size=4, steps=6, log_every=1, stop_after=stop))
        attempts[-1].wandb.mode = "offline"
    (lines,) = run_ranks(_train, 1, *attempts, timeout=100)
    (line,) = (line for line in lines if line.startswith("wandb: 3 parts were written offline"))
    assert line.endswith(f"`python launch/runs.py wandb {run}` makes one run of them")
    done = replay(run)
    assert done.folder
    rows = history(wandb_file(done.folder))
    logged = [record for record in read_records(run / "log.jsonl") if "loss" in record]
    assert [row["step"] for row in rows] == [record["step"] for record in logged] == list(range(1, 7))
    assert [row["loss"] for row in rows] == [record["loss"] for record in logged]
    assert done.history.starts == 3


def _train(rank: int, world_size: int, *attempts) -> list[str]:
    lines = collect_lines()
    test_trainer.train(rank, world_size, *attempts)
    return lines


def test_history_of_a_log(tmp_path) -> None:
    write_log(tmp_path, *RESTARTED)
    assert [step for step, _ in read_history(tmp_path / "log.jsonl").rows] == list(ATTEMPTS)
