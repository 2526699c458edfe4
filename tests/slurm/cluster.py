"""A real SLURM cluster of one machine, and a training on it that a test watches and disturbs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.job import Status
from launch.record import read_attempts

ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "slurm" / "testbed"
NODES = 8
GPUS = "a100:2"  # a node
TOOLS = ("munged", "slurmctld", "slurmd", "srun", "slurmdbd", "mariadbd", "mariadb", "ip", "unshare", "nsenter")
PATIENCE = 240.0  # seconds for anything to happen on a machine that has other work


def why_not() -> str | None:
    """What keeps this machine from having a cluster; None if nothing does."""
    if os.geteuid() != 0:
        return "the SLURM testbed needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"SLURM is not installed here: no {', '.join(missing)} (see slurm/testbed/README.md)" if missing else None


def wait_for(what: Callable[[], Any], saying: Callable[[], str], patience: float = PATIENCE) -> Any:
    """Ask again and again until the answer is true; give it."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(0.1)
    raise TimeoutError(f"not within {patience:g} s\n{saying()}")


@dataclass(frozen=True)
class Cluster:
    """The cluster that `slurm/testbed/up` has made in a folder."""

    folder: Path

    def up(self) -> None:
        sizes = ("--nodes", str(NODES), "--cpus", "2", "--gpus", GPUS)
        self._testbed("up", str(self.folder), "--net", *sizes, "--silent", "15")

    def down(self) -> None:
        self._testbed("down", str(self.folder))

    def run(self, *command: object, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command where clients of the cluster run."""
        words = [str(self.folder / "bin" / "in-cluster"), *map(str, command)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=ROOT)
        assert expect is None or done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def runs(self, *words: object, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of launch/runs.py."""
        return self.run(sys.executable, ROOT / "launch" / "runs.py", *words, expect=expect)

    def node(self, action: str, name: str, *command: object, expect: int | None = 0) -> str:
        words = [str(self.folder / "bin" / "node"), action, name, *map(str, command)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60)
        assert expect is None or done.returncode == expect, f"{words}\n{done.stdout}"
        return done.stdout

    def controller(self, action: str) -> None:
        subprocess.run([self.folder / "bin" / "controller", action], check=True, timeout=60)

    def idle(self) -> bool:
        """Whether all nodes answer and have nothing to do: not "idle*", and not drained."""
        shown = self.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=low").stdout
        return shown.split() == ["idle"] * NODES

    def resume(self) -> None:
        """Take back into use what SLURM has drained or called down, as after a process that it could not end."""
        states = "--states=drain,drained,draining,down,fail"
        shown = self.run("sinfo", "--noheader", "--Node", states, "--format=%N", "--partition=low").stdout
        for name in set(shown.split()):
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", expect=None)

    def state(self, job: str) -> str:
        """State of a job in the accounting."""
        shown = self.run("sacct", "-X", "--noheader", "--parsable2", "--jobs", job, "--format=State").stdout
        return shown.split()[0] if shown.strip() else ""  # of "CANCELLED by 0" the first word

    def submit(self, config: Path, run: Path, *arguments: object) -> "Training":
        """Submit a training through the real command."""
        command = [sys.executable, ROOT / "launch" / "submit.py", "--config", config, "--run", run, "--no-follow"]
        self.run(*command, "--cluster", "slurm", *arguments)
        [logs] = (run / "logs").iterdir()
        job = json.loads((logs / "submission.json").read_text())["job"]
        return Training(self, run, logs, str(job))

    @staticmethod
    def _testbed(script: str, *arguments: str) -> None:
        done = subprocess.run([str(TESTBED / script), *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


# A traced process that has stopped continues only when its tracer lets it.
FREEZE = """
import ctypes, os, sys, time
if ctypes.CDLL(None, use_errno=True).ptrace(16, int(sys.argv[1]), None, None):  # PTRACE_ATTACH
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
os.waitpid(int(sys.argv[1]), 0x40000000)  # __WALL
print("frozen", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Training:
    """A job of this project on the cluster."""

    cluster: Cluster
    run: Path
    logs: Path
    job: str

    def records(self) -> list[dict[str, Any]]:
        """The complete lines of the run's log."""
        path = self.run / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def losses(self) -> dict[int, list[float]]:
        """Each step's loss, once for each time that it was taken."""
        taken: dict[int, list[float]] = {}
        for record in self.records():
            if "loss" in record:
                taken.setdefault(record["step"], []).append(record["loss"])
        return taken

    def attempts(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in read_attempts(self.logs)]

    def hosts(self) -> list[str]:
        """Nodes of the attempt under way."""
        return self.attempts()[-1]["hosts"]

    def wait_step(self, more: int = 5) -> int:
        """Wait until some more steps were taken from now on; give the number of the last."""
        now = time.time()

        def steps() -> list[int]:
            return [each["step"] for each in self.records() if "loss" in each and each["time"] > now]

        wait_for(lambda: len(steps()) >= more, self.report)
        return steps()[-1]

    def wait_restart(self, number: int) -> dict[str, Any]:
        """Wait for an attempt to begin; give what is known of the one before."""
        wait_for(lambda: self.attempts() and self.attempts()[-1]["restart"] >= number, self.report)
        return self.attempts()[number - 1]

    def wait_end(self) -> str:
        """Wait until SLURM has done with the job; give the state that accounting shows."""
        active = ("", "PENDING", "RUNNING", "REQUEUED", "PREEMPTED", "NODE_FAIL")

        def ended() -> bool:
            queued = self.cluster.run("squeue", "--noheader", "--jobs", self.job, expect=None).stdout.strip()
            return not queued and self.cluster.state(self.job) not in active

        wait_for(ended, self.report, 2 * PATIENCE)
        return self.cluster.state(self.job)

    def signal(self, number: str, rank: int, host: str) -> None:
        """Send a signal to a rank."""
        self.cluster.node("run", host, "kill", f"-{number}", self.pid(rank))

    @contextlib.contextmanager
    def frozen(self, rank: int, host: str) -> Iterator[None]:
        """Stop a rank: as for one that is stuck in the kernel, only SIGKILL reaches it."""
        command = [str(self.cluster.folder / "bin" / "node"), "run", host, sys.executable, "-c", FREEZE]
        with subprocess.Popen([*command, str(self.pid(rank))], stdout=subprocess.PIPE, text=True) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == "frozen\n"
            try:
                yield
            finally:
                tracer.kill()

    def pid(self, rank: int) -> int:
        """The process of a rank, as its node numbers it."""
        status = Status(self.logs, rank).read()
        assert status is not None
        return status["pid"]

    def report(self) -> str:
        """Everything that helps to see what went wrong."""
        return "\n".join(self._report())

    def _report(self) -> Iterator[str]:
        yield self.cluster.run("squeue", expect=None).stdout + self.cluster.run("sinfo", expect=None).stdout
        yield from map(json.dumps, self.attempts())
        for log in sorted(self.logs.glob("*_log.*")):
            yield f"{log.name}: {log.read_text(errors='replace')[-1500:]}"
