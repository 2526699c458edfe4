"""The one exception for a user's mistake, printed as one line with exit code 2; and a command line that raises it."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and how to mend it, in one line."""


class Parser(argparse.ArgumentParser):
    """A command line whose complaint is one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a `UserError`."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` ends it with its message on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
