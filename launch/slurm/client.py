"""What SLURM says of jobs: squeue of those that wait or run, sacct (where there are accounts) of those that ended."""

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from shards.errors import UserError

# A line of sbatch's answer; with --parsable the second. A cluster is named where there are several.
_SUBMITTED = (re.compile(r"Submitted batch job (\d+)(?: on cluster \S+)?"), re.compile(r"(\d+)(?:;\S+)?"))
_PATIENCE = 20.0  # seconds that SLURM may take to answer


@dataclass(frozen=True)
class Queued:
    """A job in SLURM's words.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, ...; of a job that has ended COMPLETED, CANCELLED, TIMEOUT, ...
        reason: Why it waits, such as Resources or Priority; empty where there is none.
        alive: It waits or runs.
    """

    state: str
    reason: str
    alive: bool


def find(ids: Collection[str]) -> dict[str, Queued]:
    """What SLURM knows of these jobs; empty where there is no SLURM, or it does not answer.

    Args:
        ids: Numbers of jobs; of a member of a job array as ARRAY_INDEX.
    """
    found = in_queue(ids)
    if found is None:
        return {}
    gone = {each: Queued("", "", False) for each in ids if each not in found}
    return found | gone | (_ended(list(gone)) if gone else {})


def in_queue(ids: Collection[str]) -> dict[str, Queued] | None:
    """Those of some jobs that wait or run; None where there is no SLURM, or it does not answer."""
    if not ids or shutil.which("squeue") is None:
        return None
    arrays = ",".join(sorted({each.partition("_")[0] for each in ids}))
    lines = ask(["squeue", "--noheader", "--array", "--jobs", arrays, "--format", "%i|%T|%r"])
    if lines is None:
        return None
    parts = (line.split("|", 2) for line in lines)
    return {job: Queued(state, "" if why == "None" else why, True) for job, state, why in parts if job in ids}


def _ended(ids: list[str]) -> dict[str, Queued]:
    """Last states of jobs that have left the queue."""
    if shutil.which("sacct") is None:
        return {}
    columns = ["--allocations", "--noheader", "--parsable2", "--format", "JobID,State"]
    arrays = ",".join(sorted({each.partition("_")[0] for each in ids}))
    found = {}
    for line in ask(["sacct", *columns, "--jobs", arrays]) or []:
        jobs, _, state = line.partition("|")
        word = re.split(r"[ +]", state)[0]  # "CANCELLED by 1000"
        if word not in ("PENDING", "RUNNING", "REQUEUED", ""):  # accounts lag behind the queue
            found.update({job: Queued(word, "", False) for job in _members(jobs) if job in ids})
    return found


def _members(jobs: str) -> list[str]:
    """A job's number; those of the members of an array that never began, which share a line: 7_[1,4-6%2]."""
    match = re.fullmatch(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]", jobs)
    if match is None:
        return [jobs]
    parts = (re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part) for part in match[2].split(","))
    ranges = (range(int(part[1]), int(part[2] or part[1]) + 1, int(part[3] or 1)) for part in parts if part)
    return [f"{match[1]}_{index}" for each in ranges for index in each]


def job_number(answer: str | bytes) -> str:
    """The number of the job in what sbatch printed, beside greetings and advice that a site may add.

    Raises:
        UserError: No line is sbatch's own. The job may be there all the same.
    """
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    lines = [line.strip().removeprefix("sbatch: ") for line in text.splitlines()]
    for pattern in _SUBMITTED:
        numbers = [found[1] for line in lines if (found := pattern.fullmatch(line))]
        if numbers:
            return numbers[-1]
    said = " ".join(text.split())[:200]
    raise UserError(f"sbatch's answer ({said or 'nothing'}) names no job; if squeue --me shows it, end it with scancel")


def ask(command: list[str]) -> list[str] | None:
    """The lines of what one of SLURM's commands answers; none for a job it does not know; None without an answer."""
    try:
        # Lists of members as long as they are, not cut off.
        environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    unknown = "Invalid job id" in answer.stderr
    return None if answer.returncode and not unknown else answer.stdout.splitlines()
