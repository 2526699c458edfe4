"""One rank's job: its place among the ranks, what it calls, and the status it leaves."""

import os
import signal
import sys

import pytest
import torch.distributed

from launch.job import Job, Status, train_and_evaluate
from shards.errors import ExitCode, TransientError, UserError
from toolkit.config.schema import Config
from toolkit.rank_sync import RemoteRankError
from toolkit.run_folder import to_yaml

LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "77",
    "SUBMITIT_LOCAL_NTASKS": "3",
    "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
    "SUBMITIT_LOCAL_NODEID": "0",
    "SUBMITIT_LOCAL_GLOBALID": "2",
    "SUBMITIT_LOCAL_LOCALID": "2",
}
SLURM = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "node[03-04]",
    "SLURM_CPUS_PER_TASK": "6",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The job sets variables and signal handlers of its process: put them back."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [*SLURM, *LOCAL, "SLURM_RESTART_COUNT", "OMP_NUM_THREADS", "RANK"]:
        os.environ.pop(name, None)
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_rank_environment_on_slurm(tmp_path):
    os.environ.update(SLURM)
    assert Job("", str(tmp_path)).rank_environment() == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": "24567",
        "OMP_NUM_THREADS": "6",
    }


def test_each_start_has_a_port_of_its_own(tmp_path):
    os.environ.update(SLURM)
    ports = {}
    for restart in range(20):
        os.environ["SLURM_RESTART_COUNT"] = str(restart)
        ports[int(Job("", str(tmp_path)).rank_environment()["MASTER_PORT"])] = restart
    assert len(ports) == 20
    assert all(20000 <= port < 30000 for port in ports)


def test_rank_environment_on_this_machine(tmp_path, monkeypatch):
    os.environ.update(LOCAL)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    place = Job("", str(tmp_path), port=4242).rank_environment()
    assert place == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4242",
        "OMP_NUM_THREADS": "2",
    }
    assert Job("", str(tmp_path), port=4242, cores=6).rank_environment()["OMP_NUM_THREADS"] == "2"
    assert Job("", str(tmp_path), port=4242, cores=3).rank_environment()["OMP_NUM_THREADS"] == "1"
    assert Job("", str(tmp_path), port=4242, cores=64).rank_environment()["OMP_NUM_THREADS"] == "2"
    os.environ["SLURM_CPUS_PER_TASK"] = "8"  # of the allocation's one task, which all ranks here are
    assert Job("", str(tmp_path), port=4242, cores=8).rank_environment()["OMP_NUM_THREADS"] == "2"
    os.environ["OMP_NUM_THREADS"] = "5"
    assert Job("", str(tmp_path), port=4242).rank_environment()["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("error", "code", "logged"),
    [
        (None, 0, ""),
        (UserError("mend it"), 2, "error: mend it\n"),
        (TransientError("the disk did not answer"), ExitCode.TRANSIENT, "error: the disk did not answer\n"),
        (RemoteRankError("rank 3: broken"), ExitCode.PEER_LOST, "rank 3: broken\n"),
        (ValueError("broken"), 1, "ValueError: broken\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            ExitCode.PEER_LOST,
            "closed by peer\n",
        ),
        (torch.distributed.DistNetworkError("no store"), ExitCode.PEER_LOST, "no store\n"),
        (RuntimeError("shapes do not match"), 1, "RuntimeError: shapes do not match\n"),
        (SystemExit(7), 7, "SystemExit: 7\n"),
        (SystemExit(75), 75, ""),
    ],
)
def test_status(tmp_path, monkeypatch, capsys, error, code, logged):
    seen = []

    def train(config):
        seen.append((config, os.environ.get("CUDA_VISIBLE_DEVICES"), Status(tmp_path, 2).read()))
        if error is not None:
            raise error

    monkeypatch.setattr("launch.job.train_and_evaluate", train)
    monkeypatch.setattr("launch.job._destroy_group", lambda: None)
    os.environ.update(LOCAL, CUDA_VISIBLE_DEVICES="")
    job = Job("some.yaml", str(tmp_path), port=4242, gpus="GPU-1234")
    if code:
        with pytest.raises(SystemExit) as ended:
            job()
        assert ended.value.code == code
    else:
        job()
    [(config, gpus, running)] = seen
    assert (config, gpus, running["pid"], running["exit"]) == ("some.yaml", "GPU-1234", os.getpid(), None)
    assert Status(tmp_path, 2).read()["exit"] == code
    assert Status(tmp_path, 2).read()["restart"] == 0
    shown = capsys.readouterr().err
    assert shown.endswith(logged)
    assert bool(shown) == bool(logged)


def test_a_rank_runs_in_the_directory_of_the_command(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.chdir(tmp_path)  # and is brought back
    monkeypatch.setattr("launch.job.train_and_evaluate", lambda config: seen.append(os.getcwd()))
    os.environ.update(LOCAL)
    (tmp_path / "there").mkdir()
    Job("some.yaml", str(tmp_path), port=4242, directory=str(tmp_path / "there"))()
    assert seen == [str(tmp_path / "there")]
    with pytest.raises(SystemExit) as ended:
        Job("some.yaml", str(tmp_path), port=4242, directory=str(tmp_path / "not mounted"))()
    assert ended.value.code == 2
    assert "not mounted, the working directory of the command, on" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_outside_the_training_ends_the_rank(tmp_path, monkeypatch, number):
    monkeypatch.setattr("launch.job.train_and_evaluate", lambda config: os.kill(os.getpid(), number))
    os.environ.update(LOCAL)
    with pytest.raises(SystemExit) as ended:
        Job("some.yaml", str(tmp_path), port=4242)()
    assert ended.value.code == 75
    assert Status(tmp_path, 2).read()["exit"] == 75


@pytest.mark.parametrize(
    ("split", "stop_after", "evaluated"),
    [("test", None, ["evaluate"]), ("", None, []), ("test", 5, [])],
)
def test_training_then_evaluation(tmp_path, monkeypatch, split, stop_after, evaluated):
    config = Config()
    config.final.split, config.training.stop_after = split, stop_after
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    calls = []
    for name in ("train", "evaluate"):
        module = type(sys)(f"toolkit.{name}")
        module.main = lambda arguments, name=name: calls.append((name, arguments))
        monkeypatch.setitem(sys.modules, f"toolkit.{name}", module)
        monkeypatch.setattr(f"toolkit.{name}", module, raising=False)
    train_and_evaluate(str(file))
    assert calls == [(name, ["--config", str(file)]) for name in ("train", *evaluated)]
