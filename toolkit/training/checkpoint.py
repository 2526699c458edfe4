"""Checkpoints of a run: complete or absent, the newest k kept.

    RUN/checkpoints/step-00000600/   deepspeed/ (model, optimizer) teacher.safetensors queue.safetensors progress.json
    RUN/export/{best,last}/          the model alone, as save_pretrained writes it

`progress.json` is written last: a folder without it is a save that was cut short, and is passed over.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from shards.errors import UserError
from shards.manifest import atomic
from toolkit.config import Config
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        best: Best mean R@1 on dev so far, in per cent; -1 before the first evaluation.
        best_step: When that was.
        skipped: Steps that changed no weight.
        seconds: Training time so far, over all restarts.
        restarts: How often the run was continued.
    """

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    restarts: int = 0


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, keep: int, rank: int, world_size: int) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.rank, self.world_size = keep, rank, world_size

    def save(self, engine: Any, teacher: MomentumEncoder | None, queue: EmbeddingQueue, progress: Progress) -> None:
        """Save everything the run needs to continue; every rank calls this."""
        folder = self.folder / f"step-{progress.step:08d}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        if self.rank == 0:
            if teacher:
                save_file(teacher.state_dict(), folder / "teacher.safetensors")
            save_file(queue.state_dict(), folder / "queue.safetensors")
        dist.barrier()
        if self.rank == 0:
            _sync(folder)
            state = asdict(progress) | {"world_size": self.world_size, "zero": engine.zero_optimization_stage()}
            with atomic(folder / "progress.json") as file:
                file.write(json.dumps(state, indent=1).encode())
            self._forget_old()
        dist.barrier()

    def resume(self, engine: Any, teacher: MomentumEncoder | None, queue: EmbeddingQueue) -> Progress:
        """Load the newest complete checkpoint into the parts given; without one, start at step 0.

        Raises:
            UserError: The checkpoint was written by another number of ranks or another ZeRO stage.
        """
        folder = self.newest()
        if folder is None:
            return Progress()
        state = json.loads((folder / "progress.json").read_text())
        world_size, zero = state.pop("world_size"), state.pop("zero")
        now = engine.zero_optimization_stage()
        if zero != now or (zero > 0 and world_size != self.world_size):
            raise UserError(
                f"{folder} was written by {world_size} ranks at ZeRO stage {zero}, this run has {self.world_size} at "
                f"stage {now}: continue with the former, or start a new run with another --run"
            )
        engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        if teacher:
            teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
        queue.load_state_dict(load_file(folder / "queue.safetensors"))
        progress = Progress(**state)
        progress.restarts += 1
        return progress

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, if there is one."""
        complete = sorted(path.parent for path in self.folder.glob("step-*/progress.json"))
        return complete[-1] if complete else None

    def export(self, model: SpeechImageModel, name: str, config: Config, progress: Progress) -> None:
        """Write the model and its processor to `RUN/export/NAME`, replacing what was there in one rename."""
        target = self.run / "export" / name
        fresh = target.with_name(f".{name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        model.save_pretrained(fresh)
        SpeechImageProcessor(image_size=config.data.image_size, max_seconds=config.data.max_seconds).save_pretrained(
            fresh
        )
        (fresh / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
        old = target.with_name(f".{name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _forget_old(self) -> None:
        complete = {path.parent for path in self.folder.glob("step-*/progress.json")}
        kept = sorted(complete)[-self.keep :]
        for path in self.folder.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that the marker is never there before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
