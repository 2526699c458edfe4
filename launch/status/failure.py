"""Which rank of a job failed first, and the end of its log: the others may have failed because of it."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import EX_TEMPFAIL
from pathlib import Path
from typing import Any

from launch.job import LOST, Status

_TAIL = 20  # lines of a failed rank's log that are shown
_MOST = 60  # the same, where a traceback is that long
_NEAR = 200  # lines from the end, within which a traceback is taken for the reason
_READ = 2**18  # bytes that are looked at for them
# SLURM's lines on the end of a step, which say that a rank ended and not why; rank 0's log holds them too.
_STEP = re.compile(
    r"srun: (error: \S+ tasks? \S+ |Terminating|Force Terminated|Job step aborted|launch/slurm)"
    r"|slurmstepd\S*: error: \*\*\* "
)


@dataclass(frozen=True)
class Failure:
    """How a rank ended that failed.

    Attributes:
        rank: Its number.
        code: Its exit code; None where it was killed and could leave none.
        lines: The end of its log, from its last traceback where there is one.
        log: All of it.
        began: Whether it got as far as its status file: what ended it before that is in its log alone.
    """

    rank: int
    code: int | None
    lines: list[str]
    log: Path
    began: bool = True

    @property
    def mistake(self) -> str | None:
        """The one line of a user's mistake; None if it was something else."""
        mistakes = [line for line in self.lines if line.startswith("error: ")]
        return mistakes[-1] if self.code == 2 and mistakes else None

    @property
    def how(self) -> str:
        """In words."""
        if self.code == EX_TEMPFAIL:
            return "stopped by a signal, and saved: the same command continues"
        if not self.began:
            return self._how_it_could_not_begin()
        if self.code is None:
            return f"rank {self.rank} was killed, or ran out of memory or time"
        return f"rank {self.rank} failed with exit code {self.code}"

    def _how_it_could_not_begin(self) -> str:
        code = "" if self.code is None else f" with exit code {self.code}"
        # Of one that was killed the last line may be anything; an exception says why it ended in any case.
        why = exception_line(self.lines) or ("" if self.code is None else last_line(self.lines))
        return f"rank {self.rank} ended{code} before it began to train" + (f": {why}" if why else "")


def current_restart(folder: Path, ranks: int, begun: int = 0) -> int:
    """Restart count of the incarnation that the newest of the ranks' files, or `begun`, speak of."""
    return max([begun, *(_restart(status) for _, status in _statuses(folder, ranks))])


def exit_codes(folder: Path, ranks: int, restart: int) -> list[int | None]:
    """Exit code of each rank of an incarnation; None while it runs, or where it left none."""
    codes: list[int | None] = [None] * ranks
    for rank, status in _statuses(folder, ranks):
        if _restart(status) == restart:
            codes[rank] = status["exit"]
    return codes


def first_failure(
    folder: Path,
    job_id: str,
    ranks: int,
    lost: Callable[[int], bool],
    gone: bool,
    restart: int = 0,
    logs: Path | None = None,
) -> int | None:
    """The rank that failed first.

    A rank that was killed leaves no exit code, and the others notice only afterwards: it comes before them. Those that
    were asked to stop, or saw a connection break, come after one with an error of its own.

    Args:
        folder: Of the ranks' status files.
        job_id: As submitit names its files.
        ranks: Number of ranks.
        lost: Has this process died?
        gone: Has the job ended?
        restart: Incarnation of the job; what ranks of another one left is not looked at.
        logs: Of submitit's files, where that is another folder.
    """
    failures: list[tuple[bool, float, int]] = []
    statuses = dict(_statuses(folder, ranks))
    for rank in range(ranks):
        status = statuses.get(rank)
        if status is None or _restart(status) != restart:
            # It could not begin: submitit wrote down why. Or no node ever ran it.
            if status is None and ((logs or folder) / f"{job_id}_{rank}_result.pkl").exists():
                failures.append((False, 0.0, rank))
            elif gone:
                failures.append((True, math.inf, rank))
        elif status["exit"]:
            failures.append((status["exit"] in (LOST, EX_TEMPFAIL), status["time"], rank))
        elif status["exit"] is None and lost(status["pid"]) and _exit(folder, rank) is None:
            failures.append((False, 0.0, rank))
        elif status["exit"] is None and gone:
            failures.append((False, math.inf, rank))
    return min(failures)[2] if failures else None


def failure_of(folder: Path, job_id: str, rank: int, restart: int = 0, logs: Path | None = None) -> Failure:
    """Read how a rank ended; arguments as of `first_failure`."""
    status = Status(folder, rank).read()
    code = status["exit"] if status and _restart(status) == restart else None
    log = (logs or folder) / f"{job_id}_{rank}_log.err"
    lines = last_lines(log)
    began = status.get("began", True) if status else not lines
    return Failure(rank, code, lines, log, began)


def last_lines(log: Path) -> list[str]:
    """The end of a log: from its last traceback where one is near, else some lines; submitit's own are left out."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _READ))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("submitit ")]
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    if begins and len(lines) - begins[-1] <= _NEAR:
        first = min(begins[-1], max(0, len(lines) - _TAIL))
        return lines[first : first + _MOST]
    return lines[-_TAIL:]


def exception_line(lines: Sequence[str]) -> str:
    """The line that names the exception of the last traceback; empty where there is none."""
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    after = lines[begins[-1] + 1 :] if begins else []
    return next((line for line in after if not line[0].isspace()), "")


def last_line(lines: Sequence[str]) -> str:
    """The last line that is not SLURM's about the end of a step; empty where there is none."""
    return next((line for line in reversed(lines) if line.strip() and not _STEP.match(line)), "")


def _statuses(folder: Path, ranks: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(ranks):
        status = Status(folder, rank).read()
        if status is not None:
            yield rank, status


def _exit(folder: Path, rank: int) -> int | None:
    status = Status(folder, rank).read()
    return None if status is None else status["exit"]


def _restart(status: dict[str, Any]) -> int:
    return status.get("restart") or 0
