"""Requeue logic of the batch script: records each attempt of a job and decides whether to restart it.

`python launch/slurm/requeue.py FOLDER begin` and `python launch/slurm/requeue.py FOLDER CODE` are lines of the batch
script. They append two lines for each attempt to `FOLDER/attempts.jsonl`, and requeue the job if `decide` says so:

    {"restart": 1, "began": ..., "hosts": ["node1"], "job": "17", "began_step": 400, "errors": 3120}
    {"restart": 1, "ended": ..., "code": 75, "requeued": true, "why": "...", "cause": "saved", "step": 600}

Times are Unix times; steps are those of the newest complete checkpoint, -1 for none; errors is the size of the script's
error log, which grows from one attempt to the next. A job that SLURM itself restarts (its node was lost, an operator
asked for it) is not requeued a second time.

`python launch/slurm/requeue.py FOLDER guard SHELL` runs in the background and makes sure that the end of the
attempt is recorded when SLURM ends a job whose ranks hang.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.job import Status, restart_count
from launch.record import ATTEMPTS, MEMBERS, Attempt, read_attempts
from launch.slurm.client import SlurmJobState, host_names, job_state, kill_wait, requeue_job
from launch.status.failure import Failure, last_line, last_lines
from shards.errors import ExitCode
from shards.logs import setup_logging

logger = logging.getLogger(__name__)

_MAX_KILLED = 3  # requeues in a row of a job whose ranks are killed without a new checkpoint
_MAX_SAVED = 20  # requeues in a row of a job that is stopped by a signal
_GRACE_SHARE = 0.6  # of the time from SLURM's TERM to its KILL, which the ranks have before srun is killed
_LOG_TAIL = 2**18  # bytes of the script's error log that are read
_EXITED = re.compile(r"^srun: error: \S+ tasks? ([\d,-]+): Exited with exit code (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class RestartDecision:
    """Whether a job is restarted, and why.

    Attributes:
        cause: done, saved (stopped by a signal), killed, failed, mistake, cancelled, or slurm (SLURM requeues
            it itself).
        requeue: Whether this script has to requeue the job.
        why: Explanation for people.
    """

    cause: str
    requeue: bool
    why: str


def setup_lines(folder: Path, python: str, code: Path) -> list[str]:
    """Return lines of bash for the beginning of a batch script, before srun.

    The shell survives the signals by which SLURM ends the job, so that it can record how the ranks ended.

    Args:
        folder: Log folder of the submission, as the nodes see it.
        python: Interpreter.
        code: Folder of the packages that the job runs.
    """
    call = shlex.join([python, str(code / "launch" / "slurm" / "requeue.py"), str(folder)])
    return [
        f"end_of_attempt() {{ code=$?; kill -KILL $guard 2>/dev/null; {call} $code; exit $code; }}",
        f"{call} guard $$ & guard=$!; disown",
        "trap end_of_attempt EXIT",
        "trap : TERM USR1 USR2",
        f"{call} begin",
    ]


def main(arguments: list[str]) -> None:
    """Run one of the batch script's commands."""
    setup_logging(rank=0)
    logs, command = Path(arguments[0]), arguments[1]
    folder = member_folder(logs, os.environ)
    if command == "guard":
        guard(int(arguments[2]))
    elif command == "begin":
        begin(folder, os.environ, logs)
    else:
        end(folder, int(command), os.environ, logs)


def member_folder(folder: Path, environment: Mapping[str, str]) -> Path:
    """Return the log folder of this job, which for a member of a job array is the member's."""
    index = environment.get("SLURM_ARRAY_TASK_ID")
    return Path(json.loads((folder / MEMBERS).read_text())[index]) if index else folder


