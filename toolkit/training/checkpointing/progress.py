"""Progress of a run, and the marker of a complete checkpoint."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.errors import UserError
from toolkit.training.checkpointing.background import reason_of
from toolkit.training.checkpointing.files import FileInfo

FORMAT = 2
MARKER = "progress.json"
SHARED = "shared.safetensors"
_FILE = re.compile(r"(shared|(fragments|tokens)-\d{5})\.safetensors")  # the only files of a checkpoint that are opened


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0  # number of optimizer steps done
    best: float = -1.0  # best mean R@1 on dev so far, in per cent; -1 before the first evaluation
    best_step: int = 0  # step of the best evaluation
    skipped: int = 0  # number of skipped steps
    skipped_in_a_row: int = 0  # number of skipped steps since the last applied one
    seconds: float = 0.0  # training time so far, over all restarts
    restarts: int = 0  # number of restarts after which a checkpoint was saved
    wandb_id: str = ""  # ID of the run in wandb; empty: none
    match_weight: float = -1.0  # weight of the match logit in re-ranking, as last fitted on dev; -1: not fitted yet


@dataclass(frozen=True)
class Marker:
    """The marker of a complete checkpoint, `progress.json`, as it was read."""

    folder: Path
    progress: Progress
    applied_steps: int  # as counted by the optimizer
    config_fingerprint: str
    data_hashes: list[str]  # of the data sets that were trained on
    files: list[FileInfo]


def read_marker(folder: Path) -> "Marker | str":
    """Read a marker, which is not trusted; return what is wrong with it if it is not valid."""
    try:
        state = json.loads((folder / MARKER).read_bytes())
        if state["format"] != FORMAT:
            return f"it has format {state['format']}, this version reads {FORMAT}"
        files = [FileInfo(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in state["files"]]
        if bad := [info.name for info in files if not _FILE.fullmatch(info.name)]:
            return f"{bad[0]!r} is no file of a checkpoint"
        if SHARED not in {info.name for info in files}:
            return f"{SHARED} is missing"
        known = asdict(Progress())
        progress = Progress(**{name: type(value)(state.get(name, value)) for name, value in known.items()})
        data, applied = [str(each) for each in state["data"]], int(state["applied_steps"])
        counts = [applied, *(value for value in asdict(progress).values() if isinstance(value, int))]
        if min(counts) < 0 or not math.isfinite(progress.best + progress.seconds):
            raise ValueError
        return Marker(folder, progress, applied, str(state["config"]), data, files)
    except FileNotFoundError:
        return f"{MARKER} is missing"
    except OSError as error:
        return f"{MARKER} cannot be read: {reason_of(error)}"
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return f"{MARKER} is damaged"


def find_checkpoints(path: Path) -> list[Path]:
    """List the checkpoints of a run folder, newest first, or the checkpoint that the path names."""
    checkpoints = [path] if (path / MARKER).is_file() else sorted((path / "checkpoints").glob("step-*"), reverse=True)
    if not checkpoints:
        raise UserError(
            f"--training.resume {path}: no checkpoint there; give auto, never, a run folder or a checkpoint's"
        )
    return checkpoints
