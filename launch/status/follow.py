"""Following a job: rank 0's log in the terminal as it grows, through restarts, and the reason of a failure."""

import logging
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Status
from launch.record import Attempt, SubmissionRecord, ended_for_good, read_attempts
from launch.slurm.client import queue_state
from launch.status.failure import Failure, current_restart, exit_codes, failure_of, first_failure
from shards.errors import ExitCode

logger = logging.getLogger(__name__)

_FILE_DELAY = 15.0  # seconds that a shared disk may take to show the last files of a job that has ended
_QUEUE_INTERVAL = 2.0  # seconds between queries of the queue
_POLL_INTERVAL = 0.1  # seconds between reads of the files


@dataclass
class Local:
    """A job of submitit's local executor: a controller process with one child per rank."""

    job: Any  # submitit's LocalJob; its id is the controller's process ID
    folder: Path
    ranks: int

    @property
    def id(self) -> str:
        """The job's number."""
        return str(self.job.job_id)

    def alive(self) -> bool:
        """Return whether the controller runs."""
        return not self.job.done()

    def end(self) -> None:
        """Interrupt the ranks and kill those that still run a second later; then the controller ends.

        The controller passes SIGTERM on to its children, which ends those that have not written their status yet.
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
        """Send a signal to each running rank."""
        for rank in range(self.ranks):
            status = Status(self.folder, rank).read()
            if status is not None and status["exit"] is None and not self.lost(status["pid"]):
                os.kill(status["pid"], number)

    def lost(self, pid: int) -> bool:
        """Return whether this process of the job is gone: the controller reaps its children."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False


@dataclass(frozen=True)
class Controller:
    """A local job's controller, found by its process ID; a later process with the same ID is recognized.

    Not for a job that was just submitted: a process that begins has no command line for a moment.
    """

    job_id: str
    folder: Path

    def done(self) -> bool:
        """Return whether it has ended."""
        try:
            words = Path(f"/proc/{int(self.job_id)}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return True
        return os.fsencode(self.folder.resolve()) not in words


@dataclass
class Slurm:
    """A SLURM job, followed by squeue, which needs no accounting."""

    id: str
    state: str = ""
    in_queue: bool = True
    queried_at: float = -math.inf

    def alive(self) -> bool:
        """Return whether it is in the queue; True if squeue is missing or does not answer."""
        if time.monotonic() - self.queried_at > _QUEUE_INTERVAL:
            state = queue_state(self.id)
            self.queried_at = time.monotonic()
            if state is not None:
                if state and state != self.state:
                    logger.info("job %s: %s", self.id, state)
                self.state, self.in_queue = state, bool(state)
        return self.in_queue

    def lost(self, pid: int) -> bool:
        """Return False: a process of another machine cannot be seen."""
        return False


Running = Local | Slurm  # a submitted job that is followed


def follow(job: Running, recorded: SubmissionRecord) -> int:
    """Print rank 0's log as it grows, and the job's restarts, until the job ends for good.

    When a rank of a job of this machine fails, the others are ended. On SLURM srun does that, and the job may be
    restarted.

    Args:
        job: The submitted job.
        recorded: Its submission.

    Returns:
        0 if every rank succeeded, else the `ExitCode` of a user error or of a saved run, else the exit code of the rank
        that failed first.
    """
    log, printer, gone_at = Log(recorded.log(0)), AttemptPrinter(job.id), None
    while True:
        alive = job.alive()  # queried before the log is read, which is complete once the job has ended
        log.show()
        attempts = read_attempts(recorded.folder)
        printer.show(attempts)
        restart = current_restart(recorded, attempts)
        if all(code == 0 for code in exit_codes(recorded, restart)):
            log.show(to_the_end=True)
            return 0
        gone_at = None if alive else gone_at or time.monotonic()
        files_complete = gone_at is not None and (isinstance(job, Local) or time.monotonic() - gone_at > _FILE_DELAY)
        gone = files_complete or ended_for_good(attempts)
        failed = first_failure(recorded, job.lost, gone, restart)
        if failed is not None and (gone or isinstance(job, Local)):
            if isinstance(job, Local):
                job.end()
            log.show(to_the_end=True)
            return _report_failure(failure_of(recorded, failed, restart), attempts)
        time.sleep(_POLL_INTERVAL)


class AttemptPrinter:
    """Logs the beginnings and ends of a job's attempts, each once."""

    def __init__(self, job: str) -> None:
        self.job, self.ended, self.begun = job, -1, 0

    def show(self, attempts: list[Attempt]) -> None:
        """Log the restarts and failures since the last call."""
        for attempt in attempts:
            if attempt.restart > self.begun:
                hosts = f" on {', '.join(attempt.hosts)}" if attempt.hosts else ""
                logger.info("job %s: restart %d%s", self.job, attempt.restart, hosts)
                self.begun = attempt.restart
            if attempt.ended is not None and attempt.restart > self.ended and attempt.code != 0:
                logger.info("job %s: %s", self.job, attempt.why or f"ended with exit code {attempt.code}")
                self.ended = attempt.restart


class Log:
    """A growing file, printed line by line without submitit's messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def show(self, to_the_end: bool = False) -> None:
        """Print the lines since the last call; at the end an unfinished one too.

        A file that has become shorter was rewritten: it is printed from its start.
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


def _report_failure(failure: Failure, attempts: list[Attempt]) -> int:
    """Log why a job failed, a user error in its one line; return the exit code."""
    if failure.user_error:
        logger.error("%s", failure.user_error.removeprefix("error: "))
        return ExitCode.USER_ERROR
    if failure.code == ExitCode.REQUEUE:
        logger.warning("%s", failure.how)
        return failure.code
    print("\n".join([f"{failure.how}; the end of its log:", *failure.lines]), file=sys.stderr)
    logger.error("%s; the complete log is %s", failure.how, failure.log)
    return failure.code or (attempts[-1].code if attempts else None) or ExitCode.ERROR
