"""Ranks on a real SLURM before they train: their environment, and jobs of which a rank never begins."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]
TWO_RANKS = ("--nodes", 2, "--ranks-per-node", 1, "--cpus-per-rank", 1, "--time", 20)
SHORT = ("--training.steps", 2, "--evaluation.every", 0, "--final.split", "")


def python_of_ranks(folder: Path, text: str) -> Path:
    """A profile whose ranks run a script of bash in place of their python, "$@" being its arguments."""
    script = folder / "python.sh"
    script.write_text(f"#!/bin/bash\npython={shlex.quote(sys.executable)}\n{text}\n")
    script.chmod(0o755)
    profile = folder / "profile.yaml"
    profile.write_text(f"python: {script}\n")
    return profile


def test_ranks_have_their_environment_where_sbatch_exports_none(quiet: Cluster, config, tmp_path, monkeypatch) -> None:
    """By the profile, an alias or a site's variable: srun inherits it. Variables of an earlier step are set, too."""
    profile = python_of_ranks(tmp_path, '[ "$FROM_PROFILE" = x ] || exit 9\nexec "$python" "$@"')
    profile.write_text(profile.read_text() + "env: {FROM_PROFILE: x}\nsbatch: {export: NONE}\n")
    for name, value in {"SBATCH_EXPORT": "NONE", "SLURM_LABELIO": "1", "SLURM_CPU_BIND": "mask_cpu:0x8"}.items():
        monkeypatch.setenv(name, value)
    training = quiet.submit(config, tmp_path / "run", *TWO_RANKS, *SHORT, "--profile", profile)
    assert training.wait_end() == "COMPLETED", training.report()
    assert [each["cause"] for each in training.attempts()] == ["done"]
    assert not (training.logs / f"{training.job}_0_log.out").read_text().startswith("0: ")


def test_a_rank_without_the_packages_ends_the_job_and_is_reported(quiet: Cluster, config, tmp_path) -> None:
    """The other has not begun when srun ends it, and its signal is srun's exit code."""
    profile = python_of_ranks(tmp_path, '[ $SLURM_PROCID = 0 ] && exec sleep 60\nexec "$python" -S "$@"')
    run = tmp_path / "run"
    training = quiet.submit(config, run, *TWO_RANKS, *SHORT, "--profile", profile)
    why = "rank 1 ended with exit code 1 before it began to train: ModuleNotFoundError: No module named 'submitit'"
    log = training.logs / f"{training.job}_1_log.err"
    output = quiet.runs("follow", run, expect=1)
    assert f"job {training.job}: {why}: no restart" in output.stdout
    assert output.stderr.splitlines()[-1] == f"error: {why}; the complete log is {log}"
    assert training.wait_end() == "FAILED", training.report()
    [ended] = training.attempts()
    assert (ended["cause"], ended["requeued"]) == ("failed", False), training.report()
    assert ended["code"] in (137, 143), "srun's: of a rank that it ended, by TERM or by KILL"
    shown = quiet.runs("status", run, expect=0).stdout
    assert why in shown
    assert f"the complete log is {log}" in shown


def test_a_missing_python_ends_the_job_and_is_reported(quiet: Cluster, config, tmp_path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("python: /no/such/python\n")
    training = quiet.submit(config, tmp_path / "run", *TWO_RANKS, *SHORT, "--profile", profile)
    output = quiet.runs("follow", tmp_path / "run", expect=2).stderr.splitlines()[-1]
    assert "ended with exit code 2 before it began to train" in output
    assert "execve(): /no/such/python: No such file or directory" in output
    assert training.wait_end() == "FAILED", training.report()
    assert [each["requeued"] for each in training.attempts()] == [False]


def test_a_rank_that_is_killed_before_it_begins_is_restarted(quiet: Cluster, config, tmp_path) -> None:
    killed = '[ $SLURM_PROCID = 1 ] && [ -z "$SLURM_RESTART_COUNT" ] && kill -KILL $$\nexec "$python" "$@"'
    profile = python_of_ranks(tmp_path, killed)
    training = quiet.submit(config, tmp_path / "run", *TWO_RANKS, *SHORT, "--profile", profile)
    assert training.wait_end() == "COMPLETED", training.report()
    assert [(each["cause"], each["requeued"]) for each in training.attempts()] == [
        ("killed", True),
        ("done", False),
    ]


def test_tasks_of_srun_without_the_launcher_are_refused(quiet: Cluster, config, tmp_path) -> None:
    train = (sys.executable, ROOT / "toolkit" / "train.py", "--config", config, "--run", tmp_path / "run")
    done = quiet.run("srun", "--ntasks=2", "--time=5", *train, expect=2)
    assert done.stderr.count("error: srun started 2 processes without RANK") == 1, done.stderr
    assert not (tmp_path / "run").exists()
