"""Named spans of a training step: a profile times them, and without a profile they cost nothing."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")

REST = "rest"  # time of a step outside all spans
_NOTHING = contextlib.nullcontext()
_recorder: "Recorder | None" = None


def span(name: str) -> contextlib.AbstractContextManager[None]:
    """Name the code inside; time in nested spans counts for the innermost."""
    return _NOTHING if _recorder is None else _recorder.span(name)


def spanned(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function with a span."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def named(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return named

    return decorate


class Recorder:
    """Attributes the time of steps to their spans, and labels the spans in a trace.

    On a GPU times are measured by events in its default stream: work of the host that overlaps with the GPU's costs
    nothing, and a wait counts for the span in which the stream waits. On a CPU times are the host's.

    Use it as a context around the steps, from the thread that trains; call `end_step` after each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: list[list[tuple[str, float | torch.cuda.Event]]] = []
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
                step[name] = step.get(name, 0.0) + _between(begin, end)
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


def _between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000
