"""Named spans of a training step: a profile times them, and without a profile they take about a microsecond."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch.profiler import record_function

REST = "rest"  # time of a step outside all spans
_recorder: "Recorder | None" = None


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Name the code inside, or a decorated function; time in nested spans counts for the innermost."""
    with _recorder.span(name) if _recorder else contextlib.nullcontext():
        yield


class Recorder:
    """Attributes the time of steps to their spans, and labels the spans in a trace.

    On a GPU times are measured by events in its default stream: work of the host that overlaps with the GPU's costs
    nothing, and a wait counts for the span in which the stream waits. On a CPU times are the host's.

    Use it as a context around the steps, from the thread that trains; call `end_step` after each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: list[list[tuple[str, Any]]] = []  # span and time or event
        self._open = REST

    def __enter__(self) -> "Recorder":
        global _recorder
        _recorder = self
        self._steps.append([])
        self._mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _recorder
        _recorder = None

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time and label the code inside, see the function `span`."""
        self._mark()
        outer, self._open = self._open, name
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self._open = outer

    def end_step(self) -> None:
        """End a step and begin the next."""
        self._mark()
        self._steps.append([])
        self._mark()

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each step by span, including `rest`: they add up to the step. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = []
        for marks in self._steps[:-1]:
            step: dict[str, float] = {}
            for (_, begin), (name, end) in itertools.pairwise(marks):
                seconds = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
                step[name] = step.get(name, 0.0) + seconds
            steps.append(step)
        return steps

    def _mark(self) -> None:
        """Attribute the time since the last mark to the open span."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._steps[-1].append((self._open, event))
        else:
            self._steps[-1].append((self._open, time.perf_counter()))
