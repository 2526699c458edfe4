"""Signals that request a run to stop: they set a flag, which the ranks reduce each step; then all save and exit.

Clusters send them before a job's time limit or a preemption: to all of its processes, to one, or to each at another
time. Therefore no rank acts alone.
"""

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopSignals:
    """Records the signal that requested this process to stop.

    Attributes:
        number: The first signal received; 0: none. Further signals have no effect, also while the run is being saved.
    """

    def __init__(self) -> None:
        """Install the handlers; outside the main thread Python allows none, and no signal is recorded."""
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._record) for signum in STOP_SIGNALS}

    def close(self) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
