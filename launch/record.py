"""Records of each submission and of each attempt of its job, which `status`, `follow` and `resume` read."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import atomic_write, read_records

SUBMISSION, ATTEMPTS = "submission.json", "attempts.jsonl"
_OLD_ATTEMPTS = "incarnations.jsonl"  # the name that earlier versions wrote
MEMBERS = "members.json"  # log folder of each member of a job array by its index; written before the job is submitted


@dataclass(frozen=True)
class Submission:
    """One submission of a run; that of a grid names its members, each of which has a record too.

    Attributes:
        job: Number of the SLURM job or array, or the controller process of the ranks on this machine.
        cluster: "slurm" or "local".
        run: The run folder, or the grid's.
        nodes: Number of nodes.
        ranks: World size.
        command: Arguments of `launch/submit.py`.
        code: Folder of the code that the job runs.
        time: Unix time of the submission.
        member: Whether this is a member of a grid, whose command submits all of them.
        index: Index of this member in the job array, if they are one.
        members: For a grid, the log folder of each member by its index in the array.
        logs: Folder of the ranks' output, if that is not the folder of this record.
        directory: Working directory of the command, to which its paths are relative.
        host: Machine on which the command was given.
    """

    job: str
    cluster: str
    run: str
    nodes: int
    ranks: int
    command: list[str]
    code: str = ""
    time: float = field(default_factory=time.time)
    member: bool = False
    index: str | None = None
    members: dict[str, str] = field(default_factory=dict)
    logs: str = ""
    directory: str = field(default_factory=os.getcwd)
    host: str = field(default_factory=platform.node)

    @property
    def id(self) -> str:
        """The job's number as squeue, scancel and submitit's files use it."""
        return self.job if self.index is None else f"{self.job}_{self.index}"

    def write(self, folder: Path) -> None:
        """Write the record into a log folder, atomically.

        Raises:
            UserError: The folder cannot be written.
        """
        path = folder / SUBMISSION
        try:
            with atomic_write(path) as file:
                file.write((json.dumps(asdict(self), indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None


@dataclass(frozen=True)
class SubmissionRecord:
    """A submission and its log folder."""

    folder: Path
    submission: Submission

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return Path(self.submission.logs) if self.submission.logs else self.folder

    def log(self, rank: int, kind: str = "out") -> Path:
        """Return the file of a rank's output ("out") or errors ("err")."""
        return self.logs / f"{self.submission.id}_{rank}_log.{kind}"

    def result(self, rank: int) -> Path:
        """Return the file in which submitit records a rank's result, or why it failed to start."""
        return self.logs / f"{self.submission.id}_{rank}_result.pkl"


def submissions(run: Path) -> list[SubmissionRecord]:
    """Return the submissions of a run or grid, oldest first, without unreadable ones."""
    records = [
        SubmissionRecord(path.parent, record) for path in run.glob(f"logs/*/{SUBMISSION}") if (record := _read(path))
    ]
    return sorted(records, key=lambda each: (each.submission.time, each.folder.name))


def newest(run: Path) -> SubmissionRecord | None:
    """Return the last submission of a run or grid; None if there is none."""
    return (submissions(run) or [None])[-1]  # type: ignore[list-item]


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job: SLURM restarts a requeued job under the same number.

    Attributes:
        restart: Restart count; 0 for the first attempt.
        began: Unix time of its beginning; 0 if that was not written.
        hosts: Nodes.
        ended: Unix time of its end; None while it runs, or if its node was lost.
        code: Exit code of srun.
        requeued: Whether the job is restarted.
        why: Explanation for people.
        cause: One of done, saved, killed, failed, mistake, cancelled and slurm.
        began_step: Step of the newest complete checkpoint at its beginning; -1 for none.
        step: The same at its end; None if that was not written.
        errors: Size of the batch script's error log at its beginning, in bytes.
    """

    restart: int
    began: float = 0.0
    hosts: Sequence[str] = ()
    ended: float | None = None
    code: int | None = None
    requeued: bool = False
    why: str = ""
    cause: str = ""
    began_step: int = -1
    step: int | None = None
    errors: int = 0


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts of a log folder's job, in order; none for a job of this machine, which is never requeued."""
    by_restart: dict[int, dict[str, Any]] = {}
    path = folder / ATTEMPTS
    with contextlib.suppress(OSError):
        for record in read_records(path if path.exists() else folder / _OLD_ATTEMPTS):
            restart = record.get("restart")
            if isinstance(restart, int):
                by_restart[restart] = by_restart.get(restart, {}) | record
    known = {each.name for each in fields(Attempt)}
    return [
        Attempt(**{name: value for name, value in values.items() if name in known})
        for _, values in sorted(by_restart.items())
    ]


def ended_for_good(attempts: Sequence[Attempt]) -> bool:
    """Return whether the last attempt has ended and the job is not restarted."""
    return bool(attempts) and attempts[-1].ended is not None and not attempts[-1].requeued


def restarts(run: Path) -> int:
    """Return how often a run was restarted, by SLURM or by hand."""
    begun = 0
    for each in submissions(run):
        begun += len(read_attempts(each.folder)) or any(each.folder.glob("rank*.json"))
    return max(0, begun - 1)


def _read(path: Path) -> Submission | None:
    try:
        values = json.loads(path.read_bytes())
        known = {each.name for each in fields(Submission)}
        return Submission(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
