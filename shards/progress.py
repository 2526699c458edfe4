"""Progress of a command: a bar in a terminal, otherwise a log line now and then, both with the time left."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0  # seconds between log lines

Progress = Callable[[int], object]  # called with the number of units done since the last call


@contextmanager
def progress_bar(total: int, unit: str, title: str = "", show: bool = True, leave: bool = True) -> Iterator[Progress]:
    """Show progress until the end of the `with` statement.

    Args:
        total: Number of units.
        unit: Name of the units, in the plural.
        title: Shown before the numbers.
        show: Whether to show anything.
        leave: Whether the bar of a terminal stays visible at the end.

    Yields:
        A function to call with the number of units done since the last call.
    """
    if not show:
        yield lambda done: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=title or None, total=total, unit=f" {unit}", dynamic_ncols=True, leave=leave) as bar:
            yield bar.update
    else:
        yield _LoggedProgress(total, unit, f"{title}: " if title else "").update


def progress_range(total: int, unit: str, title: str = "", show: bool = True) -> Iterator[int]:
    """Yield the numbers below `total` and show progress; see `progress_bar`."""
    with progress_bar(total, unit, title, show, leave=False) as progress:
        for number in range(total):
            yield number
            progress(1)


class _LoggedProgress:
    """Counts units, and logs a line if the last one is old."""

    def __init__(self, total: int, unit: str, prefix: str) -> None:
        self.total, self.unit, self.prefix = total, unit, prefix
        self.done = self.logged_done = 0
        self.logged_at = time.monotonic()

    def update(self, done: int) -> None:
        """Count `done` more units."""
        self.done += done
        now = time.monotonic()
        if now - self.logged_at < LOG_INTERVAL:
            return
        # From the pace since the last line, as units kept from an earlier run take no time.
        left = (now - self.logged_at) * (self.total - self.done) / max(1, self.done - self.logged_done)
        self.logged_at, self.logged_done = now, self.done
        logger.info(
            "%s%s of %s %s, %.1f minutes left", self.prefix, f"{self.done:,}", f"{self.total:,}", self.unit, left / 60
        )
