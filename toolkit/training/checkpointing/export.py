"""Exports of a run: the model alone, as `save_pretrained` writes it, with its processor.

RUN/export/{best,last}/   written behind the training, in place of what was there
RUN/export/.best-...      one that is being written; the name is of this attempt alone
"""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.writing.writer import Format
from toolkit.config.schema import Config
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.checkpointing.background import background, outcome_of, tell
from toolkit.training.checkpointing.progress import MARKER, Progress


class Exports:
    """The exports of one run folder; used by rank 0 only.

    Attributes:
        fence: Called before an export takes its name; raises if the folder is another run's by now.
    """

    def __init__(self, run: Path, config: Config, stored: Mapping[str, Any]) -> None:
        """Prepare to export.

        Args:
            run: The run folder.
            config: Sections data and evaluation say how inputs are prepared.
            stored: Arguments of make_shards from the manifest, which say how pictures were; where they do not, the
                defaults hold.
        """
        self.run = run
        default = Format()
        self.processor = SpeechImageProcessor(
            config.data.image_size,
            config.evaluation.max_seconds,
            resize=config.data.resize,
            short_side=stored.get("short_side", default.short_side),
            quality=stored.get("quality", default.quality),
        )
        self._under_way: dict[str, Future[None]] = {}
        self.check_lease: Callable[[], None] = lambda: None

    def write(
        self, model: SpeechImageModel, name: str, progress: Progress, masters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy the model and have it written to `RUN/export/NAME`; a former one of this name is waited for.

        Args:
            model: With whole parameters.
            name: Of the export.
            progress: Written beside it.
            masters: The optimizer's weights by their names in the learner, on the CPU, to be written in place of the
                model's; then all is written in float32. None: the model as it is.
        """
        self._settle(name)
        if progress.match_weight >= 0:
            model.config.match_weight = progress.match_weight
        state = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
        if masters is not None:
            state = {
                key: masters.get(f"model.{key}", value.float() if value.is_floating_point() else value)
                for key, value in state.items()
            }
        so_far = asdict(progress)
        self._under_way[name] = background(lambda: self._write(model, state, name, so_far))

    def finish(self) -> None:
        """Wait for all that is still being written."""
        for name in list(self._under_way):
            self._settle(name)

    def wait(self, name: str) -> None:
        """Wait for an export under way, whatever comes of it; from any thread."""
        if export := self._under_way.get(name):
            outcome_of(export)

    def best(self) -> tuple[float, int]:
        """Recall and step of the best export on the disk, once none is under way; -1 and 0 where there is none."""
        self._settle("best")
        try:
            found = json.loads((self.run / "export" / "best" / MARKER).read_bytes())
            return float(found["best"]), int(found["best_step"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return -1.0, 0

    def _settle(self, name: str) -> None:
        """Wait for an export under way and forget it; a failure is one line.

        Forgotten last: the thread that completes a checkpoint may still have to wait for it.
        """
        if export := self._under_way.get(name):
            reason = outcome_of(export)
            del self._under_way[name]
            if isinstance(reason, str):
                tell(f"the model was not written to {self.run / 'export' / name}: {reason}; training goes on")

    def _write(self, model: SpeechImageModel, state: dict[str, Tensor], name: str, progress: dict[str, Any]) -> None:
        target = self.run / "export" / name
        fresh, old = (target.with_name(f".{name}-{uuid.uuid4().hex[:8]}") for _ in "12")
        try:
            precisions = {value.dtype for value in state.values() if value.is_floating_point()}
            model.save_pretrained(fresh, state_dict=state)  # which empties it
            if precisions == {torch.float32}:
                _name_precision(fresh / "config.json", "float32")
            self.processor.save_pretrained(fresh)
            (fresh / MARKER).write_text(json.dumps(progress, indent=1))
            self.check_lease()
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # of one that failed: room for those who write the log
        for left in target.parent.glob(f".{name}-*"):  # the one before, and what exports that were cut short have left
            shutil.rmtree(left, ignore_errors=True)


def exported_config(run: Path) -> dict[str, Any] | None:
    """Read the config.json of what a run has exported; None: nothing so far."""
    for name in ("last", "best"):
        try:
            said = json.loads((run / "export" / name / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(said, dict):
            return said
    return None


def _name_precision(path: Path, name: str) -> None:
    """Let config.json name the precision of the weights that were written: transformers names that of the model."""
    if path.is_file():
        said = json.loads(path.read_text())
        for key in {"dtype", "torch_dtype"} & said.keys():
            said[key] = name
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
