"""Collects the messages that a user would see."""

import logging


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def collect_lines() -> list[str]:
    """Return a list that gets the messages of the toolkit's loggers in this process from now on."""
    lines: list[str] = []
    logger = logging.getLogger("toolkit")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Collector)]
    logger.addHandler(_Collector(lines))
    logger.setLevel(logging.INFO)
    return lines
