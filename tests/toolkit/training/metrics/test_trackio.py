"""trackio as the tracker: local, one run whatever the restarts were, and never in the way of a training."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.toolkit.training.metrics import test_wandb_run
from tests.toolkit.training.metrics.test_wandb_run import finished, wait_until_open, write
from toolkit.config.schema import Wandb
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.metrics import wandb_run
from toolkit.training.metrics.wandb_run import WandbRun, check_wandb, open_wandb

environment, logged = test_wandb_run.environment, test_wandb_run.logged
pytestmark = pytest.mark.timeout(120)
SETTINGS = Wandb(tracker="trackio", project="mine")
needs_trackio = pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")


def opened(run: Path) -> WandbRun:
    record = open_wandb(SETTINGS, run, Progress())
    assert record
    return record


def stored(run: Path) -> list[tuple[int, float]]:
    """Step and loss of what trackio has of the run, read in another process, as its folder is set once."""
    name = f"run-{(run / 'wandb_id').read_text()}"
    code = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as storage; "
    code += "print(json.dumps(storage.get_logs(*sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, "mine", name], capture_output=True, text=True, check=True)
    return [(row["step"], row["loss"]) for row in json.loads(done.stdout.splitlines()[-1])]


@needs_trackio
def test_restarts_are_one_run(logged, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for steps in ((1, 2), (3, 4)):
        record = opened(tmp_path / "run")
        write(record, *steps)
        wait_until_open(record)
        finished(record, 20.0)
    assert stored(tmp_path / "run") == [(step, 1.0 / (1 + step)) for step in (1, 2, 3, 4)]
    assert logged == []
    assert not (tmp_path / "run/wandb").exists()


@needs_trackio
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs(logged, tmp_path, monkeypatch, number) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(wandb_run, "_LOG", 2.0)
    record = opened(tmp_path / "run")
    write(record, 1)
    wait_until_open(record)
    assert record._process
    os.kill(record._process._child.pid, number)
    write(record, 2, 3)
    finished(record, 6.0)
    (line,) = logged
    assert line.startswith("trackio is off: ")
    assert line.endswith("training goes on, and log.jsonl has all that is logged")


def test_without_the_package(logged, tmp_path, monkeypatch) -> None:
    """A new run is refused; one that goes on is not ended by it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio, which is missing: pip install 'speech-image-toolkit\[trackio\]'"):
        check_wandb(SETTINGS, tmp_path / "run")
    check_wandb(Wandb(tracker="trackio", mode="disabled"), tmp_path / "run")
    assert open_wandb(Wandb(tracker="trackio", mode="disabled"), tmp_path / "run", Progress()) is None


def test_wandbs_keys_and_modes_do_not_matter(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert wandb_run.choose_mode(Wandb(tracker="trackio", mode="online")) == ("local", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.choose_mode(SETTINGS) == ("disabled", "")
