"""The run folder: one run, whose configuration stands in it and does not change under way."""

import dataclasses
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from shards.errors import UserError
from toolkit.config.load import FLOAT, SAVED, apply_yaml
from toolkit.config.schema import RENAMED_KEYS, Config

# What may differ when a run is continued: it changes nothing of what is learned. A checkpoint knows its data by their
# checksums, wherever they lie.
_FREE = (
    "run", "launch.", "wandb.", "evaluation.", "final.",
    "data.shards", "data.workers", "data.make", "data.timeout", "data.cache", "data.max_bad_samples",
    "training.resume", "training.stop_after", "training.log_every", "training.save_every", "training.keep_checkpoints",
    "training.zero_stage", "training.activation_checkpointing", "training.max_skipped_in_a_row",
    "training.detect_nonfinite", "training.watchdog",
)  # fmt: skip


def prepare_run(config: Config) -> Path:
    """Make the run folder and take its lease; to be called by one process.

    Nothing is changed in a folder that cannot be had.

    Returns:
        The run folder.

    Raises:
        UserError: The folder holds another run, is in use, or cannot be written.
    """
    from toolkit.training.fault_tolerance import lease  # brings numpy, which --help need not wait for

    check_run(config)
    folder = Path(config.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(folder, error) from None
    lease.take(folder)  # as this process; the trainer will take it again
    return folder


def save_configuration(config: Config) -> None:
    """Write the run's configuration as it is now; to be called by one process, once a start has succeeded.

    One that is refused after all, by what the checkpoints hold, is to leave no mistake behind.

    Raises:
        UserError: The folder cannot be written.
    """
    from shards.files import atomic_write

    # These are of one process, not of the run.
    resume = "auto" if config.training.resume == "never" else config.training.resume
    training = dataclasses.replace(config.training, stop_after=None, resume=resume)
    try:
        with atomic_write(Path(config.run) / SAVED) as file:
            file.write(to_yaml(dataclasses.replace(config, training=training)).encode())
    except OSError as error:
        raise _unwritten(Path(config.run), error) from None


def _unwritten(folder: Path, error: OSError) -> UserError:
    return UserError(f"run folder {folder} cannot be written: {error.strerror}; name another with --run DIR")


def check_run(config: Config) -> None:
    """Make sure that the run folder is new or holds a run of this configuration; writes nothing.

    Raises:
        UserError: It holds a run that differs in something that matters, or has checkpoints and `training.resume` says
            that it should not. In a job that SLURM has started again these are its own.
    """
    began_again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    checkpoints = Path(config.run) / "checkpoints"
    if config.training.resume == "never" and not began_again and any(checkpoints.glob("step-*")):
        raise UserError(f"--training.resume never: {checkpoints} holds checkpoints; name another folder with --run DIR")
    if not (Path(config.run) / SAVED).is_file():
        return
    there, here = (_flat(dataclasses.asdict(each)) for each in (load_run(config.run), config))
    changed = [
        f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if not key.startswith(_FREE) and there.get(key) != here.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        shown = "; ".join(changed[:3]) + more
        raise UserError(f"{config.run} holds another run: {shown}: name another folder with --run DIR")


def load_run(folder: str | Path) -> Config:
    """Read the configuration of a run folder.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = Path(folder) / SAVED
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: no {SAVED}")
    config = Config()
    apply_yaml(config, path)
    return config


def fingerprint(config: Config) -> str:
    """Checksum of what matters to what is learned: the same for runs that may continue one another.

    Keys count under their first names, so that a checkpoint of an earlier version still fits.
    """
    first_names = {f"{old.rpartition('.')[0]}.{new}": old for old, new in RENAMED_KEYS.items()}
    flat = {key: value for key, value in _flat(dataclasses.asdict(config)).items() if not key.startswith(_FREE)}
    flat = {first_names.get(key, key): value for key, value in flat.items()}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def to_yaml(config: Config) -> str:
    """The whole tree as YAML, which `load_config` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or the loader would take for something other than a string."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def git_state(root: Path, *paths: str) -> dict[str, str | None]:
    """Commit of a working tree, and what is changed in it or in some of its folders; None where git tells nothing."""
    return {"commit": _git(root, "rev-parse", "HEAD"), "changed": _git(root, "status", "--porcelain", *paths)}


def _git(root: Path, *arguments: str) -> str | None:
    # Without its optional locks: a git that is ended while it holds one would leave it in the user's repository.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
