"""How a run stands, from its folder and from what SLURM says of its job, where there is one."""

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Status
from launch.record import Attempt, Recorded, attempts, ended_for_good, newest, restarts
from launch.slurm.client import Queued, find, in_queue
from launch.status.failure import Failure, current_restart, exit_codes, failure_of, first_failure
from launch.status.follow import Controller
from shards.errors import UserError
from toolkit.config.load import SAVED, read_yaml

LOG, RECALL = "log.jsonl", "recall.json"
_NOT_RUNS = ("checkpoints", "code", "export", "logs", "profile", "wandb")  # folders of a run that hold none
_CHUNK = 2**16
_FURTHEST = 2**23  # bytes of a log that are searched backwards for the last evaluation
_WORDS = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "PREEMPTED": "stopped",
    "TIMEOUT": "failed",
    "FAILED": "failed",
    "NODE_FAIL": "failed",
    "BOOT_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "DEADLINE": "failed",
}
ENDED = ("done", "failed", "cancelled", "stopped")


@dataclass
class RunState:
    """How a run stands.

    Attributes:
        run: Its folder.
        recorded: Its last submission; None where it was not begun by `launch/submit.py`.
        state: waiting, running, ending, done, failed, cancelled, stopped (and saved), or unknown.
        reason: Why it waits or ended; empty where there is nothing to say.
        step: Optimizer steps done.
        steps: Of how many.
        eta: Seconds to the end of the training at the pace of the last records.
        seen: When a rank last wrote to the log, in seconds since 1970.
        restarts: How often it was begun again.
        dev: The last evaluation on dev, as in the log.
        final: The evaluation at the end, as in recall.json, once the run is done.
        failure: The rank that failed first.
    """

    run: Path
    recorded: Recorded | None
    state: str
    reason: str
    step: int | None
    steps: int | None
    eta: float | None
    seen: float | None
    restarts: int
    dev: dict[str, Any] | None
    final: dict[str, Any] | None
    failure: Failure | None

    @property
    def recall(self) -> float | None:
        """Mean R@1 of the last evaluation, in per cent."""
        report = self.final or self.dev or {}
        return (report.get("reranked") or report.get("coarse") or {}).get("mean_R@1")

    @property
    def log(self) -> Path | None:
        """Rank 0's output."""
        return self.recorded.log(0) if self.recorded else None


def find_runs(folder: Path) -> list[Path]:
    """The run that a folder is, or the runs in it and in the grids in it.

    Raises:
        UserError: There is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run folder, or one that holds some")
    found = [folder] if is_run(folder) else list(_runs_below(folder, 2))
    if not found:
        raise UserError(f"{folder} is no run folder and holds none")
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, not of a grid or of several runs."""
    if (folder / SAVED).is_file() or (folder / LOG).is_file():
        return True
    last = newest(folder)
    return last is not None and not last.submission.members


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    for below in sorted(folder.iterdir()):
        if below.is_dir() and below.name not in _NOT_RUNS and not below.name.startswith("."):
            if is_run(below):
                yield below
            elif depth > 1:
                yield from _runs_below(below, depth - 1)


def look(runs: Collection[Path]) -> list[RunState]:
    """How runs stand; SLURM is asked once for all of them."""
    last = {run: newest(run) for run in runs}
    jobs = find(_slurm_jobs(last.values()))
    return [_look_at(run, last[run], jobs) for run in runs]


def check_idle(runs: Collection[Path]) -> str:
    """Make sure that no job waits or runs for any of these runs: two would end one another.

    Raises:
        UserError: There is one.
    """
    last = {run: recorded for run in runs if (recorded := newest(run))}
    jobs = in_queue(_slurm_jobs(last.values())) or {}
    for run, recorded in last.items():
        queued = jobs.get(recorded.submission.id)
        if queued or _runs_here(recorded):
            told = f"job {recorded.submission.id} is {_word(queued) if queued else 'running'}"
            raise UserError(f"{run}: {told}: python launch/runs.py cancel {run} ends it, follow shows it")
    return "none waits or runs"


def _slurm_jobs(last: Iterable[Recorded | None]) -> set[str]:
    return {each.submission.id for each in last if each and each.submission.cluster == "slurm"}


def _runs_here(recorded: Recorded) -> bool:
    """Is it a job of this machine, and under way?"""
    return _is_here(recorded) and not Controller(recorded.submission.job, recorded.folder).done()


def _is_here(recorded: Recorded) -> bool:
    return recorded.submission.cluster == "local" and recorded.submission.host == os.uname().nodename


def _word(queued: Queued) -> str:
    return _WORDS.get(queued.state, queued.state.lower())


def _look_at(run: Path, recorded: Recorded | None, jobs: dict[str, Queued]) -> RunState:
    steps = _steps(run, recorded)
    records = list(_last_records(run / LOG))
    step = max((record["step"] for record in records), default=None)
    state, reason = ("unknown", "not begun by launch/submit.py")
    failure = None
    if recorded:
        state, reason, failure = _job_state(recorded, jobs.get(recorded.submission.id))
    elif step is not None and step == steps:
        state, reason = "done", ""
    final = _json(run / RECALL) if state == "done" else None
    return RunState(
        run=run,
        recorded=recorded,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        eta=_eta(records, steps) if state == "running" else None,
        seen=(run / LOG).stat().st_mtime if (run / LOG).is_file() else None,
        restarts=restarts(run),
        dev=_last_evaluation(run / LOG),
        final=final,
        failure=failure,
    )


