"""Exports of a run: the model alone, as `save_pretrained` writes it, with its processor.

RUN/export/{best,last}/   written behind the training, in place of what was there
"""

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.config import Data
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.background import background, outcome_of
from toolkit.training.progress import MARKER, Progress


class Exports:
    """The exports of one run folder; used by rank 0 only."""

    def __init__(self, run: Path, data: Data) -> None:
        """Prepare to export.

        Args:
            run: The run folder.
            data: What the processor is to know.
        """
        self.run = run
        self.processor = SpeechImageProcessor(image_size=data.image_size, max_seconds=data.max_seconds)
        self._under_way: dict[str, Future[None]] = {}

    def write(self, model: SpeechImageModel, name: str, progress: Progress) -> None:
        """Copy the model and have it written to `RUN/export/NAME`; a former one of this name is waited for.

        Args:
            model: With whole parameters.
            name: Of the export.
            progress: Written beside it.
        """
        self._settle(name)
        state = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
        so_far = asdict(progress)
        self._under_way[name] = background(lambda: self._write(model, state, name, so_far))

    def finish(self) -> None:
        """Wait for all that is still being written."""
        for name in list(self._under_way):
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Wait for an export under way; a failure is one line."""
        export = self._under_way.pop(name, None)
        if export and isinstance(reason := outcome_of(export), str):
            print(f"the model was not written to {self.run / 'export' / name}: {reason}; training goes on", flush=True)

    def _write(self, model: SpeechImageModel, state: dict[str, Tensor], name: str, progress: dict[str, Any]) -> None:
        target = self.run / "export" / name
        fresh, old = target.with_name(f".{name}.new"), target.with_name(f".{name}.old")
        shutil.rmtree(fresh, ignore_errors=True)
        model.save_pretrained(fresh, state_dict=state)
        self.processor.save_pretrained(fresh)
        (fresh / MARKER).write_text(json.dumps(progress, indent=1))
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
