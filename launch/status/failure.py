"""The rank of a job that failed first, and the end of its log: the others may have failed because of it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Status
from launch.record import Attempt, SubmissionRecord
from shards.errors import ExitCode

_TAIL_LINES = 20  # lines of a failed rank's log that are shown
_MAX_LINES = 60  # the same for a long traceback
_TRACEBACK_RANGE = 200  # lines from the end within which a traceback is taken for the reason
_TAIL_BYTES = 2**18  # bytes of the log that are read
# SLURM's lines on the end of a step, which do not explain why a rank ended; they are in rank 0's log.
_STEP = re.compile(
    r"srun: (error: \S+ tasks? \S+ |Terminating|Force Terminated|Job step aborted|launch/slurm)"
    r"|slurmstepd\S*: error: \*\*\* "
)


@dataclass(frozen=True)
class Failure:
    """Failure of a rank.

    Attributes:
        rank: Rank.
        code: Exit code; None if the rank was killed and could record none.
        lines: End of its log, from the last traceback if there is one.
        log: File of the log.
        began: Whether it wrote its status file; the reason of an earlier end is in its log alone.
    """

    rank: int
    code: int | None
    lines: list[str]
    log: Path
    began: bool = True

    @property
    def user_error(self) -> str | None:
        """The line of a user error; None if it was another failure."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        return errors[-1] if self.code == ExitCode.USER_ERROR and errors else None

    @property
    def how(self) -> str:
        """Explanation for people."""
        if self.code == ExitCode.REQUEUE:
            return "stopped by a signal, and saved: the same command continues"
        if not self.began:
            return self._how_it_failed_to_start()
        if self.code is None:
            return f"rank {self.rank} was killed, or ran out of memory or time"
        return f"rank {self.rank} failed with exit code {self.code}"

    def _how_it_failed_to_start(self) -> str:
        code = "" if self.code is None else f" with exit code {self.code}"
        # The last line of one that was killed may be anything; an exception is the reason in any case.
        why = exception_line(self.lines) or ("" if self.code is None else last_line(self.lines))
        return f"rank {self.rank} ended{code} before it began to train" + (f": {why}" if why else "")


def current_restart(recorded: SubmissionRecord, attempts: Sequence[Attempt]) -> int:
    """Return the restart count of the newest attempt that is recorded, or that a rank has begun."""
    return max([0, *(each.restart for each in attempts), *map(_restart, _statuses(recorded).values())])


def exit_codes(recorded: SubmissionRecord, restart: int) -> list[int | None]:
    """Return the exit code of each rank of an attempt; None while it runs, or if it recorded none."""
    statuses = {rank: status for rank, status in _statuses(recorded).items() if _restart(status) == restart}
    return [statuses[rank]["exit"] if rank in statuses else None for rank in range(recorded.submission.ranks)]


def first_failure(recorded: SubmissionRecord, lost: Callable[[int], bool], gone: bool, restart: int = 0) -> int | None:
    """Return the rank that failed first; None if none failed.

    A rank that was killed records no exit code, and the others notice only afterwards: it comes before them. Ranks that
    were stopped by a signal, or whose connection broke, come after one with another error.

    Args:
        recorded: Submission of the job.
        lost: Returns whether this process has died.
        gone: Whether the job has ended.
        restart: Restart count of the attempt; files of other attempts are ignored.
    """
    failures: list[tuple[bool, float, int]] = []
    statuses = _statuses(recorded)
    for rank in range(recorded.submission.ranks):
        status = statuses.get(rank)
        if status is None or _restart(status) != restart:
            # It failed to start, and submitit recorded why. Or no node ever ran it.
            if status is None and recorded.result(rank).exists():
                failures.append((False, 0.0, rank))
            elif gone:
                failures.append((True, math.inf, rank))
        elif status["exit"]:
            failures.append((status["exit"] in (ExitCode.PEER_LOST, ExitCode.REQUEUE), status["time"], rank))
        elif status["exit"] is None and lost(status["pid"]) and exit_codes(recorded, restart)[rank] is None:
            failures.append((False, 0.0, rank))
        elif status["exit"] is None and gone:
            failures.append((False, math.inf, rank))
    return min(failures)[2] if failures else None


def failure_of(recorded: SubmissionRecord, rank: int, restart: int = 0) -> Failure:
    """Read how a rank failed; arguments as of `first_failure`."""
    status = Status(recorded.folder, rank).read()
    code = status["exit"] if status and _restart(status) == restart else None
    log = recorded.log(rank, "err")
    lines = last_lines(log)
    began = status.get("began", True) if status else not lines
    return Failure(rank, code, lines, log, began)


def last_lines(log: Path) -> list[str]:
    """Return the end of a log without submitit's lines: from its last traceback if that is near, else a few lines."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("submitit ")]
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    if begins and len(lines) - begins[-1] <= _TRACEBACK_RANGE:
        first = min(begins[-1], max(0, len(lines) - _TAIL_LINES))
        return lines[first : first + _MAX_LINES]
    return lines[-_TAIL_LINES:]


def exception_line(lines: Sequence[str]) -> str:
    """Return the line that names the exception of the last traceback; empty for none."""
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    after = lines[begins[-1] + 1 :] if begins else []
    return next((line for line in after if not line[0].isspace()), "")


def last_line(lines: Sequence[str]) -> str:
    """Return the last line that is not SLURM's about the end of a step; empty for none."""
    return next((line for line in reversed(lines) if line.strip() and not _STEP.match(line)), "")


def _statuses(recorded: SubmissionRecord) -> dict[int, dict[str, Any]]:
    """Return what the ranks wrote last, without those that wrote nothing."""
    statuses = {rank: Status(recorded.folder, rank).read() for rank in range(recorded.submission.ranks)}
    return {rank: status for rank, status in statuses.items() if status is not None}


def _restart(status: dict[str, Any]) -> int:
    return status.get("restart") or 0
