"""The watchdog of a rank: when no step completes for long, it shows where every thread stands, and ends the process."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from shards.errors import ExitCode

_FIRST = 4  # times the patience for the first step, which compiles, opens files and fills the loader
_LINGER = 5.0  # seconds between the stacks and the end: a launcher ends all ranks with the first, and all are to speak


class Watchdog:
    """A thread that ends the process when `beat` is not called for a while.

    Every rank has one. The ranks wait for one another in each step, so that if one stalls, all tell where they stand.
    """

    def __init__(self, run: Path, rank: int, patience: float) -> None:
        """Prepare; the watch begins with `with`.

        Args:
            run: The run folder, which gets `stacks-rankN.txt`.
            rank: This process.
            patience: Seconds that a step may take; 0 watches nothing.
        """
        self.path, self.rank, self.patience = run / f"stacks-rank{rank}.txt", rank, patience
        self._deadline = 0.0
        self._paused = 0
        self._end = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._deadline = time.monotonic() + _FIRST * self.patience
        self._end.clear()
        if self.patience:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()

    def beat(self) -> None:
        """A step is complete."""
        self._deadline = time.monotonic() + self.patience

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what is inside: evaluating and saving take as long as they take."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat()
            self._paused -= 1

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.patience / 10)):
            if not self._paused and time.monotonic() > self._deadline:
                self._tell()
                time.sleep(_LINGER)
                os._exit(ExitCode.STALLED)

    def _tell(self) -> None:
        line = f"rank {self.rank}: no step was completed for {self.patience:g} s (--training.watchdog); all threads:"
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)  # standard error itself, whatever stands for it in Python
        with contextlib.suppress(OSError), self.path.open("w") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=file, flush=True)
            faulthandler.dump_traceback(file)
