"""Sweeps, sharding, and the commands of launch/runs.py on a real SLURM."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards.manifest import load
from tests.slurm.cluster import ROOT, Cluster, Training, wait_for
from tests.test_whole_way import write_table

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

ONE_RANK = ("--nodes", 1, "--ranks-per-node", 1, "--cpus-per-rank", 1, "--time", 20)


def state_of(cluster: Cluster, run: Path) -> dict:
    [values] = json.loads(cluster.runs("status", run, "--json").stdout)
    return values


def test_a_sweep_is_followed_to_its_table(quiet: Cluster, config, tmp_path) -> None:
    """The second member's learning rate passes every check and makes its numbers infinite: it fails where it runs."""
    grid = tmp_path / "grid.yaml"
    base = "training.steps: 4, training.warmup_steps: 0, training.max_skipped_in_a_row: 2, evaluation.every: 0"
    grid.write_text(f"base: {{{base}}}\nlist: [{{name: finite, seed: 1}}, {{name: infinite, training.lr: 1.0e+30}}]\n")
    folder = tmp_path / "sweep"
    command = [sys.executable, ROOT / "launch" / "submit.py", "--config", config, "--run", folder, "--grid", grid]
    quiet.run(*command, "--cluster", "slurm", "--no-follow", "--array", 1, *ONE_RANK)
    output = quiet.runs("follow", folder, expect=1).stdout
    rows = json.loads(quiet.runs("table", folder, "--json").stdout)
    assert [(row["member"], row["state"], row["split"]) for row in rows] == [
        ("finite", "done", "test"), ("infinite", "failed", None),
    ], output  # fmt: skip
    assert output.index("\nfinite: done\n") < output.index("\ninfinite: running\n"), "one at a time"
    assert "2 members: 1 done, 1 failed" in output
    assert "loss or gradient not finite" in output


def test_status_follow_cancel_and_resume(quiet: Cluster, config, tmp_path) -> None:
    run = tmp_path / "run"
    long = ("--training.steps", 3000, "--training.log_every", 1, "--evaluation.every", 0, "--final.split", "")
    training = quiet.submit(config, run, *ONE_RANK, *long)
    step = training.wait_step()
    values = state_of(quiet, run)
    assert (values["state"], values["job"], values["steps"], values["restarts"]) == ("running", training.job, 3000, 0)
    assert values["step"] >= step
    assert values["seconds_left"] > 0
    refused = quiet.runs("resume", run, expect=2)
    assert f"job {training.job} is running" in refused.stderr

    followed: list[subprocess.CompletedProcess[str]] = []
    follower = threading.Thread(target=lambda: followed.append(quiet.runs("follow", run, expect=None)))
    follower.start()
    quiet.run("scontrol", "requeue", training.job)
    training.wait_restart(1)
    training.wait_step()
    assert state_of(quiet, run)["restarts"] == 1
    quiet.runs("cancel", run)
    follower.join(120)
    [output] = followed
    assert f"job {training.job}: restart 1" in output.stdout
    assert output.returncode == 75, output.stdout + output.stderr
    assert "stopped by a signal, and saved" in output.stderr
    assert training.wait_end().startswith("CANCELLED")
    values = state_of(quiet, run)
    assert values["state"] == "cancelled"

    # The same from the folder alone.
    alone = subprocess.run(
        [sys.executable, ROOT / "launch" / "runs.py", "status", run, "--json"],
        capture_output=True, text=True, env={"PATH": "/nowhere"},
    )  # fmt: skip
    assert json.loads(alone.stdout)[0]["state"] == "cancelled"

    quiet.runs("resume", run)
    [again] = [Training(quiet, run, each, json.loads((each / "submission.json").read_text())["job"])
               for each in (run / "logs").iterdir() if each != training.logs]  # fmt: skip
    assert again.job != training.job
    assert again.wait_step(2) > values["step"]
    assert state_of(quiet, run)["restarts"] == 2
    quiet.runs("cancel", run)
    again.wait_end()


def test_an_error_is_shown_with_its_traceback(quiet: Cluster, config, tmp_path) -> None:
    run = tmp_path / "run"
    (run / "log.jsonl").mkdir(parents=True)  # an exception on the node
    training = quiet.submit(config, run, *ONE_RANK)
    output = quiet.runs("follow", run, expect=1)
    assert "Traceback (most recent call last):" in output.stderr
    assert "IsADirectoryError" in output.stderr
    assert "error: rank 0 failed with exit code 1; the complete log is" in output.stderr
    training.wait_end()
    shown = quiet.runs("status", run).stdout
    assert "rank 0 failed with exit code 1" in shown
    assert "    IsADirectoryError" in shown


def test_a_corpus_sharded_by_an_array_and_merged(quiet: Cluster, tmp_path) -> None:
    table = write_table(tmp_path / "corpus", pictures=20)
    out = tmp_path / "shards"
    words = ["table", "--root", table, "--out", out, "--jobs", 1, "--samples-per-shard", 2, "--parts", 4]
    output = quiet.run(sys.executable, ROOT / "launch" / "shard.py", *words, "--time", 5, "--array", 3).stdout
    assert "4 of 4 parts written" in output
    assert "nothing dropped" in output
    assert sum(shard.samples for shard in load(out).shards) == 20
    again = quiet.run(sys.executable, ROOT / "launch" / "shard.py", *words).stdout
    assert "finished already" in again

    # A part that fails: the merge never runs, and the part is named.
    table.write_text(table.read_text().replace("\n3.png", "\nnoise.png"))
    (table.parent / "noise.png").write_bytes(b"no picture")
    words[words.index(out)] = tmp_path / "bad"
    failed = quiet.run(sys.executable, ROOT / "launch" / "shard.py", *words, "--time", 5, expect=2)
    assert "3 of 4 parts written, failed: " in failed.stdout
    assert "noise.png" in failed.stderr
    wait_for(lambda: not quiet.run("squeue", "--noheader").stdout, lambda: quiet.run("squeue").stdout)
    assert not (tmp_path / "bad" / "manifest.json").exists()
