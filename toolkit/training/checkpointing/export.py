"""Exports of a run: the model alone, as `save_pretrained` writes it, with its processor and model card.

RUN/export/{best,last}/   written asynchronously, replaced atomically
RUN/export/.best-...      an export that is being written, under a unique name
"""

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.files import read_object
from shards.writing.writer import Format
from toolkit.config.schema import Config
from toolkit.hub.card import write_card, write_modules
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.checkpointing.background import result_or_reason, run_in_background
from toolkit.training.checkpointing.progress import MARKER, Progress

logger = logging.getLogger(__name__)


class Exports:
    """The exports of one run folder; used by rank 0 only."""

    def __init__(
        self, run: Path, config: Config, stored: Mapping[str, Any], check_lease: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare to export.

        Args:
            run: The run folder.
            config: Its sections data and evaluation define how inputs are preprocessed.
            stored: Arguments of make_shards from the manifest, which define how stored pictures were preprocessed;
                default: those of make_shards.
            check_lease: Called before an export is renamed to its final name; raises if the run folder has another
                owner by now.
        """
        self.run, self.check_lease = run, check_lease
        default = Format()
        self.processor = SpeechImageProcessor(
            config.data.image_size,
            config.evaluation.max_seconds,
            resize=config.data.resize,
            short_side=stored.get("short_side", default.short_side),
            quality=stored.get("quality", default.quality),
        )
        self._pending: dict[str, Future[None]] = {}

    def save(
        self, model: SpeechImageModel, name: str, progress: Progress, masters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy the model and write it to `RUN/export/NAME` in a background thread.

        Waits for an earlier export of this name.

        Args:
            model: The model, with gathered parameters.
            name: Name of the export.
            progress: Written beside it.
            masters: The optimizer's weights by their names in the learner, on the CPU, which replace the model's; all
                weights are then written in float32. None: the model's weights in their precision.
        """
        self._wait_for_result(name)
        if progress.match_weight >= 0:
            model.config.match_weight = progress.match_weight
        state = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
        if masters is not None:
            state = {
                key: masters.get(f"model.{key}", value.float() if value.is_floating_point() else value)
                for key, value in state.items()
            }
        marker = asdict(progress)
        self._pending[name] = run_in_background(lambda: self._write(model, state, name, marker))

    def wait(self) -> None:
        """Wait for all exports that are being written; a failure is logged."""
        for name in list(self._pending):
            self._wait_for_result(name)

    def wait_for(self, name: str) -> None:
        """Wait for an export that is being written, whether it succeeds or fails; may be called from any thread."""
        if export := self._pending.get(name):
            result_or_reason(export)

    def best(self) -> tuple[float, int]:
        """Read recall and step of the best export on the disk, after a pending one; -1 and 0: there is none."""
        self._wait_for_result("best")
        try:
            marker = json.loads((self.run / "export" / "best" / MARKER).read_bytes())
            return float(marker["best"]), int(marker["best_step"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return -1.0, 0

    def _wait_for_result(self, name: str) -> None:
        """Wait for a pending export and log a failure.

        Its future is removed last: the thread that completes a checkpoint may wait for it as well.
        """
        if export := self._pending.get(name):
            reason = result_or_reason(export)
            del self._pending[name]
            if isinstance(reason, str):
                folder = self.run / "export" / name
                logger.warning("the model was not written to %s: %s; training goes on", folder, reason)

    def _write(self, model: SpeechImageModel, state: dict[str, Tensor], name: str, progress: dict[str, Any]) -> None:
        target = self.run / "export" / name
        fresh, old = (target.with_name(f".{name}-{uuid.uuid4().hex[:8]}") for _ in "12")
        try:
            precisions = {value.dtype for value in state.values() if value.is_floating_point()}
            model.save_pretrained(fresh, state_dict=state)  # which empties it
            if precisions == {torch.float32}:
                _set_dtype(fresh / "config.json", "float32")
            self.processor.save_pretrained(fresh)
            (fresh / MARKER).write_text(json.dumps(progress, indent=1))
            write_modules(fresh)
            write_card(fresh, self.run.name)
            self.check_lease()
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # after a failure: frees the disk for the log
        for left in target.parent.glob(f".{name}-*"):  # the replaced export, and remains of killed processes
            shutil.rmtree(left, ignore_errors=True)


def exported_config(run: Path) -> dict[str, Any] | None:
    """Read the config.json of a run's export; None: there is none so far."""
    configs = (read_object(run / "export" / name / "config.json") for name in ("last", "best"))
    return next(filter(None, configs), None)


def _set_dtype(path: Path, name: str) -> None:
    """Set the dtype in config.json to that of the written weights; transformers writes the model's."""
    if path.is_file():
        values = json.loads(path.read_text())
        for key in {"dtype", "torch_dtype"} & values.keys():
            values[key] = name
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
