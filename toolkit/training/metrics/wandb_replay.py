"""Replay of a run's log into one wandb run, whatever restarts the training had.

Each start of a training writes a part. Parts that were written offline overwrite one another when they are synced,
since each counts its lines from the first. The log of the run folder has all that any part has.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import read_object, read_records
from shards.progress import progress_bar
from toolkit.config.load import SAVED
from toolkit.config.schema import Wandb
from toolkit.config.yaml_files import read_yaml
from toolkit.reporting.curves import flat
from toolkit.run_folder import ENVIRONMENT, LOG, RECALL
from toolkit.training.metrics.wandb_run import choose_mode, init_seconds


@dataclass(frozen=True)
class History:
    """The log of a run without what later starts replaced."""

    rows: list[tuple[int, dict[str, float]]]  # step and values, in order of the steps; each step once
    starts: int  # how often the training was started
    replaced: int  # records that were dropped, as a later start began before their step


@dataclass(frozen=True)
class Replayed:
    """What was written."""

    id: str  # of the wandb run
    mode: str  # online or offline
    project: str
    history: History  # what it has
    folder: Path | None = None  # folder of an offline run, for `wandb sync`; None: online, or nothing was written


def read_history(log: Path) -> History:
    """Read the values of each step; of records of one step, as of training and evaluation, the values are joined.

    Raises:
        UserError: The log is missing, cannot be read, or has no step.
    """
    rows: dict[int, dict[str, float]] = {}
    starts = replaced = 0
    try:
        for record in read_records(log):
            if record.get("event") == "began" and isinstance(record.get("at"), int):
                starts += 1
                outdated = [step for step in rows if step > record["at"]]
                replaced += len(outdated)
                for step in outdated:
                    del rows[step]
            elif isinstance(record.get("step"), int):
                values = flat(record)
                values["_timestamp"] = values.pop("time", 0.0)
                rows.setdefault(record["step"], {}).update(values)
    except OSError as error:
        raise UserError(f"{log} cannot be read: {error.strerror}: name the folder of a run") from None
    if not rows:
        raise UserError(f"{log} has no step yet: there is nothing to replay")
    return History(sorted(rows.items()), starts, replaced)


def replay(run: Path, mode: str | None = None, dry_run: bool = False) -> Replayed:
    """Write the log of a run, its configuration and its final recall as one wandb run.

    Its ID follows from that of the run. A further replay online continues it with the steps that it does not have; one
    offline replaces the last.

    Args:
        run: The run folder.
        mode: online or offline; None: as for the training, but never disabled.
        dry_run: Whether only to read.

    Raises:
        UserError: There is no log, no valid key for an online run, or wandb fails.
    """
    history = read_history(run / LOG)
    stored = read_yaml(run / SAVED) if (run / SAVED).is_file() else {}
    section = stored.get("wandb")
    project = str((section if isinstance(section, dict) else {}).get("project") or Wandb.project)
    chosen, problem = choose_mode(Wandb(mode=mode or "auto"))  # type: ignore[arg-type]
    chosen = "offline" if chosen == "disabled" else chosen
    if chosen == "online" and problem:
        raise UserError(f"{problem}; or give --mode offline")
    planned = Replayed(_identity(run), chosen, project, history)
    if dry_run:
        return planned
    folder = run / "wandb"
    temporary, final = folder / f"replay.{os.getpid()}.tmp", folder / "replay"
    try:
        temporary.mkdir(parents=True)
        _write(run, temporary, planned, stored)
        if chosen == "online":
            return planned
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    (written,) = (final / "wandb").glob("offline-run-*")
    return Replayed(planned.id, chosen, project, history, written)


def _identity(run: Path) -> str:
    """Return the ID of the replay: it differs from that of the parts, some of which may have been uploaded."""
    kept = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        kept = (run / "wandb_id").read_text().strip()
    if not kept:  # wandb was disabled
        with (run / LOG).open("rb") as file:
            kept = hashlib.sha256(file.readline()).hexdigest()[:12]
    return f"{kept}-replay"


def _write(run: Path, folder: Path, planned: Replayed, stored: dict[str, Any]) -> None:
    with _wandb_errors():
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=init_seconds(),
            x_disable_stats=True,  # measurements of this machine would be taken for those of the training
            x_disable_meta=True,
            x_save_requirements=False,
        )
        opened = wandb.init(
            project=planned.project,
            name=run.resolve().name,
            id=planned.id,
            # Offline it is complete: when it is synced again, its lines have to replace the former ones.
            resume="allow" if planned.mode == "online" else None,
            mode=planned.mode,  # type: ignore[arg-type]
            dir=str(folder.resolve()),
            config={**stored, "environment": read_object(run / ENVIRONMENT), "starts": planned.history.starts},
            settings=settings,
        )
        opened.define_metric("step")
        opened.define_metric("*", step_metric="step")
        with progress_bar(len(planned.history.rows), "steps", "replaying") as progress:
            for step, values in planned.history.rows:
                opened.log(values, step=step)  # wandb passes over steps that it has
                progress(1)
        opened.summary.update(flat(read_object(run / RECALL), "final/"))
        opened.finish()
        wandb.teardown()


@contextlib.contextmanager
def _wandb_errors() -> Iterator[None]:
    """Turn the errors of wandb into one line."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # each of its parts has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"wandb failed: {reason}; --mode offline needs no server") from None
