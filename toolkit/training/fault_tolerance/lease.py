"""Single-writer lock of a run folder: the newest process owns it, older ones abort.

A job that was presumed dead and restarted may still be running. The owner's token is read again before each batch of
writes; file locks, which not all shared file systems support, are not needed. It is called a lease because it can be
lost: not at a set time, but as soon as a newer process takes it.
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
    """Ownership of a run folder."""

    run: Path
    token: str  # content of the lease file until another process takes it

    def check(self) -> None:
        """Check that this process still owns the folder; rank 0 calls this before it writes.

        Raises:
            UserError: Another process owns the folder.
        """
        owner = _read(self.run)
        if owner.get("token") != self.token:
            process = (
                f"process {owner['pid']} on {owner['host']}, {owner['time']}," if owner else "removal of its lease"
            )
            raise UserError(
                f"run folder {self.run} was taken over by {process} while this run was under way: this run ends and "
                "writes nothing more"
            )

    def release(self) -> None:
        """Mark the folder as free. The token stays, so that an older process still aborts."""
        owner = _read(self.run)
        if owner.get("token") == self.token:
            with contextlib.suppress(OSError):
                _write(self.run, owner | {"released": True})


def take(run: Path) -> Lease:
    """Take the lease of a run folder from its former owner; one process calls this.

    Raises:
        UserError: The owner runs on this machine, or the folder cannot be written. An owner on another machine loses
            the lease, and so does one of an earlier attempt of this SLURM job.
    """
    owner = _read(run)
    mine = owner.get("host") == platform.node() and owner.get("pid") == os.getpid()
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    former = bool(job) and owner.get("job") == job and owner.get("restart") != restart
    if owner and not owner.get("released") and not mine and not former and _runs_here(owner):
        raise UserError(
            f"run folder {run} is in use by process {owner['pid']} of this machine since {owner['time']}: wait for it "
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
    """Read the lease file; empty if it is missing or damaged."""
    try:
        owner = json.loads((run / _FILE).read_bytes())
        return owner if {"host", "pid", "token", "time"} <= owner.keys() else {}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def _write(run: Path, holder: dict[str, Any]) -> None:
    with atomic_write(run / _FILE) as file:
        file.write(json.dumps(holder, indent=1).encode())


def _runs_here(holder: dict[str, Any]) -> bool:
    """Return whether the owner's process runs on this machine; a later process with the same pid is another one."""
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
    """Return when a process began, in kernel ticks; -1: it has ended; None: the kernel does not provide it."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
