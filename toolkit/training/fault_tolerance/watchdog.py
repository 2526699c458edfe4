"""Watchdog of a rank: if no step completes in time, it dumps the stacks of all threads and ends the process."""

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

_FIRST = 4  # factor of the timeout for the first step, which compiles, opens files and fills the loader
_LINGER = 5.0  # seconds between dump and exit: a launcher ends all ranks with the first, and all should dump


class Watchdog:
    """A thread that ends the process when `beat` is not called for a while.

    Every rank has one. The ranks synchronize in each step, so that if one stalls, all dump their stacks.
    """

    def __init__(self, run: Path, rank: int, timeout: float) -> None:
        """Prepare; watching begins on entering the context.

        Args:
            run: The run folder; `stacks-rankN.txt` is written there.
            rank: This process.
            timeout: Seconds that a step may take; 0 disables the watchdog.
        """
        self.path, self.rank, self.timeout = run / f"stacks-rank{rank}.txt", rank, timeout
        self._deadline = 0.0
        self._paused = 0
        self._end = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._deadline = time.monotonic() + _FIRST * self.timeout
        self._end.clear()
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()

    def beat(self) -> None:
        """Restart the timeout: a step is complete."""
        self._deadline = time.monotonic() + self.timeout

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the timeout for the code inside, such as evaluating and saving."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat()
            self._paused -= 1

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.timeout / 10)):
            if not self._paused and time.monotonic() > self._deadline:
                self._dump()
                time.sleep(_LINGER)
                os._exit(ExitCode.TRANSIENT)

    def _dump(self) -> None:
        line = f"rank {self.rank}: no step was completed for {self.timeout:g} s (--training.watchdog); all threads:"
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)  # the file descriptor, even if sys.stderr was replaced
        with contextlib.suppress(OSError), self.path.open("w") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=file, flush=True)
            faulthandler.dump_traceback(file)