def guard(shell: int) -> None:
    """Kill srun before SLURM kills everything: its ranks may hang.

    The batch script waits for srun, and would be killed while it waits, with nothing recorded and no requeue.

    Args:
        shell: Process of the batch script.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    seconds = kill_wait()
    signal.sigwait({signal.SIGTERM})
    time.sleep(_GRACE_SHARE * seconds)
    subprocess.run(["pkill", "-KILL", "-x", "-P", str(shell), "srun"])


def begin(folder: Path, environment: Mapping[str, str], logs: Path | None = None) -> None:
    """Record that an attempt begins, and the end of one that could not record it. Arguments as of `end`."""
    restart, step = restart_count(environment), newest_step(folder)
    if (earlier := read_attempts(folder)) and earlier[-1].ended is None:
        decision = RestartDecision("slurm", False, "ended with its node or by SLURM, which restarted the job")
        _write_end(folder, earlier[-1].restart, None, decision, True)
    hosts = host_names(environment.get("SLURM_JOB_NODELIST", ""))
    record = {"restart": restart, "began": time.time(), "hosts": hosts, "job": job_id(environment), "began_step": step}
    log = _error_log(logs or folder, environment)
    _append(folder, {**record, "errors": log.stat().st_size if log.is_file() else 0})


def end(folder: Path, code: int, environment: Mapping[str, str], logs: Path | None = None) -> None:
    """Record how an attempt ended, and requeue the job if `decide` says so.

    Args:
        folder: Log folder of the job.
        code: Exit code of srun: the greatest of its ranks'.
        environment: Environment of the batch script.
        logs: Folder of the ranks' output, where that is another one.
    """
    restart, job = restart_count(environment), job_id(environment)
    state = job_state(job)
    exits = rank_exits(folder, restart)
    failed_start = _record_failed_starts(folder, code, exits.keys(), environment, logs or folder)
    decision = decide(
        code, list(exits.values()), state, restart, _causes_without_progress(folder, restart), failed_start
    )
    by_slurm = state is not None and state.restarts > restart
    # Written first: with the requeue SLURM ends this process too.
    _write_end(folder, restart, code, decision, decision.requeue or by_slurm)
    logger.info("attempt %d ended with exit code %d: %s", restart, code, decision.why)
    if decision.requeue and (error := requeue_job(job)) is not None:
        refused = RestartDecision(decision.cause, False, f"{decision.why}, but SLURM refused: {error}")
        _write_end(folder, restart, code, refused, False)


def decide(
    code: int,
    exits: list[int | None],
    state: SlurmJobState | None,
    restart: int,
    causes: list[str] | None,
    failed_start: str | None = None,
) -> RestartDecision:
    """Decide whether a job is restarted.

    Args:
        code: Exit code of srun.
        exits: Exit codes that the ranks recorded; None for one that was killed.
        state: State of the job in SLURM; None if the controller does not answer.
        restart: Restart count of this attempt.
        causes: Causes of the attempts before this one since the last that wrote a checkpoint; None if this one did.
        failed_start: How a rank failed before it began; None if all began or were killed before that.
    """
    if state and state.restarts > restart:
        return RestartDecision("slurm", False, "SLURM restarts it: an operator, a preemption or a lost node")
    if code == 0:
        return RestartDecision("done", False, "complete")
    if state and state.state != "RUNNING" and state.reason != "TimeLimit":
        return RestartDecision("cancelled", False, "cancelled: no restart")
    recorded = [each for each in exits if each is not None]
    if failed_start and not any(map(_is_error, recorded)):
        return RestartDecision("failed", False, f"{failed_start}: no restart")
    recorded = recorded or [code]
    if failures := list(filter(_is_error, recorded)):
        if ExitCode.USER_ERROR in failures:
            return RestartDecision(
                "mistake", False, f"an error that the user has to fix (exit code {ExitCode.USER_ERROR:d}): no restart"
            )
        return RestartDecision("failed", False, f"a rank failed with exit code {failures[0]}: no restart")
    # One of several ranks that save together may be killed by srun before it records its exit code; but without a new
    # checkpoint it did not save.
    saved = ExitCode.REQUEUE in recorded and (None not in exits or causes is None)
    cause, limit = ("saved", _MAX_SAVED) if saved else ("killed", _MAX_KILLED)
    how = "stopped by a signal" if saved else "a rank was killed or hung"
    if (causes or []).count(cause) >= limit:
        return RestartDecision(cause, False, f"{how}; {limit} restarts in a row wrote no new checkpoint: no restart")
    return RestartDecision(cause, True, f"{how}: restarting")


def _is_error(code: int) -> bool:
    """Whether a process failed by itself: neither killed nor stopped, nor because of another rank."""
    if code in (0, ExitCode.PEER_LOST, ExitCode.REQUEUE, ExitCode.TRANSIENT):
        return False
    return code < 128 or code == ExitCode.INTERRUPTED


def job_id(environment: Mapping[str, str]) -> str:
    """Return the job's number; for a member of a job array ARRAY_INDEX: SLURM numbers one of them as the array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def newest_step(folder: Path) -> int:
    """Return the step of the run's newest complete checkpoint; -1 for none. The run folder is two above the logs."""
    complete = folder.parent.parent.glob("checkpoints/step-*/progress.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in complete), default=-1)


def rank_exits(folder: Path, restart: int) -> dict[int, int | None]:
    """Return the exit codes that the ranks of an attempt recorded, by rank; without those that did not begin."""
    ranks = [int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.json")]
    statuses = {rank: Status(folder, rank).read() for rank in sorted(ranks)}
    return {
        rank: status["exit"]
        for rank, status in statuses.items()
        if status is not None and status.get("restart", 0) == restart
    }


def srun_exits(text: str) -> dict[int, int]:
    """Return the exit codes of the ranks that ended by themselves, by rank, from srun's messages.

    srun's own exit code is the greatest of all, so that the codes of ranks that it kills hide the first failure.

    Args:
        text: Output of srun, with lines such as "srun: error: node1: tasks 0-1,3: Exited with exit code 1".
    """
    codes: dict[int, int] = {}
    for tasks, code in _EXITED.findall(text):
        for part in filter(None, tasks.split(",")):
            first, _, last = part.partition("-")
            codes |= dict.fromkeys(range(int(first), int(last or first) + 1), int(code))
    return codes


def _record_failed_starts(
    folder: Path, code: int, begun: Collection[int], environment: Mapping[str, str], logs: Path
) -> str | None:
    """Write the status of ranks that failed before they could: Python or the packages are missing on the node.

    Returns:
        How the first of them ended; None if there is none.
    """
    restart = restart_count(environment)
    errors = _errors(folder, restart, _error_log(logs, environment))
    # Before a rank begins, 255 comes from the container runtime.
    failed = {rank: each for rank, each in srun_exits(errors).items() if _is_error(each) or each == ExitCode.CONTAINER}
    not_begun = {rank: failed[rank] for rank in sorted(failed.keys() - begun)}
    try:
        for rank, each in not_begun.items():
            Status(folder, rank).write_failed_start(each, restart)
    except OSError as error:
        logger.warning("%s: a rank's status was not written: %s", folder, error.strerror)
    if not_begun:
        rank = min(not_begun)
        log = _error_log(logs, environment, rank)
        return Failure(rank, not_begun[rank], last_lines(log), log, began=False).how
    if not begun and _is_error(code):
        return f"no rank began, srun ended with exit code {code}: {last_line(errors.splitlines())}".removesuffix(": ")
    return None


def _error_log(logs: Path, environment: Mapping[str, str], rank: int = 0) -> Path:
    """Return the file of a rank's errors; that of rank 0 has the batch script's, and so srun's, as well."""
    return logs / f"{job_id(environment)}_{rank}_log.err"


def _errors(folder: Path, restart: int, log: Path) -> str:
    """Return what an attempt wrote to the batch script's error log; empty if that is unknown."""
    attempts = read_attempts(folder)
    if not attempts or attempts[-1].restart != restart:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(attempts[-1].errors, file.seek(0, os.SEEK_END) - _LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _causes_without_progress(folder: Path, restart: int) -> list[str] | None:
    """Return causes of the attempts before this one since the last that wrote a checkpoint; None if this one did."""
    causes, newest = [], newest_step(folder)

    def progressed(attempt: Attempt) -> bool:
        return (newest if attempt.step is None else attempt.step) > attempt.began_step

    for attempt in reversed(read_attempts(folder)):
        if attempt.restart == restart:
            if progressed(attempt):
                return None
        elif progressed(attempt):
            break
        else:
            causes.append(attempt.cause)
    return causes


def _write_end(folder: Path, restart: int, code: int | None, decision: RestartDecision, requeued: bool) -> None:
    record = {"restart": restart, "ended": time.time(), "code": code, "requeued": requeued}
    _append(folder, {**record, "why": decision.why, "cause": decision.cause, "step": newest_step(folder)})


def _append(folder: Path, record: dict[str, Any]) -> None:
    """Append a record; a full disk does not prevent a restart."""
    try:
        with (folder / ATTEMPTS).open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("%s was not written: %s", folder / ATTEMPTS, error.strerror)


if __name__ == "__main__":
    main(sys.argv[1:])
