"""What is written down of each submission and of each time its job ran: `status`, `follow` and `resume` read it."""

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
from shards.files import read_records

SUBMISSION, INCARNATIONS = "submission.json", "incarnations.jsonl"
MEMBERS = "members.json"  # of a job array: each member's own log folder by its place; there before the job is


@dataclass(frozen=True)
class Submission:
    """One submission of a run; a grid's has the members, and each member one of its own.

    Attributes:
        job: SLURM's number of the job or of the whole array, or the process that holds the ranks on this machine.
        cluster: "slurm" or "local".
        run: The run folder, or the grid's.
        nodes: Number of nodes.
        ranks: Number of ranks on all of them.
        command: Arguments of `launch/submit.py`.
        code: Folder of the code that the job runs.
        time: Of the submission, in seconds since 1970.
        member: Whether it is a member's of a grid, whose command submits all of them.
        index: Place of this member in the job array, where they are one.
        members: Log folder of each member by its place in the array; for a grid.
        logs: Folder of the ranks' output, where that is not the folder of this record.
        directory: Where the command was given: its relative paths begin there.
        host: The machine that it was given on.
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
        """The job as squeue, scancel and submitit's files name it."""
        return self.job if self.index is None else f"{self.job}_{self.index}"

    def write(self, folder: Path) -> Path:
        """Write the record into a log folder, whole or not at all.

        Raises:
            UserError: The folder cannot be written.
        """
        path = folder / SUBMISSION
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        return path


@dataclass(frozen=True)
class Recorded:
    """A submission and the log folder that it was read from."""

    folder: Path
    submission: Submission

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return Path(self.submission.logs) if self.submission.logs else self.folder

    def log(self, rank: int, kind: str = "out") -> Path:
        """A rank's output ("out") or errors ("err")."""
        return self.logs / f"{self.submission.id}_{rank}_log.{kind}"


def submissions(run: Path) -> list[Recorded]:
    """Every submission of a run or grid, oldest first; what cannot be read is passed over."""
    found = [Recorded(path.parent, record) for path in run.glob(f"logs/*/{SUBMISSION}") if (record := _read(path))]
    return sorted(found, key=lambda each: (each.submission.time, each.folder.name))


def newest(run: Path) -> Recorded | None:
    """The last submission of a run or grid; None where there is none."""
    return (submissions(run) or [None])[-1]  # type: ignore[list-item]


@dataclass(frozen=True)
class Attempt:
    """One time that a job ran: SLURM starts a requeued job again under the same number.

    Attributes:
        restart: How often it was started before.
        began: Seconds since 1970; 0 where that was not written.
        hosts: Its nodes.
        ended: The same at its end; None while it runs, or where its node was lost.
        code: How it ended.
        requeued: Whether it is to be started again.
        why: In words.
        cause: In one: done, saved, killed, failed, mistake, cancelled or slurm.
        began_step: Step of the newest complete checkpoint when it began; -1 for none.
        step: The same at its end; None where that was not written.
        errors: Bytes that the batch script's error log held when it began.
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


def attempts(folder: Path) -> list[Attempt]:
    """The times that the job of a log folder ran, first to last; none on this machine, where nothing is requeued."""
    found: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for line in read_records(folder / INCARNATIONS):
            restart = line.get("restart")
            if isinstance(restart, int):
                found[restart] = found.get(restart, {}) | line
    known = {each.name for each in fields(Attempt)}
    return [
        Attempt(**{name: value for name, value in found[restart].items() if name in known}) for restart in sorted(found)
    ]


def ended_for_good(lives: Sequence[Attempt]) -> bool:
    """Has the last incarnation ended, and none is to follow?"""
    return bool(lives) and lives[-1].ended is not None and not lives[-1].requeued


def restarts(run: Path) -> int:
    """How often a run was begun again, by SLURM or by hand."""
    begun = 0
    for each in submissions(run):
        lives = len(attempts(each.folder))
        begun += lives or any(each.folder.glob("rank*.json"))
    return max(0, begun - 1)


def _read(path: Path) -> Submission | None:
    try:
        values = json.loads(path.read_bytes())
        known = {each.name for each in fields(Submission)}
        return Submission(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
