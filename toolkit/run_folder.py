"""The run folder: one folder per run, with the configuration that the run was started with."""

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from shards.errors import UserError
from toolkit.config.load import SAVED, apply_yaml
from toolkit.config.schema import RENAMED_KEYS, Config
from toolkit.config.yaml_files import FLOAT

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

LOG, RECALL, ENVIRONMENT = "log.jsonl", "recall.json", "environment.json"  # "recall.json": the final evaluation
PROGRESS = "progress.json"  # in a checkpoint and in an exported model
_NOT_RUNS = (  # subfolders of a run
    "checkpoints", "code", "export", "inside", "logs", "profile", "results", "robustness", "transcripts", "wandb",
)  # fmt: skip

# Prefixes of keys that may change when a run resumes: they do not affect what is learned. Checkpoints identify their
# data by checksum, not by location.
_MUTABLE_KEYS = (
    "run", "launch.", "wandb.", "evaluation.", "final.",
    "data.shards", "data.workers", "data.make", "data.timeout", "data.cache", "data.max_bad_samples",
    "training.resume", "training.stop_after", "training.log_every", "training.save_every", "training.keep_checkpoints",
    "training.zero_stage", "training.activation_checkpointing", "training.max_skipped_in_a_row",
    "training.detect_nonfinite", "training.watchdog",
)  # fmt: skip


# Prefixes of keys that are newer than some checkpoints: they count only where they differ from their defaults, with
# which training is what it was before.
_NEW_KEYS = (
    "data.augment.", "model.speech.architecture", "model.speech.mel_bins", "model.speech.lora_", "model.image.lora_",
    "training.trunk_lr", "training.layer_decay",
)  # fmt: skip


def prepare_run(config: Config) -> Path:
    """Create the run folder and acquire its lease; called by one process.

    If this fails, the folder is unchanged.

    Returns:
        The run folder.

    Raises:
        UserError: The folder holds another run, is in use, or cannot be written.
    """
    from toolkit.training.fault_tolerance import lease  # imports numpy, which would slow --help down

    check_run(config)
    folder = Path(config.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(folder, error) from None
    lease.take(folder)  # for this process; the trainer renews it
    return folder


def save_configuration(config: Config) -> None:
    """Save the configuration in the run folder; called by one process, after training has started successfully.

    A configuration that turns out not to fit the checkpoints is never saved.

    Raises:
        UserError: The folder cannot be written.
    """
    from shards.files import atomic_write

    # `resume: never` and `stop_after` apply to one process, not to the run.
    resume = "auto" if config.training.resume == "never" else config.training.resume
    training = dataclasses.replace(config.training, stop_after=None, resume=resume)
    try:
        with atomic_write(Path(config.run) / SAVED) as file:
            file.write(to_yaml(dataclasses.replace(config, training=training)).encode())
    except OSError as error:
        raise _write_error(Path(config.run), error) from None


def _write_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"run folder {folder} cannot be written: {error.strerror}; name another with --run DIR")


