"""State of a run, from its folder and from SLURM's record of its job, if there is one."""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Status
from launch.record import Attempt, SubmissionRecord, ended_for_good, newest, read_attempts, restarts
from launch.slurm.client import SlurmJob, find_jobs, queued_jobs
from launch.status.failure import Failure, current_restart, exit_codes, failure_of, first_failure
from launch.status.follow import Controller
from shards.errors import ExitCode, UserError
from shards.files import read_object
from toolkit.config.load import SAVED
from toolkit.config.yaml_files import read_yaml
from toolkit.run_folder import LOG, RECALL, runs_below

_CHUNK = 2**16
_SEARCH_LIMIT = 2**23  # bytes of a log that are searched backwards for the last evaluation
_STATES = {
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

FROM_FILES = "from the run's files; SLURM is not queried"  # reason where the state is not known better


@dataclass
class RunState:
    """State of a run.

    Attributes:
        run: Run folder.
        recorded: Last submission; None if the run was not started by `launch/submit.py`.
        state: waiting, running, ending, done, failed, cancelled, stopped (and saved), or unknown.
        reason: Why it waits or ended; may be empty.
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        eta: Seconds to the end of the training at the pace of the last records.
        last_log: Unix time of the last write to the log.
        restarts: Number of restarts.
        dev: Last evaluation on dev, as in the log.
        final: Evaluation at the end, as in recall.json, once the run is done.
        failure: Failure of the rank that failed first.
    """

    run: Path
    recorded: SubmissionRecord | None
    state: str
    reason: str
    step: int | None
    steps: int | None
    eta: float | None
    last_log: float | None
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
    """Return the run folder itself, or the runs in it and in the grids in it.

    Raises:
        UserError: There is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder, or a folder of runs")
    runs = [folder] if is_run(folder) else list(runs_below(folder, is_run))
    if not runs:
        raise UserError(f"{folder} is not a run folder and contains none")
    return runs


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, not of a grid or of several runs."""
    if (folder / SAVED).is_file() or (folder / LOG).is_file():
        return True
    last = newest(folder)
    return last is not None and not last.submission.members


def run_states(runs: Collection[Path]) -> list[RunState]:
    """Return the state of each run; SLURM is queried once for all of them."""
    last = {run: newest(run) for run in runs}
    jobs = find_jobs(_slurm_jobs(last.values()))
    return [_run_state(run, last[run], jobs) for run in runs]


def check_idle(runs: Collection[Path]) -> str:
    """Check that none of these runs has a pending or running job: a second job would abort the first.

    Returns:
        A line for the dry run.

    Raises:
        UserError: One has.
    """
    last = {run: recorded for run in runs if (recorded := newest(run))}
    jobs = queued_jobs(_slurm_jobs(last.values())) or {}
    for run, recorded in last.items():
        queued = jobs.get(recorded.submission.id)
        if queued or _runs_here(recorded):
            state = f"job {recorded.submission.id} is {_state_name(queued) if queued else 'running'}"
            raise UserError(f"{run}: {state}: python launch/runs.py cancel {run} ends it, follow shows it")
    return "none pending or running"


def _slurm_jobs(last: Iterable[SubmissionRecord | None]) -> set[str]:
    return {each.submission.id for each in last if each and each.submission.cluster == "slurm"}


def _runs_here(recorded: SubmissionRecord) -> bool:
    """Return whether it is a job of this machine that has not ended."""
    return _is_here(recorded) and not Controller(recorded.submission.job, recorded.folder).done()


def _is_here(recorded: SubmissionRecord) -> bool:
    return recorded.submission.cluster == "local" and recorded.submission.host == os.uname().nodename


def _state_name(job: SlurmJob) -> str:
    return _STATES.get(job.state, job.state.lower())


def _run_state(run: Path, recorded: SubmissionRecord | None, jobs: dict[str, SlurmJob]) -> RunState:
    steps = _steps(run, recorded)
    records = list(_last_records(run / LOG))
    step = max((record["step"] for record in records), default=None)
    state, reason = ("unknown", "not started by launch/submit.py")
    failure = None
    if recorded:
        state, reason, failure = _job_state(recorded, jobs.get(recorded.submission.id))
    elif step is not None and step == steps:
        state, reason = "done", ""
    final = read_object(run / RECALL) or None if state == "done" else None
    return RunState(
        run=run,
        recorded=recorded,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        eta=_eta(records, steps) if state == "running" else None,
        last_log=(run / LOG).stat().st_mtime if (run / LOG).is_file() else None,
        restarts=restarts(run),
        dev=_last_evaluation(run / LOG),
        final=final,
        failure=failure,
    )


def _job_state(recorded: SubmissionRecord, job: SlurmJob | None) -> tuple[str, str, Failure | None]:
    """Return state, reason and failure of a submission's job."""
    attempts = read_attempts(recorded.folder)
    restart = current_restart(recorded, attempts)
    if all(code == 0 for code in exit_codes(recorded, restart)):
        return "done", "", None
    if job and job.alive:
        restarting = attempts[-1].why if attempts and attempts[-1].requeued and job.state == "PENDING" else ""
        reason = ", ".join(filter(None, [restarting, job.reason]))
        return _state_name(job), reason, None
    if _runs_here(recorded):
        return "running", "", None
    gone = job is not None or _is_here(recorded) or ended_for_good(attempts)
    rank = first_failure(recorded, lambda pid: False, gone, restart)
    failure = None if rank is None else failure_of(recorded, rank, restart)
    if gone:
        return _ended_state(attempts, job, failure)
    return _state_from_folder(recorded, attempts, failure)


def _ended_state(
    attempts: list[Attempt], job: SlurmJob | None, failure: Failure | None
) -> tuple[str, str, Failure | None]:
    """Return the state of a job that has ended, by its last attempt, by SLURM, or by the rank that failed."""
    last = attempts[-1] if attempts and attempts[-1].ended is not None else None
    stopped = failure is not None and failure.code == ExitCode.REQUEUE
    cancelled = (last is not None and last.cause == "cancelled") or (job is not None and job.state == "CANCELLED")
    by_slurm = job.state.lower() if job and job.state != "FAILED" else ""  # the state is "failed" already
    reason = (last and last.why) or by_slurm or (failure.how if failure else "")
    if cancelled:
        return "cancelled", reason, None
    if stopped or (last and last.cause == "saved"):
        return "stopped", reason, None
    if failure is None or failure.code is None:
        return "failed", reason, failure
    limited = last is not None and last.cause in ("saved", "killed")  # the restarts' limit says more than a code
    return "failed", f"{failure.how}; {reason}" if limited else failure.how, failure


def _state_from_folder(
    recorded: SubmissionRecord, attempts: list[Attempt], failure: Failure | None
) -> tuple[str, str, Failure | None]:
    """Return the state by the job's files alone: SLURM is not on this machine, or another machine runs the job."""
    if attempts and attempts[-1].ended is not None:
        return "waiting", attempts[-1].why, None
    if failure is not None and not attempts:
        return "failed", failure.how, failure
    begun = any(Status(recorded.folder, rank).read() for rank in range(recorded.submission.ranks))
    return ("running", FROM_FILES, None) if begun else ("waiting", FROM_FILES, None)


def _steps(run: Path, recorded: SubmissionRecord | None) -> int | None:
    """Return the steps of the training, from the run's configuration or that of its submission."""
    for path in [run / SAVED, *([recorded.folder / "config.yaml"] if recorded else [])]:
        if path.is_file():
            with contextlib.suppress(UserError):
                steps = (read_yaml(path).get("training") or {}).get("steps")
                return steps if isinstance(steps, int) else None
    return None


def _last_records(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the last records of training steps, in order: enough of them to estimate the pace."""
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
    """Yield the records of a log in chunks from its end, where a line may be unfinished; each chunk in order."""
    try:
        with log.open("rb") as file:
            size = end = file.seek(0, os.SEEK_END)
            rest = b""
            while end > 0 and size - end < _SEARCH_LIMIT:
                begin = max(0, end - _CHUNK)
                file.seek(begin)
                text = file.read(end - begin) + rest
                cut = 0 if begin == 0 else text.find(b"\n") + 1 or len(text)
                rest, complete = text[:cut], text[cut:]
                yield [record for line in complete.splitlines() if (record := _record(line))]
                end = begin
    except OSError:
        return


def _record(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None
    return None


def _eta(records: list[dict[str, Any]], steps: int | None) -> float | None:
    """Estimate the seconds of the remaining steps at the pace since the last restart in the records."""
    since = len(records)
    while since > 1 and records[since - 2]["step"] < records[since - 1]["step"]:
        since -= 1
    recent = records[max(0, since - 1) :][-20:]
    if steps is None or len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]) * (steps - last["step"])
