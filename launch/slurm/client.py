"""SLURM's commands: the only module that starts squeue, sacct, scontrol, sbatch, scancel, sinfo and sacctmgr.

The batch script's `requeue.py` imports it on a bare host: the standard library and `shards.errors` only.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError

# A line of sbatch's answer; with --parsable the second. A cluster is named where there are several.
_SUBMITTED = (re.compile(r"Submitted batch job (\d+)(?: on cluster \S+)?"), re.compile(r"(\d+)(?:;\S+)?"))
_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "--readonly", "list")
_QUERY_TIMEOUT = 20.0  # seconds for a query, which is retried or skipped
_CONFIG_TIMEOUT = 60.0  # seconds for `scontrol show config`, without which nothing is submitted
_CONTROLLER_TIMEOUT = 600.0  # seconds that an unreachable controller is waited for by a job that ends
_RETRY_INTERVAL = 2.0  # seconds
_DEFAULT_KILL_WAIT = 30  # seconds, SLURM's


@dataclass(frozen=True)
class SlurmJob:
    """A job as listed by squeue or sacct.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, ...; of a job that has ended COMPLETED, CANCELLED, TIMEOUT, ...
        reason: Why it waits, such as Resources or Priority; empty for none.
        alive: Whether it is pending or running.
    """

    state: str
    reason: str
    alive: bool


@dataclass(frozen=True)
class SlurmJobState:
    """State of a job while its batch script ends.

    Attributes:
        state: RUNNING; COMPLETING if SLURM is ending the job.
        reason: TimeLimit when that was reached.
        restarts: Restart count; greater than this attempt's once SLURM has decided to requeue the job.
    """

    state: str
    reason: str
    restarts: int


def find_jobs(ids: Collection[str]) -> dict[str, SlurmJob]:
    """Look jobs up in squeue and, where there is accounting, in sacct.

    Args:
        ids: Job numbers; members of a job array as ARRAY_INDEX.

    Returns:
        Jobs by their number; empty without SLURM or without an answer.
    """
    jobs = queued_jobs(ids)
    if jobs is None:
        return {}
    gone = {each: SlurmJob("", "", False) for each in ids if each not in jobs}
    return jobs | gone | (_ended_jobs(list(gone)) if gone else {})


def queued_jobs(ids: Collection[str]) -> dict[str, SlurmJob] | None:
    """Return those of some jobs that are pending or running; None without SLURM or without an answer."""
    if not ids or shutil.which("squeue") is None:
        return None
    lines = query(["squeue", "--noheader", "--array", "--jobs", _array_numbers(ids), "--format", "%i|%T|%r"])
    if lines is None:
        return None
    parts = (line.split("|", 2) for line in lines)
    return {job: SlurmJob(state, "" if why == "None" else why, True) for job, state, why in parts if job in ids}


def queue_state(job: str) -> str | None:
    """Return a job's state and reason or nodes, as squeue shows them; empty if it left the queue; None if unknown."""
    lines = query(["squeue", "--noheader", "--jobs", job, "--format", "%T %R"])
    return None if lines is None else " ".join(lines).strip()


def job_state(job: str) -> SlurmJobState | None:
    """Return the state of a job, waiting for an unreachable controller; None if it does not come back."""
    answer = _run_until_reachable(["scontrol", "--oneliner", "show", "job", job])
    if answer.returncode:
        return None
    fields = dict(re.findall(r"(JobState|Reason|Restarts)=(\S*)", answer.stdout))
    return SlurmJobState(fields.get("JobState", ""), fields.get("Reason", ""), int(fields.get("Restarts", 0)))


def requeue_job(job: str) -> str | None:
    """Requeue a job, waiting for an unreachable controller.

    Returns:
        SLURM's error message; None if the job is requeued.
    """
    answer = _run_until_reachable(["scontrol", "requeue", job])
    return _one_line(answer.stderr) if answer.returncode else None


def cancel_jobs(ids: Sequence[str]) -> str:
    """Cancel jobs.

    Returns:
        SLURM's error message; empty for none.

    Raises:
        FileNotFoundError: There is no scancel on this machine.
    """
    return _one_line(_run(["scancel", *ids]).stderr)


def submit_script(path: Path, options: Sequence[str] = ()) -> str:
    """Submit a batch script.

    Returns:
        The job's number.

    Raises:
        UserError: SLURM refuses it.
    """
    answer = _run(["sbatch", "--parsable", *options, str(path)])
    if answer.returncode:
        raise UserError(f"SLURM refused the job: {_one_line(answer.stderr)}")
    return job_number(answer.stdout)


def sbatch_test_only(path: Path) -> tuple[bool, str]:
    """Run `sbatch --test-only`: whether SLURM would take the script, and its answer in one line."""
    answer = _run(["sbatch", "--test-only", str(path)])
    return answer.returncode == 0, _one_line(f"{answer.stdout} {answer.stderr}".replace("sbatch:", " "))


