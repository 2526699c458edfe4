"""Signals that ask a run to stop. They only set a flag; the ranks agree on it, save together and leave.

Clusters send them ahead of the end of a job's time, and when a job has to make room: to all its processes, to one, or
to each at another moment. That is why no rank acts on its own.
"""

import signal
import threading
from types import FrameType
from typing import Any

ASKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopSignals:
    """Which signal has asked this process to stop.

    Attributes:
        number: The first that came; 0 so far. More of them change nothing, also while the run is being saved.
    """

    def __init__(self) -> None:
        """Listen from now on; outside the main thread Python allows no handlers, and nothing is heard."""
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {asking: signal.signal(asking, self._hear) for asking in ASKING}

    def close(self) -> None:
        """Let the handlers be what they were."""
        for asking, handler in self._before.items():
            signal.signal(asking, handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
