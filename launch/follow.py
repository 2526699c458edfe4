"""Following a job: rank 0's log in the terminal as it grows, and the end of the log of the rank that failed first."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launch.job import Status

_TAIL = 20  # lines of a failed rank's log that are shown
_LATE = 15.0  # seconds that a shared disk may take to show the last files of a job that is gone


class Running(Protocol):
    """A submitted job, as far as it is followed."""

    @property
    def id(self) -> str:
        """The job's number."""

    def alive(self) -> bool:
        """Is it waiting or running?"""

    def end(self) -> None:
        """End all ranks; returns when they are gone."""

    def lost(self, pid: int) -> bool:
        """Has this process of it died? False where that cannot be seen."""


@dataclass
class Local:
    """A job of submitit's local executor: a controller process with a child a rank."""

    job: Any  # submitit's LocalJob; its id is the controller's process
    folder: Path
    ranks: int

    @property
    def id(self) -> str:
        """The job's number."""
        return str(self.job.job_id)

    def alive(self) -> bool:
        """Does the controller run?"""
        return not self.job.done()

    def end(self) -> None:
        """Interrupt the ranks, kill what still runs a second later; the controller follows them.

        The controller passes SIGTERM on to its children, which ends those that have not named their process yet.
        """
        signals = [signal.SIGINT] + 9 * [signal.SIGTERM] + 50 * [signal.SIGKILL]
        for number in signals:
            if not self.alive():
                return
            if number == signal.SIGTERM:
                os.kill(int(self.id), number)
            else:
                self._signal_ranks(number)
            time.sleep(0.1)

    def _signal_ranks(self, number: int) -> None:
        for rank in range(self.ranks):
            status = Status(self.folder, rank).read()
            if status is not None and status["exit"] is None and not self.lost(status["pid"]):
                os.kill(status["pid"], number)

    def lost(self, pid: int) -> bool:
        """The controller reaps its children, so the process of a dead rank is gone."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False


@dataclass
class Slurm:
    """A SLURM job, seen through squeue, which needs no accounting."""

    id: str
    state: str = ""
    checked: float = 0.0

    def alive(self) -> bool:
        """Is it in the queue? A squeue that does not answer tells nothing, so the job counts as alive."""
        if time.monotonic() - self.checked > 2:
            command = ["squeue", "--noheader", "--jobs", self.id, "--format", "%T %R"]
            answer = subprocess.run(command, capture_output=True, text=True)
            state = answer.stdout.strip()
            if answer.returncode and "Invalid job id" not in answer.stderr:
                state = self.state
            if state and state != self.state:
                print(f"job {self.id}: {state}", flush=True)
            self.state, self.checked = state, time.monotonic()
        return bool(self.state)

    def end(self) -> None:
        """Cancel it."""
        subprocess.run(["scancel", self.id], capture_output=True)

    def lost(self, pid: int) -> bool:
        """A process of another machine cannot be seen."""
        return False


def follow(job: Running, folder: Path, ranks: int) -> int:
    """Print rank 0's log as it grows until the job ends; when a rank fails, end the others and show its last lines.

    Args:
        job: As submitted.
        folder: Where its logs and the ranks' status files are.
        ranks: Number of ranks.

    Returns:
        Exit code: 0 when every rank ended well, 2 for a user's mistake, else that of the rank that failed first.
    """
    log = Log(folder / f"{job.id}_0_log.out")
    gone_at = None
    while True:
        alive = job.alive()  # asked before the log is read: what a dead job wrote is all there
        log.show()
        if all(_exit(folder, rank) == 0 for rank in range(ranks)):
            log.show(to_the_end=True)
            return 0
        gone_at = gone_at or (None if alive else time.monotonic())
        gone = gone_at is not None and _late_enough(gone_at, job)
        failed = first_failure(folder, job.id, ranks, job.lost, gone)
        if failed is not None:
            job.end()
            log.show(to_the_end=True)
            return _explain(folder, job.id, failed)
        time.sleep(0.1)


def first_failure(folder: Path, job_id: str, ranks: int, lost: Callable[[int], bool], gone: bool) -> int | None:
    """The rank that failed first: the others may have failed because of it.

    A rank that was killed leaves no exit code, and the others notice only afterwards: it comes before them.
    """
    failures = []
    for rank in range(ranks):
        status = Status(folder, rank).read()
        if status is None:
            if (folder / f"{job_id}_{rank}_result.pkl").exists():  # it could not begin: submitit wrote down why
                failures.append((0.0, rank))
            elif gone:
                failures.append((math.inf, rank))
        elif status["exit"]:
            failures.append((status["time"], rank))
        elif status["exit"] is None and lost(status["pid"]) and _exit(folder, rank) is None:
            failures.append((0.0, rank))
        elif status["exit"] is None and gone:
            failures.append((math.inf, rank))
    return min(failures)[1] if failures else None


class Log:
    """A growing file, printed line by line; submitit's own messages are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def show(self, to_the_end: bool = False) -> None:
        """Print the lines that came since the last call; at the end, an unfinished one too."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            new = file.read()
        text = new if to_the_end else new[: new.rfind(b"\n") + 1]
        self.position += len(text)
        for line in text.decode(errors="replace").splitlines(keepends=True):
            if not line.startswith("submitit "):
                sys.stdout.write(line)
        sys.stdout.flush()


def _exit(folder: Path, rank: int) -> int | None:
    status = Status(folder, rank).read()
    return None if status is None else status["exit"]


def _late_enough(gone_at: float, job: Running) -> bool:
    return isinstance(job, Local) or time.monotonic() - gone_at > _LATE


def _explain(folder: Path, job_id: str, rank: int) -> int:
    """Say on stderr why a rank failed: a user's mistake in its one line, anything else by the end of its log."""
    code, log = _exit(folder, rank), folder / f"{job_id}_{rank}_log.err"
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("submitit ")]
    mistakes = [line for line in lines if line.startswith("error: ")]
    if code == 2 and mistakes:
        print(mistakes[-1], file=sys.stderr)
        return 2
    if code == os.EX_TEMPFAIL:
        print("stopped by a signal, and saved: the same command continues", file=sys.stderr)
        return code
    how = "was killed, or ran out of memory or time" if code is None else f"failed with exit code {code}"
    print("\n".join([f"rank {rank} {how}; the end of its log:", *lines[-_TAIL:]]), file=sys.stderr)
    print(f"error: rank {rank} {how}; the whole log is {log}", file=sys.stderr)
    return code or 1
