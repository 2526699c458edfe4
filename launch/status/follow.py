"""Following a job: rank 0's log in the terminal as it grows, through restarts, and why it failed if it did."""

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launch.job import Status
from launch.record import Attempt, attempts, ended_for_good
from launch.slurm.client import ask
from launch.status.failure import Failure, current_restart, exit_codes, failure_of, first_failure

__all__ = ["Controller", "Local", "Log", "Running", "Slurm", "first_failure", "follow"]

_LATE = 15.0  # seconds that a shared disk may take to show the last files of a job that is gone


class Running(Protocol):
    """A submitted job, as far as it is followed."""

    @property
    def id(self) -> str:
        """The job's number."""

    def alive(self) -> bool:
        """Is it waiting or running?"""

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
                self.signal_ranks(number)
            time.sleep(0.1)

    def signal_ranks(self, number: int) -> None:
        """Send a signal to each rank that runs."""
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


@dataclass(frozen=True)
class Controller:
    """A local job's controller process, found again by its number; that of another process is not taken for it."""

    job_id: str
    folder: Path

    def done(self) -> bool:
        """Has it ended?"""
        try:
            words = Path(f"/proc/{int(self.job_id)}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return True
        return os.fsencode(self.folder.resolve()) not in words


@dataclass
class Slurm:
    """A SLURM job, seen through squeue, which needs no accounting."""

    id: str
    state: str = ""
    there: bool = True
    asked: float = -math.inf

    def alive(self) -> bool:
        """Is it in the queue? Where squeue is not there or does not answer, nothing is known: it counts as alive."""
        if time.monotonic() - self.asked > 2:
            answer = ask(["squeue", "--noheader", "--jobs", self.id, "--format", "%T %R"])
            self.asked = time.monotonic()
            if answer is not None:
                state = " ".join(answer).strip()
                if state and state != self.state:
                    print(f"job {self.id}: {state}", flush=True)
                self.state, self.there = state, bool(state)
        return self.there

    def lost(self, pid: int) -> bool:
        """A process of another machine cannot be seen."""
        return False


def follow(job: Running, folder: Path, ranks: int, logs: Path | None = None) -> int:
    """Print rank 0's log as it grows until the job ends for good, and what becomes of it on the way.

    When a rank of a job of this machine fails, the others are ended. On SLURM that is done by srun, and the job may
    start again.

    Args:
        job: As submitted.
        folder: Where the ranks' status files are.
        ranks: Number of ranks.
        logs: Where their logs are, if elsewhere.

    Returns:
        Exit code: 0 when every rank ended well, 2 for a user's mistake, 75 when it was stopped and saved, else that of
        the rank that failed first.
    """
    logs = logs or folder
    log, told, gone_at = Log(logs / f"{job.id}_0_log.out"), AttemptPrinter(job.id), None
    while True:
        alive = job.alive()  # asked before the log is read: what a dead job wrote is all there
        log.show()
        lives = attempts(folder)
        told.tell(lives)
        restart = current_restart(folder, ranks, lives[-1].restart if lives else 0)
        if all(code == 0 for code in exit_codes(folder, ranks, restart)):
            log.show(to_the_end=True)
            return 0
        gone_at = None if alive else gone_at or time.monotonic()
        gone = ended_for_good(lives) or (gone_at is not None and _late_enough(gone_at, job))
        failed = first_failure(folder, job.id, ranks, job.lost, gone, restart, logs)
        if failed is not None and (gone or isinstance(job, Local)):
            if isinstance(job, Local):
                job.end()
            log.show(to_the_end=True)
            return _explain(failure_of(folder, job.id, failed, restart, logs), lives)
        time.sleep(0.1)


class AttemptPrinter:
    """What was said of a job's incarnations."""

    def __init__(self, job: str) -> None:
        self.job, self.ended, self.begun = job, -1, 0

    def tell(self, lives: list[Attempt]) -> None:
        """Print which have begun again and which have ended since the last call."""
        for life in lives:
            if life.restart > self.begun:
                hosts = f" on {', '.join(life.hosts)}" if life.hosts else ""
                print(f"job {self.job}: restart {life.restart}{hosts}", flush=True)
                self.begun = life.restart
            if life.ended is not None and life.restart > self.ended and life.code != 0:
                print(f"job {self.job}: {life.why or f'ended with exit code {life.code}'}", flush=True)
                self.ended = life.restart


class Log:
    """A growing file, printed line by line; submitit's own messages are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def show(self, to_the_end: bool = False) -> None:
        """Print the lines that came since the last call; at the end, an unfinished one too.

        A file that has become shorter was begun anew: it is printed from its start.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.position:
                self.position = 0
            file.seek(self.position)
            new = file.read()
        text = new if to_the_end else new[: new.rfind(b"\n") + 1]
        self.position += len(text)
        for line in text.decode(errors="replace").splitlines(keepends=True):
            if not line.startswith("submitit "):
                sys.stdout.write(line)
        sys.stdout.flush()


def _late_enough(gone_at: float, job: Running) -> bool:
    return isinstance(job, Local) or time.monotonic() - gone_at > _LATE


def _explain(failure: Failure, lives: list[Attempt]) -> int:
    """Say on stderr why a job failed: a user's mistake in its one line, anything else by the end of the rank's log."""
    if failure.mistake:
        print(failure.mistake, file=sys.stderr)
        return 2
    if failure.code == os.EX_TEMPFAIL:
        print(failure.how, file=sys.stderr)
        return failure.code
    print("\n".join([f"{failure.how}; the end of its log:", *failure.lines]), file=sys.stderr)
    print(f"error: {failure.how}; the whole log is {failure.log}", file=sys.stderr)
    return failure.code or (lives[-1].code if lives else None) or 1
