"""Logging of every command: one format, rank 0 unless another rank has a warning, `--log-level` for more or less.

Modules log through `logging.getLogger(__name__)`. The results of a command (tables, JSON) are printed.
"""

import argparse
import contextlib
import logging
import os
import sys

LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("shards", "toolkit", "launch", "__main__")  # the last: a command that runs as a script


def setup_logging(level: str = "info", rank: int | None = None) -> None:
    """Send the project's log records to the terminal: information to standard output, warnings to standard error.

    The root logger is left alone, so that other packages log as they did.

    Args:
        level: One of `LEVELS`; debug records name their module.
        rank: This process; default: what the launcher says. Ranks above 0 log warnings and errors only, and at level
            debug everything; their records name the rank.
    """
    rank = int(os.environ.get("RANK") or 0) if rank is None else rank
    lowest = logging.getLevelName(level.upper())
    if rank and level != "debug":
        lowest = max(lowest, logging.WARNING)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, TerminalHandler)]
        logger.addHandler(TerminalHandler(rank))
        logger.setLevel(lowest)


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """Add `--log-level` to a command line."""
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="least severe messages that are shown")


class TerminalHandler(logging.Handler):
    """Writes a record as one readable line; a full disk or a closed pipe ends no run."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Information stands alone; other levels are named, and so are other ranks."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        module = f"{record.name}: " if record.levelno == logging.DEBUG else ""
        rank = f"rank {self.rank}: " if self.rank else ""
        return f"{level}{module}{rank}{super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        """Write to the streams of the moment, which a test or a notebook may have replaced."""
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        with contextlib.suppress(OSError):
            print(self.format(record), file=stream, flush=True)
