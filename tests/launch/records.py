"""Files that a job leaves in its log folder: the record of its submission, its attempts, and the status of a rank."""

import json
from pathlib import Path

from launch.record import ATTEMPTS, Submission


def record(run: Path, name: str = "1", **values: object) -> Path:
    """Record a submission of a run, a job of SLURM of one rank unless the values differ; return its log folder."""
    folder = run / "logs" / name
    folder.mkdir(parents=True, exist_ok=True)
    given = {"job": "17", "cluster": "slurm", "run": str(run), "nodes": 1, "ranks": 1, "command": []}
    Submission(**given | values).write(folder)  # type: ignore[arg-type]
    return folder


def rank(folder: Path, number: int, code: int | None = None, restart: int = 0, when: float = 1.0) -> None:
    """Write a rank's status, with its exit code once it has ended."""
    status = {"pid": 1, "exit": code, "time": when, "restart": restart}
    (folder / "rank.tmp").write_text(json.dumps(status))
    (folder / "rank.tmp").replace(folder / f"rank{number}.json")  # atomic, as a rank writes it


def attempt(folder: Path, **values: object) -> None:
    """Append to the record of the job's attempts."""
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(values) + "\n")