def _job_state(recorded: Recorded, queued: Queued | None) -> tuple[str, str, Failure | None]:
    """State, reason and failure of a submission's job."""
    folder, submission = recorded.folder, recorded.submission
    lives = attempts(folder)
    restart = current_restart(folder, submission.ranks, lives[-1].restart if lives else 0)
    codes = exit_codes(folder, submission.ranks, restart)
    if all(code == 0 for code in codes):
        return "done", "", None
    if queued and queued.alive:
        again = lives[-1].why if lives and lives[-1].requeued and queued.state == "PENDING" else ""
        reason = ", ".join(filter(None, [again, queued.reason]))
        return _word(queued), reason, None
    if _runs_here(recorded):
        return "running", "", None
    gone = queued is not None or _is_here(recorded) or ended_for_good(lives)
    rank = first_failure(folder, submission.id, submission.ranks, lambda pid: False, gone, restart, recorded.logs)
    failure = None if rank is None else failure_of(folder, submission.id, rank, restart, recorded.logs)
    if gone:
        return _ended(lives, queued, failure)
    return _from_the_folder(recorded, lives, failure)


def _ended(lives: list[Attempt], queued: Queued | None, failure: Failure | None) -> tuple[str, str, Failure | None]:
    """State of a job that is gone: in the words of its last incarnation, of SLURM, or of the rank that failed."""
    last = lives[-1] if lives and lives[-1].ended is not None else None
    stopped = failure is not None and failure.code == os.EX_TEMPFAIL
    cancelled = (last is not None and last.cause == "cancelled") or (queued is not None and queued.state == "CANCELLED")
    by_slurm = queued.state.lower() if queued and queued.state != "FAILED" else ""  # which the state says already
    reason = (last and last.why) or by_slurm or (failure.how if failure else "")
    if cancelled:
        return "cancelled", reason, None
    if stopped or (last and last.cause == "saved"):
        return "stopped", reason, None
    return "failed", failure.how if failure and failure.code is not None else reason, failure


def _from_the_folder(
    recorded: Recorded, lives: list[Attempt], failure: Failure | None
) -> tuple[str, str, Failure | None]:
    """State of a job of which nothing is known but what it wrote: SLURM is not here, or another machine runs it."""
    if lives and lives[-1].ended is not None:
        return "waiting", lives[-1].why, None
    if failure is not None and not lives:
        return "failed", failure.how, failure
    begun = any(Status(recorded.folder, rank).read() for rank in range(recorded.submission.ranks))
    return ("running", "by its folder alone", None) if begun else ("waiting", "by its folder alone", None)


def _steps(run: Path, recorded: Recorded | None) -> int | None:
    """Steps of the whole training, from the run's configuration or from that of its submission."""
    for path in [run / SAVED, *([recorded.folder / "config.yaml"] if recorded else [])]:
        if path.is_file():
            with contextlib.suppress(UserError):
                steps = (read_yaml(path).get("training") or {}).get("steps")
                return steps if isinstance(steps, int) else None
    return None


def _last_records(log: Path) -> Iterator[dict[str, Any]]:
    """The last records of training steps, in order; few, but enough for a pace."""
    for record in next(_backwards(log), []):
        if isinstance(record.get("step"), int) and "seconds" in record:
            yield record


def _last_evaluation(log: Path) -> dict[str, Any] | None:
    for records in _backwards(log):
        for record in reversed(records):
            if isinstance(record.get("dev"), dict):
                return record["dev"] | {"step": record.get("step")}
    return None


def _backwards(log: Path) -> Iterator[list[dict[str, Any]]]:
    """The records of a log in pieces from its end, which may be in the middle of a line; each piece in order."""
    try:
        with log.open("rb") as file:
            size = end = file.seek(0, os.SEEK_END)
            rest = b""
            while end > 0 and size - end < _FURTHEST:
                begin = max(0, end - _CHUNK)
                file.seek(begin)
                text = file.read(end - begin) + rest
                cut = 0 if begin == 0 else text.find(b"\n") + 1 or len(text)
                rest, whole = text[:cut], text[cut:]
                yield [record for line in whole.splitlines() if (record := _record(line))]
                end = begin
    except OSError:
        return


def _record(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None
    return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return _record(path.read_bytes())
    except OSError:
        return None


def _eta(records: list[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds that the remaining steps take at the pace since the last restart that the records show."""
    since = len(records)
    while since > 1 and records[since - 2]["step"] < records[since - 1]["step"]:
        since -= 1
    recent = records[max(0, since - 1) :][-20:]
    if steps is None or len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]) * (steps - last["step"])


def age(moment: float) -> float:
    """Seconds since a moment of a file's time."""
    return max(0.0, time.time() - moment)
