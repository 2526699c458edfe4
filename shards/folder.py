"""The folder that shards are written into: claimed by one process, and emptied again if the writing fails."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import UserError
from shards.manifest import INDEX, MANIFEST
from shards.report import REPORT

UNFINISHED = ".unfinished"  # marks a folder as one of ours while it is being written
_OURS = re.compile(rf"[\w-]+-\d{{6}}\.tar|.*\.tmp|{re.escape(INDEX)}|{re.escape(REPORT)}")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder while shards are written into it; what a failed or killed run left there is removed.

    Raises:
        UserError: another process writes there, it holds files that are not ours, or it cannot be written.
    """
    created = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = _claim(folder)
        try:
            _sweep(folder)
            yield
            created = []
        except BaseException:
            _sweep(folder)
            raise
        finally:
            (folder / UNFINISHED).unlink(missing_ok=True)
            os.close(marker)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    finally:
        for one in created:
            with suppress(OSError):  # not there, or not empty: someone else has use for it
                one.rmdir()


def _claim(folder: Path) -> int:
    """Lock the folder's mark, which its first writer makes while the folder is empty."""
    foreign = sorted(path.name for path in folder.iterdir())
    if foreign and UNFINISHED not in foreign:
        raise UserError(f"{folder} is not empty (it holds {foreign[0]}): give a new or empty folder as --out")
    marker = os.open(folder / UNFINISHED, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(marker)
        raise UserError(f"another make_shards is writing into {folder}: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    return marker


def _sweep(folder: Path) -> None:
    """Remove what writing shards leaves: the folder was empty when it was claimed first."""
    for path in folder.iterdir():
        if path.name == MANIFEST or _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
