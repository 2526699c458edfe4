"""The lease of a run folder: who may write to it. Whoever comes last has it; the one before notices, and ends.

A job that was taken for dead and started again may still be alive somewhere. Needs no locks, which shared disks do not
all have: the holder's token is read again before each batch of writes.
"""

import contextlib
import json
import os
import platform
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import atomic_write

_FILE = "lease.json"


@dataclass(frozen=True)
class Lease:
    """This run's right to write to its folder.

    Attributes:
        run: The run folder.
        token: What the lease's file holds as long as nobody else has taken it.
    """

    run: Path
    token: str

    def check(self) -> None:
        """To be called on rank 0 before it writes.

        Raises:
            UserError: Another process has the folder now.
        """
        there = _read(self.run)
        if there.get("token") != self.token:
            who = f"process {there['pid']} on {there['host']}, {there['time']}," if there else "removal of its lease"
            raise UserError(
                f"run folder {self.run} was taken over by {who} while this run was under way: this one ends here and "
                "writes nothing more"
            )

    def release(self) -> None:
        """Say that nobody writes any more. The token stays: a process from before is still to notice."""
        there = _read(self.run)
        if there.get("token") == self.token:
            with contextlib.suppress(OSError):
                _write(self.run, there | {"released": True})


def take(run: Path) -> Lease:
    """Take the lease of a run folder from whoever had it; to be called by one process.

    Raises:
        UserError: Who has it is alive on this machine, or the folder cannot be written. A process of another machine
            cannot be seen: it loses the lease. So does one of this SLURM job before it was started again.
    """
    there = _read(run)
    mine = there.get("host") == platform.node() and there.get("pid") == os.getpid()
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    former = bool(job) and there.get("job") == job and there.get("restart") != restart
    if there and not there.get("released") and not mine and not former and _runs_here(there):
        raise UserError(
            f"run folder {run} is in use by process {there['pid']} of this machine since {there['time']}: wait for it "
            "or end it, or name another folder with --run DIR"
        )
    token = uuid.uuid4().hex
    holder = {
        "host": platform.node(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "job": job,
        "restart": restart,
        "token": token,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        _write(run, holder)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be written: {error.strerror}; name another with --run DIR") from None
    return Lease(run, token)


def _read(run: Path) -> dict[str, Any]:
    """The lease as it stands; empty without one, or with one that is damaged."""
    try:
        there = json.loads((run / _FILE).read_bytes())
        return there if {"host", "pid", "token", "time"} <= there.keys() else {}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def _write(run: Path, holder: dict[str, Any]) -> None:
    with atomic_write(run / _FILE) as file:
        file.write(json.dumps(holder, indent=1).encode())


def _runs_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process is there; one that came later under the same number is another."""
    if holder["host"] != platform.node():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _began(int(holder["pid"])) == holder.get("began")


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; -1 of one that has ended; None where the kernel does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
