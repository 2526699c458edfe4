"""Exports of a run: the model alone, as `save_pretrained` writes it, with its processor.

RUN/export/{best,last}/   written behind the training, in place of what was there
RUN/export/.best-...      one that is being written; the name is of this attempt alone
"""

import json
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.config import Data
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.background import background, outcome_of, tell
from toolkit.training.progress import MARKER, Progress


class Exports:
    """The exports of one run folder; used by rank 0 only.

    Attributes:
        fence: Called before an export takes its name; raises if the folder is another run's by now.
    """

    def __init__(self, run: Path, data: Data) -> None:
        """Prepare to export.

        Args:
            run: The run folder.
            data: What the processor is to know.
        """
        self.run = run
        self.processor = SpeechImageProcessor(data.image_size, data.max_seconds, resize=data.resize)
        self._under_way: dict[str, Future[None]] = {}
        self.fence: Callable[[], None] = lambda: None

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
        """Wait for an export under way and forget it; a failure is one line."""
        export = self._under_way.pop(name, None)
        if export and isinstance(reason := outcome_of(export), str):
            tell(f"the model was not written to {self.run / 'export' / name}: {reason}; training goes on")

    def _write(self, model: SpeechImageModel, state: dict[str, Tensor], name: str, progress: dict[str, Any]) -> None:
        target = self.run / "export" / name
        fresh, old = (target.with_name(f".{name}-{uuid.uuid4().hex[:8]}") for _ in "12")
        try:
            model.save_pretrained(fresh, state_dict=state)
            self.processor.save_pretrained(fresh)
            (fresh / MARKER).write_text(json.dumps(progress, indent=1))
            self.fence()
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # of one that failed: room for those who write the log
        for left in target.parent.glob(f".{name}-*"):  # the one before, and what exports that were cut short have left
            shutil.rmtree(left, ignore_errors=True)
