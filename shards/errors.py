"""The one exception for a user's mistake, printed as one line with exit code 2; and a command line that raises it."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and how to mend it, in one line.

    Attributes:
        code: Exit code of a process that it ends.
    """

    code = 2


class TransientError(UserError):
    """What may go well if it is tried again: a disk that did not answer, a process that the system has killed.

    The exit code is a stalled run's (see `toolkit/training/fault_tolerance/watchdog.py`): a job on a cluster starts
    again.
    """

    code = 70


class Parser(argparse.ArgumentParser):
    """A command line whose complaint is one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a `UserError`."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` ends it with its message on stderr and the error's exit code."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
