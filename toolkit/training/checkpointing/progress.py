"""How far a run is, and what the marker of a checkpoint says of it."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.training.checkpointing.background import reason_of
from toolkit.training.checkpointing.files import FileInfo

FORMAT = 2
MARKER = "progress.json"
SHARED = "shared.safetensors"
_FILE = re.compile(r"(shared|(fragments|tokens)-\d{5})\.safetensors")  # the only files of a checkpoint that are opened


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        best: Best mean R@1 on dev so far, in per cent; -1 before the first evaluation.
        best_step: When that was.
        skipped: Steps that changed no weight.
        skipped_in_a_row: Of these, the ones since the last that did.
        seconds: Training time so far, over all restarts.
        restarts: How often the run was continued and then got as far as a checkpoint.
        wandb_id: Of the run's wandb record; empty where there is none.
        match_weight: Of the match logit in re-ranking, as fitted on dev last; -1 before.
    """

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    restarts: int = 0
    wandb_id: str = ""
    match_weight: float = -1.0


@dataclass(frozen=True)
class Saved:
    """What the marker of a complete checkpoint says."""

    folder: Path
    progress: Progress
    applied_steps: int  # as the optimizer counts
    config: str
    data: list[str]
    files: list[FileInfo]


def read_marker(folder: Path) -> "Saved | str":
    """What a marker says, or why it cannot be believed; it may come from anywhere."""
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
        return Saved(folder, progress, applied, str(state["config"]), data, files)
    except FileNotFoundError:
        return f"{MARKER} is missing"
    except OSError as error:
        return f"{MARKER} cannot be read: {reason_of(error)}"
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return f"{MARKER} is damaged"
