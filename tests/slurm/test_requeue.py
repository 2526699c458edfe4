"""Trainings on a real SLURM with failures: each is restarted, with the losses of an undisturbed run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.record import restarts
from tests.slurm.cluster import PATIENCE, ROOT, Cluster, Training, wait_for

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]

Losses = Callable[[], dict[int, float]]

STEPS = 240
EACH_STEP = (
    "--training.steps", STEPS, "--training.batch_size", 8, "--training.log_every", 1, "--training.save_every", 10,
    "--evaluation.every", 0, "--final.split", "",
)  # fmt: skip
TWO_NODES = ("--nodes", 2, "--ranks-per-node", 1, "--cpus-per-rank", 2)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Losses]:
    """Losses by step of a run on this machine that nothing happens to; it runs beside the first test."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks = ("--cluster", "local", "--ranks-per-node", 2)
    command = [sys.executable, ROOT / "launch" / "submit.py", "--config", config, "--run", run, *ranks, *EACH_STEP]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:

        def losses() -> dict[int, float]:
            assert process.wait(PATIENCE) == 0
            records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
            return {each["step"]: each["loss"] for each in records if "loss" in each}

        yield losses
        process.terminate()


def check_complete(training: Training, undisturbed: dict[int, float], causes: list[str]) -> None:
    """The run is complete, began again for these causes, and every step has the loss that it should have."""
    assert training.wait_end() == "COMPLETED", training.report()
    attempts = training.attempts()
    assert [each["restart"] for each in attempts] == list(range(len(causes) + 1))
    assert [each["cause"] for each in attempts] == [*causes, "done"], training.report()
    assert [each["requeued"] for each in attempts] == [*(True for _ in causes), False]
    taken = training.losses()
    assert sorted(taken) == sorted(undisturbed) == list(range(1, STEPS + 1))
    other = {step: losses for step, losses in taken.items() if set(losses) != {undisturbed[step]}}
    assert not other, f"losses differ from an undisturbed run's: {list(other.items())[:3]}"
    assert restarts(training.run) == len(causes)


def test_one_run_with_every_failure(cluster: Cluster, config, undisturbed, tmp_path) -> None:
    limit = ("--time", 60, "--launch.signal", 60)
    training = cluster.submit(config, tmp_path / "run", *TWO_NODES, *EACH_STEP, *limit, "--partition", "low")
    causes: list[str] = []

    def begins_again(cause: str) -> None:
        causes.append(cause)
        assert training.wait_restart(len(causes))["cause"] == cause, training.report()

    training.wait_step()
    # A job of the higher partition takes both nodes.
    nodes = ",".join(training.hosts())
    evicting = ("--partition=high", f"--nodelist={nodes}", "--exclusive", "--time=1")
    cluster.run("sbatch", *evicting, "--wrap=true", "--output=/dev/null")
    begins_again("saved")

    training.wait_step()
    cluster.run("scontrol", "requeue", training.job)
    begins_again("slurm")

    # The controller crashes and comes back: the ranks notice nothing. It crashes again, and a rank dies meanwhile:
    # the requeue has to wait for it.
    training.wait_step()
    cluster.controller("kill")
    training.wait_step()
    cluster.controller("start")
    training.wait_step()
    assert len(training.attempts()) == len(causes) + 1
    cluster.controller("kill")
    training.signal("KILL", 1, training.hosts()[1])
    time.sleep(8)
    cluster.controller("start")
    begins_again("killed")

    # A power cut of the node whose batch script could have requeued the job.
    training.wait_step()
    lost = training.hosts()[0]
    cluster.node("off", lost)
    begins_again("slurm")
    cluster.node("on", lost)
    assert lost not in training.hosts()

    # The same cable pulled: the ranks there run on without the others.
    training.wait_step()
    cut = training.hosts()[1]
    cluster.node("cut", cut)
    begins_again("slurm")
    cluster.node("mend", cut)

    # The time limit, twice: the ranks stand still in a long step until SLURM's signals reach them.
    for _ in range(2):
        training.wait_step()
        for rank, host in enumerate(training.hosts()):
            training.signal("STOP", rank, host)
        minutes = int(time.time() - training.attempts()[-1]["began"]) // 60 + 2
        cluster.run("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes}")
        begins_again("saved")
        cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=60")

    check_complete(training, undisturbed(), causes)


def test_ranks_of_an_earlier_attempt_cannot_write(quiet: Cluster, config, undisturbed, tmp_path) -> None:
    one_node = ("--nodes", 1, "--ranks-per-node", 2, "--cpus-per-rank", 1)
    training = quiet.submit(config, tmp_path / "run", *one_node, *EACH_STEP, "--time", 60, "--partition", "low")
    training.wait_step(12)
    [host] = training.hosts()
    stale = [training.pid(rank) for rank in range(2)]
    quiet.node("kill-slurmd", host)
    for pid in stale:  # they stand still while the job begins again elsewhere
        quiet.node("run", host, "kill", "-STOP", pid)

    assert training.wait_restart(1)["cause"] == "slurm"
    assert host not in training.hosts()
    training.wait_step()
    for pid in stale:
        quiet.node("run", host, "kill", "-CONT", pid)

    def gone() -> bool:
        return not quiet.node("run", host, "pgrep", "-f", "submitit", expect=None).strip()

    wait_for(gone, training.report)
    quiet.node("start-slurmd", host)
    check_complete(training, undisturbed(), ["slurm"])
    assert all(json.loads((training.logs / f"rank{rank}.json").read_text())["restart"] == 1 for rank in range(2))
