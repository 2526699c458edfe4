"""Errors that the user can correct, printed as one line, and the exit codes of every command."""

import argparse
import enum
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn


class ExitCode(enum.IntEnum):
    """Exit codes of commands and ranks; the batch script decides by them whether a job is requeued."""

    ERROR = 1  # any other error
    USER_ERROR = 2  # a mistake in the configuration, the data or the command: never requeued
    PEER_LOST = 69  # EX_UNAVAILABLE: failed because another rank was gone: requeued
    TRANSIENT = 70  # EX_SOFTWARE: ended by the watchdog, or by an error that a retry may cure: requeued
    REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal, saved but not complete: requeued
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it
    OUTPUT_CLOSED = 141  # 128 + SIGPIPE, likewise: the reader of the output, such as head, has ended
    CONTAINER = 255  # the container's runtime failed


class UserError(Exception):
    """An error that the user can correct: the message says what is wrong, where, and how to correct it, in one line.

    Attributes:
        code: Exit code of a process that it ends.
    """

    code = ExitCode.USER_ERROR


class TransientError(UserError):
    """An error that a retry may cure, such as a disk that did not answer: a job on a cluster is requeued."""

    code = ExitCode.TRANSIENT


class Parser(argparse.ArgumentParser):
    """A command line that reports a wrong option in one line, like any other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` with the message."""
        raise UserError(f"{message} (see {self.prog} --help)")


def whole_number(low: int, high: int = 10**9) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number between bounds."""

    def number(text: str) -> int:
        if text.isdecimal() and low <= int(text) <= high:
            return int(text)
        bounds = f"from {low} to {high}" if high < 10**9 else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")

    return number


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` ends it with its message on stderr and the error's exit code."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        if not _output_is_closed():  # another pipe, such as a worker's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else python's own flush at exit fails
        sys.exit(ExitCode.OUTPUT_CLOSED)


def _output_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported always
    return any(event & select.POLLERR for _, event in poll.poll(0))