def check_run(config: Config) -> None:
    """Check that the run folder is new or holds a run of this configuration; writes nothing.

    Raises:
        UserError: The folder holds a run with another fingerprint, or it has checkpoints and `training.resume` is
            never, except in a job that SLURM has restarted, which wrote them itself.
    """
    restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    checkpoints = Path(config.run) / "checkpoints"
    if config.training.resume == "never" and not restarted and any(checkpoints.glob("step-*")):
        raise UserError(f"--training.resume never: {checkpoints} holds checkpoints; name another folder with --run DIR")
    if not (Path(config.run) / SAVED).is_file():
        return
    saved, current = (flatten(dataclasses.asdict(each)) for each in (load_run(config.run), config))
    changed = [
        f"{key} {saved.get(key)!r} there, {current.get(key)!r} here"
        for key in sorted({*saved, *current})
        if not key.startswith(_MUTABLE_KEYS) and saved.get(key) != current.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        shown = "; ".join(changed[:3]) + more
        raise UserError(f"{config.run} holds another run: {shown}: name another folder with --run DIR")


def load_run(folder: str | Path) -> Config:
    """Read the configuration of a run folder.

    Raises:
        UserError: The folder has no configuration, or it cannot be read.
    """
    path = Path(folder) / SAVED
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: no {SAVED}")
    config = Config()
    apply_yaml(config, path)
    return config


def fingerprint(config: Config) -> str:
    """Checksum of the values that affect what is learned; equal for configurations that may resume each other's runs.

    Renamed keys are hashed under their original names, so that checkpoints of earlier versions remain valid.
    """
    original_names = {f"{old.rpartition('.')[0]}.{new}": old for old, new in RENAMED_KEYS.items()}
    flat, defaults = (flatten(dataclasses.asdict(each)) for each in (config, Config()))
    for key in [key for key in flat if key.startswith(_NEW_KEYS) and flat[key] == defaults[key]]:
        del flat[key]
    hashed = {original_names.get(key, key): value for key, value in flat.items() if not key.startswith(_MUTABLE_KEYS)}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def trained_data(run: Path) -> list[str] | None:
    """Checksums of the shards that a run's newest readable checkpoint was trained on; None without a checkpoint."""
    for path in sorted(run.glob(f"checkpoints/step-*/{PROGRESS}"), reverse=True):
        try:
            return [str(checksum) for checksum in json.loads(path.read_bytes())["data"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def find_export(run: Path, checkpoint: str | None) -> Path:
    """Find an exported model of a run by name, or by the path of a folder written by `save_pretrained`.

    Raises:
        UserError: No such model exists.
    """
    names = ["best", "last"] if checkpoint is None else [checkpoint]
    for folder in existing_exports(run, names):
        return folder
    if checkpoint is None:
        raise UserError(f"{run} holds no exported model yet: training writes one when it evaluates or saves")
    exports = ", ".join(sorted(path.parent.name for path in (run / "export").glob("[!.]*/config.json"))) or "nothing"
    raise UserError(f"no exported model {checkpoint}: {run / 'export'} holds {exports}")


def existing_exports(run: Path, names: list[str]) -> Iterator[Path]:
    """Yield the existing exported models among names or paths."""
    for folder in [run / "export" / name for name in names] + [Path(name) for name in names if os.sep in name]:
        if (folder / "config.json").is_file():
            yield folder


def load_model(export: Path) -> "SpeechImageModel":
    """Load an exported model in the precision that it was saved in.

    Raises:
        UserError: The folder does not hold a model of this toolkit.
    """
    from safetensors import SafetensorError

    from toolkit.model.retrieval import SpeechImageModel

    try:
        return SpeechImageModel.from_pretrained(export, dtype="auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{export} cannot be loaded as a model: {str(error).splitlines()[0]}") from error


def read_step(export: Path) -> int | None:
    """Training step of an exported model; None if it was not exported by the trainer."""
    path = export / PROGRESS
    return json.loads(path.read_text())["step"] if path.is_file() else None


def to_yaml(config: Config) -> str:
    """Write the complete configuration as YAML that `load_config` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def runs_below(folder: Path, is_run: Callable[[Path], bool], depth: int = 2) -> Iterator[Path]:
    """Yield the run folders in a folder, and in the folders in it down to a depth: the members of grids."""
    for below in sorted(folder.iterdir()):
        if below.is_dir() and below.name not in _NOT_RUNS and not below.name.startswith("."):
            if is_run(below):
                yield below
            elif depth > 1:
                yield from runs_below(below, is_run, depth - 1)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map the keys of a configuration, as in `--section.key`, to their values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or this project's loader would read as another type."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def git_state(root: Path, *paths: str) -> dict[str, str | None]:
    """Return the commit of a working tree and its uncommitted changes, or those in `paths`; None where git fails."""
    return {"commit": _git(root, "rev-parse", "HEAD"), "changed": _git(root, "status", "--porcelain", *paths)}


def _git(root: Path, *arguments: str) -> str | None:
    # Without optional locks: if git is killed while it holds one, the lock stays in the user's repository.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
