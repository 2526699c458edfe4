"""The folder that shards are written into: who may write there, and what is kept or removed at the end.

While shards are written, the folder `.unfinished` in it holds the plan, a record of each finished shard, a lock for
each part of the run, and a lock that is held for moments only, while one of them comes or goes.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError
from shards.files import sync_folder
from shards.manifest import INDEX, MANIFEST, load
from shards.report import REPORT
from shards.writing.shard_record import Plan, load_plan
from shards.writing.sources import SOURCES, compare_lists

UNFINISHED = ".unfinished"
_TURNSTILE = "lock"
_OURS = re.compile("|".join([r"[\w-]+-\d{6,}\.tar", r".*\.tmp", *map(re.escape, (INDEX, REPORT, SOURCES, MANIFEST))]))


class Part(NamedTuple):
    """One of several runs that divide the shards of a corpus: of the shards in order, it writes every `of`-th."""

    number: int = 1  # from 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Part()


@contextmanager
def claimed(folder: Path, part: Part = WHOLE, plan: Plan | None = None, restart: bool = False) -> Iterator[None]:
    """Hold one part of a folder; finished shards are kept, whatever happens.

    At the end the notes are removed if there is a manifest, and everything is if no shard is finished.

    Args:
        folder: new, empty, or left unfinished by a run of the same plan.
        part: several may be held at once if they divide the shards alike.
        plan: of all shards; None to take over the one that is there.
        restart: remove what an earlier run has left: an unfinished one whatever its plan, or a finished one.

    Raises:
        UserError: another process writes there, it holds other files or another run's shards, or cannot be written.
    """
    created = [one for one in (folder, *folder.parents) if not os.path.exists(one)]
    claim = _Claim(folder, part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            claim.enter(plan, restart)
            yield
        finally:
            claim.leave()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    finally:
        for one in created:
            with suppress(OSError):  # not there, or not empty
                one.rmdir()


def finished(folder: Path) -> int:
    """How many shards of an unfinished folder are there for good."""
    return sum((folder / path.stem).exists() for path in (folder / UNFINISHED).glob("*.tar.json"))


def sweep(folder: Path, keep: Collection[str]) -> None:
    """Remove what writing shards leaves, but for some names: the folder was empty when it was claimed first."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove the notes of a run that was killed when it had just written the manifest."""
    if (folder / UNFINISHED).is_dir():
        with suppress(OSError):  # for instance of someone who may only read
            _Claim(folder, WHOLE).leave()


class _Claim:
    """What this process holds of a folder."""

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder, self.part = folder, part
        self.notes = folder / UNFINISHED
        self.path = self.notes / f"part-{part.number}-of-{part.of}.lock"
        self.lock: int | None = None

    def enter(self, plan: Plan | None, restart: bool) -> None:
        """Take the part's lock, sweep what a killed run left, and note the plan; `restart` removes finished shards too.

        Raises:
            UserError: Somebody else is at work here, or the folder holds what is not ours or is of another command.
        """
        if foreign := self._foreign(restart):
            raise UserError(f"{self.folder} is not empty (it holds {foreign[0]}): give a new or empty folder as --out")
        with _turnstile(self.notes):
            running = self._running()
            if clashing := [one for one in running if one == self.part or one.of != self.part.of]:
                which = "" if clashing[0] == WHOLE else f" (part {clashing[0]})"
                raise UserError(f"another make_shards is writing into {self.folder}{which}: wait for it, or stop it")
            if (self.folder / MANIFEST).exists() and not restart:
                raise UserError(f"{self.folder} has just been finished by another make_shards")
            self.lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            _flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep_temporary()
            if restart:
                # First, and for good: a folder with a manifest is taken for finished.
                (self.folder / MANIFEST).unlink(missing_ok=True)
                sync_folder(self.folder)
                _clear(self.folder)
            if plan:
                self._settle(plan, bool(running))

    def _foreign(self, restart: bool) -> list[str]:
        """What is in the folder and was not written by a run that this one may go on from or, to restart, remove."""
        names = {path.name for path in self.folder.iterdir()}
        if restart and MANIFEST in names:
            made = {shard.name for shard in load(self.folder).shards}
            return sorted(names - made - {MANIFEST, INDEX, REPORT, SOURCES, UNFINISHED})
        return [] if UNFINISHED in names else sorted(names)

    def _settle(self, plan: Plan, shared: bool) -> None:
        """Note the plan, unless a run of another one has something to lose."""
        earlier = load_plan(self.notes)
        change = plan.changed(earlier) if earlier else None
        if change and (shared or finished(self.folder)):
            raise UserError(
                f"{self.folder} holds shards of an unfinished run made with {change}: run that command again, "
                "give another --out, or begin anew with --restart"
            )
        if shared and earlier and plan.shards != earlier.shards:
            what = "; ".join(compare_lists(earlier.lists, plan.lists)) or "it says something else of its samples"
            raise UserError(
                f"another make_shards is writing into {self.folder}, and the corpus changed since it began ({what}): "
                "wait for it, or stop it, then run all parts again"
            )
        if change:
            _clear(self.folder)
        if plan != earlier:
            plan.save(self.notes)

    def leave(self) -> None:
        """Give the part up; the last one clears the notes of a finished folder, or all where nothing was finished."""
        if not self.notes.is_dir():
            return
        with _turnstile(self.notes) as locked:
            if self.lock is not None:
                self._sweep_temporary()
                self.path.unlink(missing_ok=True)
                os.close(self.lock)
                self.lock = None
            if self._running():
                return
            if (self.folder / MANIFEST).exists():
                shutil.rmtree(self.notes)
            elif not finished(self.folder) and (locked or self.part == WHOLE):  # else another part may be at work
                _clear(self.folder)
                shutil.rmtree(self.notes)

    def _running(self) -> list[Part]:
        """The parts that others hold."""
        running = []
        for path in self.notes.glob("part-*-of-*.lock"):
            if path == self.path and self.lock is not None:
                continue
            descriptor = os.open(path, os.O_RDWR)
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is None:
                running.append(Part(*map(int, re.findall(r"\d+", path.name))))
            os.close(descriptor)
        return running

    def _sweep_temporary(self) -> None:
        """Remove what a killed run of this part was about to write."""
        plan = load_plan(self.notes)
        ours = list(plan.shards)[self.part.number - 1 :: self.part.of] if plan else []
        for path in (*self.folder.glob("*.tmp"), *self.notes.glob("*.tmp")):
            name = path.name.rsplit(".", 2)[0]
            if self.part == WHOLE or name.removesuffix(".json") in ours:
                path.unlink(missing_ok=True)


@contextmanager
def _turnstile(notes: Path) -> Iterator[bool]:
    """Let one process at a time come or go; it gives whether the file system has locks."""
    while True:
        notes.mkdir(exist_ok=True)
        try:
            descriptor = os.open(notes / _TURNSTILE, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the last one has just removed the notes
            continue
        try:
            locked = _flock(descriptor, fcntl.LOCK_EX)
            if _still_there(descriptor, notes / _TURNSTILE):
                yield bool(locked)
                return
        finally:
            os.close(descriptor)


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _flock(descriptor: int, how: int) -> bool | None:
    """Lock a file: True; False if its file system has no locks; None if another process has locked it."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _clear(folder: Path) -> None:
    """Remove what writing shards leaves, but for the locks."""
    sweep(folder, ())
    for path in (folder / UNFINISHED).iterdir():
        if path.suffix != ".lock" and path.name != _TURNSTILE:
            path.unlink(missing_ok=True)
