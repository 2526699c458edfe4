"""Jobs of two ranks through the real submitit: what is printed, the exit code, and that nothing runs on afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest

from launch.executor import JobSpec
from launch.job import Job, Status
from launch.profiles import Profile
from launch.record import Submission, SubmissionRecord
from launch.snapshot import ROOT, snapshot
from launch.submit import _rank_job, expand_short_options, main, submit, watch
from shards.errors import UserError
from toolkit.config.schema import Config

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not find this file


class Sum(Job):
    def work(self):
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(total)
        print(f"sum {int(total)} over {os.environ['WORLD_SIZE']} ranks", flush=True)


class Waiting(Job):
    """Rank 1 does what a test wants to see; rank 0 would wait for it for ever."""

    def work(self):
        Path(self.folder, f"began{os.environ['RANK']}").touch()
        while not Path(self.folder, "began0").exists() or not Path(self.folder, "began1").exists():
            time.sleep(0.02)
        if os.environ["RANK"] == "1":
            self.fail()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as one stuck in a collective
        time.sleep(600)

    def fail(self):
        raise ZeroDivisionError("the second rank divided by zero")


class Mistaken(Waiting):
    def fail(self):
        raise UserError("the picture is upside down: turn it round")


class Killed(Waiting):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Waiting):
    def fail(self):
        time.sleep(600)


def launch(kind, folder):
    from launch.submit import _free_port

    spec = JobSpec("local", Config(run=str(folder)), Profile(), 2)
    work = kind(str(folder / "none.yaml"), str(folder), _free_port())
    (job,) = submit(spec, [work], folder, snapshot(folder))
    return watch(job, SubmissionRecord(folder, Submission(job.id, "local", str(folder), 1, 2, [])))


def processes(folder):
    """The ranks of a job that still run."""
    pids = [Status(folder, rank).read()["pid"] for rank in range(2)]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_two_ranks_meet(tmp_path, capfd):
    code = launch(Sum, tmp_path)
    out, err = capfd.readouterr()
    assert (code, err) == (0, ""), err
    assert out == "sum 3 over 2 ranks\n"


@pytest.mark.parametrize(
    ("kind", "code", "shown"),
    [
        (Waiting, 1, "ZeroDivisionError: the second rank divided by zero"),
        (Killed, 1, "rank 1 was killed"),
        (Mistaken, 2, "error: the picture is upside down: turn it round"),
    ],
)
def test_failing_rank_ends_the_others(tmp_path, capfd, kind, code, shown):
    start = time.monotonic()
    status = launch(kind, tmp_path)
    err = capfd.readouterr().err
    assert status == code, err
    assert shown in err
    assert time.monotonic() - start < 15, "the other rank was not ended promptly"
    assert processes(tmp_path) == []
    assert "KeyboardInterrupt" not in err, "the controller was interrupted, not ended"
    if code == 2:
        assert err == f"{shown}\n"
    elif kind is Waiting:
        assert err.count("Traceback") == 1, err
        assert "_1_log.err" in err


def test_interrupt_ends_a_local_job(tmp_path):
    def interrupt():
        while not all((tmp_path / f"began{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # which is ignored from there on
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(Hanging, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes(tmp_path) == []


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("inside", "cores"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "6", "SLURM_NTASKS": "6"}, 6),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "2", "PMI_RANK": "0"}, 4),
        ({}, None),
    ],
    ids=["salloc", "left in part", "outside"],
)
def test_local_ranks_use_the_cores_of_the_allocation_alone(tmp_path, monkeypatch, inside, cores):
    monkeypatch.setattr(os, "environ", {**os.environ, **inside, "SLURM_CONF": "/etc/x"})
    for name in ("run_checks", "signal.signal"):
        monkeypatch.setattr(f"launch.submit.{name}", lambda *_: None)
    seen = []

    def run_one(spec, *_, **__):
        cores_of_ranks = _rank_job(spec, tmp_path / "config.yaml").cores
        seen.append((cores_of_ranks, {name for name in os.environ if name.startswith(("SLURM_", "PMI"))}))
        return 0

    monkeypatch.setattr("launch.submit.run_one", run_one)
    with pytest.raises(SystemExit) as ended:
        main(["--cluster", "local", "--run", str(tmp_path / "run")])
    assert ended.value.code == 0
    assert seen == [(cores, {"SLURM_CONF"})]


def test_errors_are_one_line_and_leave_nothing(tmp_path):
    cases = {
        ("--data.shards", tmp_path / "none", "--data.make", "[]"): "no shards in",
        ("--nodes", "3", "--cluster", "local"): "--launch.nodes 3 needs SLURM",
        ("--time", "soon"): "--launch.time soon: expected minutes",
    }
    for arguments, expected in cases.items():
        ended = run("--ranks-per-node", "2", "--run", tmp_path / "run", *arguments)
        assert ended.returncode == 2, ended.stderr
        assert expected in ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_slurm(tmp_path):
    ended = run("--cluster", "slurm", "--run", tmp_path / "run", PATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --launch.cluster slurm: sbatch, srun, squeue, scontrol not found here"), (
        ended.stderr
    )


def test_make_shards_failure_passes_on(tmp_path):
    ended = run("--run", tmp_path / "run", "--data.shards", tmp_path / "s", "--data.make", "[nosuchcorpus]")
    assert ended.returncode == 2
    assert "nosuchcorpus" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "call", "heavy"),
    [
        ("submit", "", "torch transformers deepspeed submitit numpy"),
        ("runs", "module.build_parser().format_help()", "torch numpy submitit"),
        ("shard", "module.build_parser().format_help()", "torch numpy submitit"),
        ("slurm.requeue", "", "torch numpy yaml submitit"),
    ],
)
def test_heavy_packages_are_not_imported(module, call, heavy):
    code = f"import sys, launch.{module} as module; {call}\nsys.exit(str(set({heavy.split()}) & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.strip() == "set()"


def test_short_options():
    assert list(expand_short_options(["--nodes", "4", "--ranks-per-node=8", "--training.lr", "1"])) == [
        "--launch.nodes", "4", "--launch.ranks_per_node=8", "--training.lr", "1",
    ]  # fmt: skip
    assert list(expand_short_options(["--no-follow", "--name", "x"])) == ["--launch.follow=false", "--launch.name", "x"]
