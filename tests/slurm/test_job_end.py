"""Jobs on a real SLURM that end: complete, cancelled, failed; none of them starts again."""

import json
import time

import pytest

from launch.job import Status
from tests.slurm.cluster import Cluster, wait_for

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]


def test_four_nodes_train_and_evaluate(quiet: Cluster, config, tmp_path) -> None:
    arguments = ("--nodes", 4, "--ranks-per-node", 2, "--cpus-per-rank", 1, "--training.batch_size", 16)
    training = quiet.submit(config, tmp_path / "run", *arguments, "--training.steps", 4, "--time", 20)
    assert training.wait_end() == "COMPLETED", training.report()
    statuses = [json.loads((training.logs / f"rank{rank}.json").read_text()) for rank in range(8)]
    assert [each["exit"] for each in statuses] == 8 * [0]
    hosts = training.hosts()
    assert [each["host"] for each in statuses] == [host for host in hosts for _ in range(2)]
    assert len(set(hosts)) == 4
    assert json.loads((training.run / "recall.json").read_text())["pictures"] == 20
    assert "8 ranks" in (training.logs / f"{training.job}_0_log.out").read_text()


def test_a_cancelled_job_saves_and_is_not_restarted(quiet: Cluster, config, tmp_path) -> None:
    arguments = ("--nodes", 1, "--ranks-per-node", 1, "--cpus-per-rank", 2, "--training.log_every", 1)
    long = ("--training.steps", 5000, "--training.save_every", 5000, "--evaluation.every", 0, "--time", 20)
    training = quiet.submit(config, tmp_path / "run", *arguments, *long)
    step = training.wait_step()
    quiet.run("scancel", training.job)
    assert training.wait_end() == "CANCELLED"
    [ended] = training.attempts()
    assert (ended["cause"], ended["requeued"]) == ("cancelled", False)
    assert step <= ended["step"] < 5000
    time.sleep(8)  # longer than a requeued job waits
    assert [each["restart"] for each in training.attempts()] == [0]


def test_ranks_that_hang_at_the_time_limit_are_restarted(quiet: Cluster, config, tmp_path) -> None:
    """Signals do not reach them. The script that requeues the job waits for them, and has to outlive them."""
    arguments = ("--nodes", 1, "--ranks-per-node", 2, "--cpus-per-rank", 1, "--training.log_every", 1)
    long = ("--training.steps", 5000, "--training.save_every", 10, "--evaluation.every", 0, "--time", 20)
    training = quiet.submit(config, tmp_path / "run", *arguments, *long)
    training.wait_step(12)
    [host] = training.hosts()
    with training.frozen(0, host), training.frozen(1, host):
        quiet.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=1")
        ended = training.wait_restart(1)
    assert (ended["cause"], ended["requeued"], ended["code"]) == ("killed", True, 137)
    quiet.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=20")
    training.wait_step()
    quiet.run("scancel", training.job)
    assert training.wait_end() == "CANCELLED"


def test_an_error_ends_the_job(quiet: Cluster, config, tmp_path) -> None:
    """A rank cannot write the run folder's log: an exception, and no sense in trying again."""
    run = tmp_path / "run"
    (run / "log.jsonl").mkdir(parents=True)
    training = quiet.submit(config, run, "--nodes", 2, "--ranks-per-node", 1, "--cpus-per-rank", 2, "--time", 20)
    assert training.wait_end() == "FAILED", training.report()
    [ended] = training.attempts()
    assert (ended["cause"], ended["requeued"]) == ("failed", False), training.report()
    assert 1 in [json.loads((training.logs / f"rank{rank}.json").read_text())["exit"] for rank in range(2)]


def test_ranks_that_die_at_once_are_not_restarted_forever(quiet: Cluster, config, tmp_path) -> None:
    arguments = ("--nodes", 1, "--ranks-per-node", 1, "--cpus-per-rank", 2, "--training.steps", 5000, "--time", 20)
    training = quiet.submit(
        config, tmp_path / "run", *arguments, "--evaluation.every", 0, "--training.save_every", 5000
    )
    for restart in range(4):
        training.wait_restart(restart)
        wait_for(lambda: (Status(training.logs, 0).read() or {}).get("restart") == restart, training.report)  # noqa: B023
        training.signal("KILL", 0, training.hosts()[0])
    assert training.wait_end() == "FAILED"
    assert [each["cause"] for each in training.attempts()] == 4 * ["killed"]
    assert [each["requeued"] for each in training.attempts()] == [True, True, True, False]
