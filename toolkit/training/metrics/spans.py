"""Names for the parts of a training step: a profile reads from them where the time goes, and no one else pays."""

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

REST = "rest"  # of a step: what is in no span
_NOTHING = contextlib.nullcontext()
_recorder: "Recorder | None" = None


def span(name: str) -> contextlib.AbstractContextManager[None]:
    """Name what is done inside; of spans in one another the innermost counts."""
    return _NOTHING if _recorder is None else _recorder.span(name)


def spanned(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same for all of a function."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def named(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return named

    return decorate


class Recorder:
    """Shares out the time of whole steps among the spans, and labels them in a trace.

    On a GPU the times are those of its default stream, taken by events in it: what the host does while the GPU still
    has work costs nothing, and waiting shows where the stream waits. Elsewhere they are the host's.

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
        """See the function of this name."""
        self._mark()
        outer, self._open = self._open, name
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self._open = outer

    def end_step(self) -> None:
        """What follows is of the next step."""
        self._mark()
        self._steps.append([])
        self._mark()

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each step by span, `rest` among them: they add up to the whole. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for marks in self._steps[:-1]:
            step: dict[str, float] = {}
            for (_, begin), (name, end) in itertools.pairwise(marks):
                step[name] = step.get(name, 0.0) + _between(begin, end)
            found.append(step)
        return found

    def _mark(self) -> None:
        """Note that what was done since the last mark belongs to the span that is open."""
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
