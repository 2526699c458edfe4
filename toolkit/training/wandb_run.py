"""The run's record at Weights & Biases."""

import netrc
import os
import uuid
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.training.progress import Progress


def open_wandb(settings: config.Wandb, run: Path, progress: Progress) -> Any:
    """Open the run's wandb record, offline where no key is found.

    All restarts have one id. It is in the checkpoints, so that a run that goes on in another folder keeps it, and in
    the run folder, for a run that is killed before its first checkpoint.

    Args:
        settings: Mode and project.
        run: The run folder.
        progress: Of the checkpoint that the run goes on from; gets the id.

    Returns:
        What `wandb.init` returns; None where wandb is disabled.
    """
    if settings.mode == "disabled":
        return None
    import wandb

    mode: Any = settings.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    kept = run / "wandb_id"
    if not progress.wandb_id:
        progress.wandb_id = kept.read_text() if kept.exists() else uuid.uuid4().hex[:12]
    kept.write_text(progress.wandb_id)
    return wandb.init(
        project=settings.project,
        name=run.name,
        id=progress.wandb_id,
        resume="allow",
        dir=str(run),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )


def _has_wandb_key() -> bool:
    """Whether `wandb login` was done here, or the key is in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
