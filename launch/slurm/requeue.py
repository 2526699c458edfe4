"""A job between its incarnations: what its batch script does before and after the ranks, and whether it starts again.

`python launch/slurm/requeue.py FOLDER begin` and `python launch/slurm/requeue.py FOLDER CODE` are lines of the batch
script. They write `FOLDER/incarnations.jsonl`, two lines for each incarnation, and ask SLURM to requeue the job where
that is of use.
`python launch/slurm/requeue.py FOLDER guard SHELL` sees to it that the second of them is reached:

    {"restart": 1, "began": ..., "hosts": ["node1"], "job": "17", "began_step": 400, "errors": 3120}
    {"restart": 1, "ended": ..., "code": 75, "requeued": true, "why": "...", "cause": "saved", "step": 600}

Times are Unix times; steps are those of the newest complete checkpoint, -1 for none; errors is the size of the script's
error log, which grows from one incarnation to the next. A job that SLURM itself starts again (its node was lost, an
operator asked) is not requeued a second time.
"""

import json
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

from launch.job import LOST, Status, restart_count
from launch.record import INCARNATIONS, MEMBERS, attempts
from launch.status.failure import failure_of, last_line

_SAVED = os.EX_TEMPFAIL
_STALLED = 70  # toolkit.training.fault_tolerance.watchdog.STALLED, which this script, far from torch, does not import
_CRASHES = 3  # requeues in a row of a job whose ranks die without getting further
_STOPS = 20  # the same of a job that is asked to stop each time before it got further
_PATIENCE = 600.0  # seconds that SLURM's controller may take to come back
_SHARE = 0.6  # of the time from SLURM's TERM to its KILL that is left to the ranks
_READ = 2**18  # bytes of the script's error log that are looked at
_EXITED = re.compile(r"^srun: error: \S+ tasks? ([\d,-]+): Exited with exit code (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class RestartDecision:
    """What happens next, and why.

    Attributes:
        cause: done, saved (asked to stop), killed, failed, mistake, cancelled, or slurm where that requeues by itself.
        requeue: Whether this script has to ask for it.
        why: For people to read.
    """

    cause: str
    requeue: bool
    why: str


@dataclass(frozen=True)
class SlurmJobState:
    """How SLURM sees the job while its batch script ends.

    Attributes:
        state: RUNNING, unless SLURM is ending it: then COMPLETING.
        reason: TimeLimit when that was reached.
        restarts: More than this incarnation's once SLURM has decided to start the job again.
    """

    state: str
    reason: str
    restarts: int


def setup_lines(folder: Path, python: str, code: Path) -> list[str]:
    """Lines of bash for the beginning of a batch script, before srun.

    The shell outlives the signals that SLURM sends to make the job end, so that it can write down how the ranks ended.

    Args:
        folder: Of the submission's logs, as the nodes see it.
        python: The interpreter.
        code: The packages that the job runs.
    """
    call = shlex.join([python, str(code / "launch" / "slurm" / "requeue.py"), str(folder)])
    return [
        f"end_of_incarnation() {{ code=$?; kill -KILL $guard 2>/dev/null; {call} $code; exit $code; }}",
        f"{call} guard $$ & guard=$!; disown",
        "trap end_of_incarnation EXIT",
        "trap : TERM USR1 USR2",
        f"{call} begin",
    ]


def main(arguments: list[str]) -> None:
    """Do what a line of the batch script asks for."""
    logs, what = Path(arguments[0]), arguments[1]
    folder = member(logs, os.environ)
    if what == "guard":
        guard(int(arguments[2]))
    elif what == "begin":
        begin(folder, os.environ, logs)
    else:
        end(folder, int(what), os.environ, logs)


def member(folder: Path, environment: Mapping[str, str]) -> Path:
    """The folder of this job; of a job array's member, its own."""
    index = environment.get("SLURM_ARRAY_TASK_ID")
    return Path(json.loads((folder / MEMBERS).read_text())[index]) if index else folder


def guard(shell: int) -> None:
    """When SLURM makes the job end, end srun before SLURM ends everything: its ranks may hang.

    The batch script waits for srun, and would be killed while it waits, with nothing written and no requeue asked for.

    Args:
        shell: Process of the batch script.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    found = re.search(r"KillWait\s*=\s*(\d+)", shown)
    signal.sigwait({signal.SIGTERM})
    time.sleep(_SHARE * (int(found[1]) if found else 30))
    subprocess.run(["pkill", "-KILL", "-x", "-P", str(shell), "srun"])


def begin(folder: Path, environment: Mapping[str, str], logs: Path | None = None) -> None:
    """Write that an incarnation begins; of one that ended without a word, that it did. Arguments as of `end`."""
    restart, step = restart_count(environment), newest_step(folder)
    if (lives := attempts(folder)) and lives[-1].ended is None:
        fate = RestartDecision("slurm", False, "ended with its node or by SLURM, which started the job again")
        _write_end(folder, lives[-1].restart, None, fate, True)
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True).stdout.split()
    line = {"restart": restart, "began": time.time(), "hosts": names, "job": job_id(environment), "began_step": step}
    log = _error_log(logs or folder, environment)
    _append(folder, {**line, "errors": log.stat().st_size if log.is_file() else 0})


def end(folder: Path, code: int, environment: Mapping[str, str], logs: Path | None = None) -> None:
    """Write how an incarnation ended, and have the job requeued if that is of use.

    Args:
        folder: Of the job's logs.
        code: srun's exit code: the greatest of its ranks'.
        environment: Of the batch script.
        logs: The ranks' output, where that is another folder.
    """
    restart, job = restart_count(environment), job_id(environment)
    seen = look(job)
    exits = rank_exits(folder, restart)
    unbegun = _write_unbegun(folder, code, exits.keys(), environment, logs or folder)
    fate = decide(code, list(exits.values()), seen, restart, _without_progress(folder, restart), unbegun)
    by_slurm = seen is not None and seen.restarts > restart
    # Written first: with the requeue SLURM ends this process too.
    _write_end(folder, restart, code, fate, fate.requeue or by_slurm)
    print(f"incarnation {restart} ended with exit code {code}: {fate.why}", flush=True)
    if fate.requeue:
        refused = ask(["scontrol", "requeue", job])
        if refused is not None:
            _write_end(
                folder,
                restart,
                code,
                RestartDecision(fate.cause, False, f"{fate.why}, but SLURM refused: {refused}"),
                False,
            )


def decide(
    code: int,
    exits: list[int | None],
    seen: SlurmJobState | None,
    restart: int,
    idle: list[str] | None,
    unbegun: str | None = None,
) -> RestartDecision:
    """Say whether a job starts again.

    Args:
        code: srun's exit code.
        exits: What the ranks left as theirs; None where one was killed.
        seen: The job in SLURM's eyes; None if the controller does not answer.
        restart: This incarnation's number.
        idle: Causes of the former incarnations since the last that saved something; None if this one did.
        unbegun: How a rank failed before it began; None where all began, or were killed before that.
    """
    if seen and seen.restarts > restart:
        return RestartDecision("slurm", False, "SLURM starts it again: an operator, a preemption or a lost node")
    if code == 0:
        return RestartDecision("done", False, "complete")
    if seen and seen.state != "RUNNING" and seen.reason != "TimeLimit":
        return RestartDecision("cancelled", False, "cancelled: it does not start again")
    left = [each for each in exits if each is not None]
    if unbegun and not any(map(_is_error, left)):
        return RestartDecision("failed", False, f"{unbegun}: it does not start again")
    left = left or [code]
    if failures := list(filter(_is_error, left)):
        mistake = 2 in failures
        number = 2 if mistake else failures[0]
        what = "a mistake in the configuration or the data" if mistake else f"a rank failed with exit code {number}"
        return RestartDecision("mistake" if mistake else "failed", False, f"{what}: it does not start again")
    # One of ranks that save together may be ended by srun before it says so; but without a checkpoint it was killed.
    saved = _SAVED in left and (None not in exits or idle is None)
    cause, most = ("saved", _STOPS) if saved else ("killed", _CRASHES)
    how = "asked to stop" if saved else "a rank was killed or hung"
    if (idle or []).count(cause) >= most:
        return RestartDecision(
            cause, False, f"{how}; {most} restarts in a row brought no new checkpoint: it does not start again"
        )
    return RestartDecision(cause, True, f"{how}: it starts again")


def _is_error(code: int) -> bool:
    """Whether a process that left this code failed by itself: not killed or stopped, nor for another rank's sake."""
    return code not in (0, LOST, _SAVED, _STALLED) and (code < 128 or code == 130)


def look(job: str) -> SlurmJobState | None:
    """How SLURM sees a job; None if the controller stays away."""
    answer: list[str] = []
    if ask(["scontrol", "--oneliner", "show", "job", job], answer) is not None:
        return None
    fields = dict(re.findall(r"(JobState|Reason|Restarts)=(\S*)", answer[0]))
    return SlurmJobState(fields.get("JobState", ""), fields.get("Reason", ""), int(fields.get("Restarts", 0)))


def ask(command: list[str], answer: list[str] | None = None) -> str | None:
    """Run a command of SLURM, again and again while its controller is away.

    Args:
        command: The command.
        answer: Takes what it printed.

    Returns:
        None if it worked, else what it complained of.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            if answer is not None:
                answer.append(done.stdout)
            return None
        complaint = " ".join(done.stderr.split())
        away = "nable to contact" in complaint or "timed out" in complaint or "refused" in complaint
        if not away or time.monotonic() > deadline:
            return complaint
        time.sleep(2)


def job_id(environment: Mapping[str, str]) -> str:
    """The job's number; a member of a job array is asked for by its index, since one has the number of them all."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def newest_step(folder: Path) -> int:
    """Step of the run's newest complete checkpoint; -1 for none. The run is the folder above the logs."""
    marked = folder.parent.parent.glob("checkpoints/step-*/progress.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in marked), default=-1)


def rank_exits(folder: Path, restart: int) -> dict[int, int | None]:
    """What the ranks of an incarnation left as their exit codes, by rank; those that did not begin are not there."""
    ranks = [int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.json")]
    each = {rank: Status(folder, rank).read() for rank in sorted(ranks)}
    return {
        rank: status["exit"]
        for rank, status in each.items()
        if status is not None and status.get("restart", 0) == restart
    }


def srun_exits(text: str) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves, by rank, as srun tells them.

    srun's own code is the greatest of all, so that of the ranks that it ends for the sake of one hides that one's.

    Args:
        text: What srun wrote, with lines such as "srun: error: node1: tasks 0-1,3: Exited with exit code 1".
    """
    codes: dict[int, int] = {}
    for tasks, code in _EXITED.findall(text):
        for part in filter(None, tasks.split(",")):
            first, _, last = part.partition("-")
            codes |= dict.fromkeys(range(int(first), int(last or first) + 1), int(code))
    return codes


def _write_unbegun(
    folder: Path, code: int, begun: Collection[int], environment: Mapping[str, str], logs: Path
) -> str | None:
    """Write the status of ranks that failed before they could: of a python without the packages, or none at all.

    Returns:
        How the first of them ended; None where there is none.
    """
    restart = restart_count(environment)
    errors = _errors(folder, restart, _error_log(logs, environment))
    # 255 is what a container's runtime ends with; of a process that has begun it would be a signal's.
    failed = {rank: each for rank, each in srun_exits(errors).items() if _is_error(each) or each == 255}
    unbegun = {rank: failed[rank] for rank in sorted(failed.keys() - begun)}
    try:
        for rank, each in unbegun.items():
            Status(folder, rank).write_unbegun(each, restart)
    except OSError as error:
        print(f"{folder}: a rank's status was not written: {error.strerror}", file=sys.stderr)
    if unbegun:
        return failure_of(folder, job_id(environment), min(unbegun), restart, logs).how
    if not begun and _is_error(code):
        return f"no rank began, srun ended with exit code {code}: {last_line(errors.splitlines())}".removesuffix(": ")
    return None


def _error_log(logs: Path, environment: Mapping[str, str]) -> Path:
    """Where the batch script's errors go, and with them srun's: rank 0 writes there as well."""
    return logs / f"{job_id(environment)}_0_log.err"


def _errors(folder: Path, restart: int, log: Path) -> str:
    """What the batch script's error log holds of an incarnation; empty where that is not known."""
    lives = attempts(folder)
    if not lives or lives[-1].restart != restart:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(lives[-1].errors, file.seek(0, os.SEEK_END) - _READ))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _without_progress(folder: Path, restart: int) -> list[str] | None:
    """Causes of the incarnations before this one since the last that saved something; None if this one did."""
    causes, newest = [], newest_step(folder)
    for each in reversed(attempts(folder)):
        saved = (newest if each.step is None else each.step) > each.began_step
        if each.restart == restart:
            if saved:
                return None
        elif saved:
            break
        else:
            causes.append(each.cause)
    return causes


def _write_end(folder: Path, restart: int, code: int | None, fate: RestartDecision, requeued: bool) -> None:
    line = {
        "restart": restart,
        "ended": time.time(),
        "code": code,
        "requeued": requeued,
        "why": fate.why,
        "cause": fate.cause,
        "step": newest_step(folder),
    }
    _append(folder, line)


def _append(folder: Path, record: dict[str, Any]) -> None:
    """Add a line; a disk that is full is no reason not to start again."""
    try:
        with (folder / INCARNATIONS).open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"{folder / INCARNATIONS} was not written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