def slurm_config() -> dict[str, str] | None:
    """Return SLURM's configuration; None where none is configured, though the commands may be installed.

    Raises:
        UserError: It is configured and does not answer.
    """
    if shutil.which("scontrol") is None:
        return None
    try:
        answer = _run(["scontrol", "show", "config"], timeout=_CONFIG_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError("SLURM does not answer within a minute: try again later, or --cluster local") from None
    if answer.returncode:
        error = _one_line(answer.stderr)
        if re.search(r"configuration source|slurm\.conf|process configuration", error):
            return None
        raise UserError(f"SLURM does not answer ({error}): try again later, or --cluster local")
    pairs = (line.partition("=") for line in answer.stdout.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def kill_wait() -> int:
    """Return the seconds between SLURM's TERM and KILL to the processes of a job."""
    match = re.search(r"KillWait\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout)
    return int(match[1]) if match else _DEFAULT_KILL_WAIT


def host_names(node_list: str) -> list[str]:
    """Expand a node list such as node[3-4]."""
    return _run(["scontrol", "show", "hostnames", node_list]).stdout.split()


def partitions() -> dict[str, dict[str, str]]:
    """Return all partitions by name, each with the fields of `scontrol show partition`.

    Raises:
        UserError: SLURM does not answer.
    """
    answer = _run(["scontrol", "show", "partition", "--oneliner"])
    if answer.returncode:
        raise UserError(f"SLURM does not answer: {_one_line(answer.stderr)}")
    lines = (line.split() for line in answer.stdout.splitlines() if "PartitionName=" in line)
    entries = (dict(word.partition("=")[::2] for word in words if "=" in word) for words in lines)
    return {entry["PartitionName"]: entry for entry in entries}


def node_states(partitions: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return node, partition (the default one's with a star) and state of the nodes of some partitions, else of all."""
    options = [f"--partition={each}" for each in partitions]
    lines = query(["sinfo", "--noheader", "--Node", "--format=%N|%P|%T", *options]) or []
    entries = (line.strip().split("|") for line in lines)
    return [(node, partition, state) for node, partition, state in entries]


def accounting_rows(entity: str, columns: Sequence[str], *where: str) -> list[dict[str, str]]:
    """List an entity of SLURM's accounting by sacctmgr.

    Args:
        entity: Such as account, qos, user or association.
        columns: Columns to list.
        where: Conditions of sacctmgr.

    Returns:
        Rows by column; empty without accounting.
    """
    words = [word for part in where for word in part.split(" ", 1)]
    lines = query([*_SACCTMGR, entity, *words, f"format={','.join(columns)}"]) or []
    blank = [""] * len(columns)  # for what a line lacks
    return [dict(zip(columns, [*line.strip().split("|"), *blank], strict=False)) for line in lines if line.strip()]


def job_number(answer: str | bytes) -> str:
    """Find the job's number in sbatch's output, beside greetings and advice that a site may add.

    Raises:
        UserError: No line is sbatch's own. The job may have been submitted all the same.
    """
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    lines = [line.strip().removeprefix("sbatch: ") for line in text.splitlines()]
    for pattern in _SUBMITTED:
        numbers = [match[1] for line in lines if (match := pattern.fullmatch(line))]
        if numbers:
            return numbers[-1]
    output = _one_line(text)[:200] or "nothing"
    raise UserError(f"sbatch's answer ({output}) names no job; if squeue --me shows it, end it with scancel")


def _ended_jobs(ids: list[str]) -> dict[str, SlurmJob]:
    """Return the last states of jobs that have left the queue."""
    if shutil.which("sacct") is None:
        return {}
    columns = ["--allocations", "--noheader", "--parsable2", "--format", "JobID,State"]
    ended = {}
    for line in query(["sacct", *columns, "--jobs", _array_numbers(ids)]) or []:
        jobs, _, state = line.partition("|")
        word = re.split(r"[ +]", state)[0]  # "CANCELLED by 1000"
        if word not in ("PENDING", "RUNNING", "REQUEUED", ""):  # accounting lags behind the queue
            ended.update({job: SlurmJob(word, "", False) for job in _members(jobs) if job in ids})
    return ended


def _array_numbers(ids: Collection[str]) -> str:
    return ",".join(sorted({each.partition("_")[0] for each in ids}))


def _members(jobs: str) -> list[str]:
    """Expand the members of an array that never began, which share a line: 7_[1,4-6%2]; else the job itself."""
    match = re.fullmatch(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]", jobs)
    if match is None:
        return [jobs]
    parts = (re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part) for part in match[2].split(","))
    ranges = (range(int(part[1]), int(part[2] or part[1]) + 1, int(part[3] or 1)) for part in parts if part)
    return [f"{match[1]}_{index}" for each in ranges for index in each]


def query(command: list[str]) -> list[str] | None:
    """Return the lines of a command's output; none for an unknown job; None without an answer in time."""
    try:
        # The indices of an array's members unabridged.
        answer = _run(command, timeout=_QUERY_TIMEOUT, env={**os.environ, "SLURM_BITSTR_LEN": "0"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    unknown = "Invalid job id" in answer.stderr
    return None if answer.returncode and not unknown else answer.stdout.splitlines()


def _run_until_reachable(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command, again and again while the controller is unreachable."""
    deadline = time.monotonic() + _CONTROLLER_TIMEOUT
    while True:
        answer = _run(command)
        unreachable = any(text in _one_line(answer.stderr) for text in ("nable to contact", "timed out", "refused"))
        if answer.returncode == 0 or not unreachable or time.monotonic() > deadline:
            return answer
        time.sleep(_RETRY_INTERVAL)


def _run(
    command: list[str], timeout: float | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def _one_line(text: str) -> str:
    return " ".join(text.split())
