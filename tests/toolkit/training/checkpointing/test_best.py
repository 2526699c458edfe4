"""The best model of a run: `export/best` agrees with the checkpoints after any interruption."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config

SCORES = {1: 20.0, 2: 50.0, 3: 30.0, 4: 10.0}


def train(rank: int, world_size: int, run: config.Config, killed: bool) -> None:
    """Train with given scores on dev; killed: when the export of step 2 is written and has not taken its name."""
    from toolkit.training import trainer
    from toolkit.training.checkpointing import export

    real, Exports = trainer.retrieve, export.Exports

    def retrieve(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        result.report["coarse"]["mean_R@1"] = SCORES[evaluated.pop(0)]
        return result

    write = Exports._write

    def slowly(self: Any, model: Any, state: Any, name: str, progress: dict[str, Any]) -> None:
        if killed and name == "best" and progress["step"] == 2:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline and not (self.run / "checkpoints/step-00000002").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, model, state, name, progress)

    begun = len(list((Path(run.run) / "checkpoints").glob("step-*")))
    evaluated = list(range(begun + 1, 5))
    trainer.retrieve, Exports._write = retrieve, slowly
    test_trainer.train(rank, world_size, run)


@pytest.mark.timeout(200)
def test_a_kill_before_the_best_is_on_the_disk_does_not_lose_it(shards: Path, tmp_path: Path) -> None:
    run = test_trainer.settings(shards, tmp_path / "run", save_every=1, keep_checkpoints=9)
    run.evaluation.every = 1
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(train, 1, run, True, timeout=90)
    run_ranks(train, 1, run, False, timeout=90)
    assert exported(tmp_path / "run") == 2 == marked(tmp_path / "run")["best_step"]
    assert marked(tmp_path / "run")["best"] == SCORES[2]

    # Between its two renames, or taken away by somebody: the next evaluation gives one.
    shutil.rmtree(tmp_path / "run/export/best")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-0000000{step}")
    run_ranks(train, 1, run, False, timeout=90)
    assert exported(tmp_path / "run") == 3 == marked(tmp_path / "run")["best_step"]


def test_a_checkpoint_waits_for_an_export_that_the_training_waits_for_too(tmp_path: Path) -> None:
    from toolkit.training.checkpointing.export import Exports

    exports, under_way = Exports.__new__(Exports), Future()
    exports.run, exports._pending = tmp_path, {"best": under_way}
    training = threading.Thread(target=exports.best, daemon=True)  # as an evaluation begins
    training.start()
    time.sleep(0.1)
    checkpoint = threading.Thread(target=exports.wait_for, args=("best",), daemon=True)
    checkpoint.start()
    checkpoint.join(0.2)
    assert checkpoint.is_alive(), "it would be complete before the best model is on the disk"
    under_way.set_result(None)
    for thread in (training, checkpoint):
        thread.join(10)
        assert not thread.is_alive()
    assert not exports._pending


def exported(run: Path) -> int:
    return int(json.loads((run / "export/best/progress.json").read_text())["step"])


def marked(run: Path) -> dict[str, Any]:
    """The marker of the last checkpoint."""
    result: dict[str, Any] = json.loads((run / "checkpoints/step-00000004/progress.json").read_text())
    return result
