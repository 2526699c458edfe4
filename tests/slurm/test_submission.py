"""Submissions to a real SLURM: the job is that of the dry run, refusals, and a sweep."""

import json
import re
import sys
from pathlib import Path

import pytest

from launch.record import newest
from launch.snapshot import ROOT
from tests.slurm.cluster import Cluster, wait_for

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]
SUBMIT = (sys.executable, ROOT / "launch" / "submit.py")
REQUESTED = ("--nodes", "4", "--ranks-per-node", "2", "--cpus-per-rank", "1", "--partition", "low", "--time", "1:30:00",
         "--name", "requested", "--training.batch_size", "8")  # fmt: skip


def test_the_job_is_what_the_dry_run_showed(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    profile = tmp_path / "held.yaml"
    profile.write_text("sbatch: {hold: true}\n")
    command = (*SUBMIT, "--config", config, "--run", tmp_path / "run", "--profile", profile, *REQUESTED)
    shown = cluster.run(*command, "--dry-run").stdout
    assert re.search(r"ok +sbatch --test-only: Job \d+ to start at", shown), shown
    assert "FAILED" not in shown
    assert not (tmp_path / "run").exists()
    cluster.run(*command, "--no-follow")
    last = newest(tmp_path / "run")
    assert last is not None
    job = last.submission.job
    try:
        output = cluster.run("scontrol", "--oneliner", "show", "job", job).stdout
        job_of = dict(re.findall(r"(\S+?)=(\S*)", output))
        expected = {
            "JobState": "PENDING", "JobName": "requested", "Partition": "low", "NumNodes": "4-4", "NumTasks": "8",
            "CPUs/Task": "1", "TimeLimit": "01:30:00", "Requeue": "1", "WorkDir": str(ROOT),
            "StdOut": f"{last.folder}/{job}_0_log.out",
        }  # fmt: skip
        assert {key: job_of.get(key) for key in expected} == expected
        written = cluster.run("scontrol", "write", "batch_script", job, "-").stdout
    finally:
        cluster.run("scancel", job)
    script = shown[shown.index("#!/bin/bash") : shown.index("\n\nchecks:")]
    assert written.strip() == script.replace("/logs/TIME", f"/logs/{last.folder.name}").strip()


def test_refusals_of_slurm_are_one_line(quiet: Cluster, config: Path, tmp_path: Path) -> None:
    command = (*SUBMIT, "--config", config, "--run", tmp_path / "run", "--ranks-per-node", "1", "--name", "refused")
    for wrong, message in (
        (("--partition", "nosuch"), "--partition nosuch: SLURM has no such partition; there are high, low"),
        (("--nodes", "50", "--training.batch_size", "50"), "allows at most 8 nodes a job"),
        (("--account", "nobody"), "--account nobody: SLURM has no such"),
        (("--cpus-per-rank", "400"), "SLURM would not run the job: allocation failure: Requested node configuration"),
        (("--gpus-per-node", "9"), "SLURM would not run the job: allocation failure: Requested node configuration"),
        (
            ("--gpus-per-node", "h100:1"),
            "SLURM would not run the job: allocation failure: Requested node configuration",
        ),
        (("--constraint", "nosuch"), "Invalid feature specification"),
    ):
        done = quiet.run(*command, *wrong, "--no-follow", expect=2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    shown = quiet.run(*command, "--cpus-per-rank", "400", "--dry-run", expect=2).stdout
    assert re.search(r"FAILED +sbatch --test-only: SLURM would not run the job", shown), shown
    assert not quiet.run("squeue", "--noheader", "--name", "refused").stdout


def test_a_sweep_of_six_two_at_a_time_of_which_one_fails(quiet: Cluster, config: Path, tmp_path: Path) -> None:
    """In a container, too: a command that sets a variable before it runs its command, as no runtime is at hand."""
    profile = tmp_path / "contained.yaml"
    profile.write_text(f"container: env CONTAINED=yes\npython: {sys.executable}\nsetup: [export FROM_SETUP=yes]\n")
    grid = "{list: [{name: broken, model.speech.config: {no_such_value: 1}}, {name: a}, {name: b, seed: 1}, {name: c, "
    grid += "seed: 2}, {name: d, seed: 3}, {name: e, seed: 4}], base: {training.steps: 2, evaluation.every: 0}}"
    (tmp_path / "grid.yaml").write_text(grid)
    command = (
        *SUBMIT,
        "--config",
        config,
        "--run",
        tmp_path / "grid",
        "--grid",
        tmp_path / "grid.yaml",
        "--array",
        "2",
    )
    more = ("--ranks-per-node", "1", "--cpus-per-rank", "1", "--profile", profile, "--no-follow", "--cluster", "slurm")
    quiet.run(*command, *more)
    last = newest(tmp_path / "grid")
    assert last is not None
    job, most = last.submission.job, 0

    def ended() -> bool:
        nonlocal most
        states = quiet.run("squeue", "--noheader", "--array", "--jobs", job, "--format=%T", expect=None).stdout.split()
        most = max(most, states.count("RUNNING"))
        return not states

    wait_for(ended, lambda: quiet.run("squeue").stdout)
    assert most == 2
    rows = json.loads(quiet.runs("table", tmp_path / "grid", "--json").stdout)
    table = quiet.runs("table", tmp_path / "grid").stdout
    assert len(rows) == 6, table
    assert sum((tmp_path / "grid" / name / "recall.json").is_file() for name in "abcde") == 5, table
    assert "no_such_value" in table
    codes = {name: json.loads(line) for name, line in _last_lines(last.submission.members).items()}
    assert {name: code["code"] for name, code in codes.items()} == {"broken": 2, **dict.fromkeys("abcde", 0)}
    assert not any(code["requeued"] for code in codes.values())


def _last_lines(members: dict[str, str]) -> dict[str, str]:
    """The last line of each member's record of its attempts, by its name."""
    folders = [Path(folder) for folder in members.values()]
    return {each.parent.parent.name: (each / "attempts.jsonl").read_text().splitlines()[-1] for each in folders}
