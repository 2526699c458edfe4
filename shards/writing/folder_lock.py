"""Locks on the folder that shards are written to, and the removal of temporary and unfinished files.

While shards are written, the subfolder `.unfinished` contains the plan, a record of each finished shard, a lock for
each part of the run, and a lock that is held briefly while a part starts or ends.
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
from shards.files import sync
from shards.manifest import INDEX, MANIFEST, load
from shards.report import REPORT
from shards.writing.shard_record import WritingPlan, load_plan
from shards.writing.sources import SOURCES, compare_lists

UNFINISHED = ".unfinished"
_FOLDER_LOCK = "lock"
_NAMES = (INDEX, REPORT, SOURCES, MANIFEST)
_SHARD_FILES = re.compile("|".join([r"[\w-]+-\d{6,}\.tar", r".*\.tmp", *map(re.escape, _NAMES)]))


class Part(NamedTuple):
    """One of several runs that divide the shards of a corpus; it writes every `of`-th shard."""

    number: int = 1  # from 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


ALL = Part()


@contextmanager
def claim_folder(
    folder: Path, part: Part = ALL, plan: WritingPlan | None = None, restart: bool = False
) -> Iterator[None]:
    """Lock one part of a folder for writing; finished shards are always kept.

    On exit, the notes are removed if there is a manifest, and all files if no shard is finished.

    Args:
        folder: A new or empty folder, or that of an unfinished run with the same plan.
        part: Several parts may be locked at the same time if all have the same `of`.
        plan: Plan of all shards; None: the plan in the folder.
        restart: Remove the shards of an earlier run, finished, or unfinished with any plan.

    Raises:
        UserError: Another process writes to the folder, it contains other files or shards, or it cannot be written.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    claim = _Claim(folder, part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            claim.acquire(plan, restart)
            yield
        finally:
            claim.release()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    finally:
        for path in created:
            with suppress(OSError):  # missing, or not empty
                path.rmdir()


def count_finished(folder: Path) -> int:
    """Return the number of finished shards of an unfinished folder."""
    return sum((folder / path.stem).exists() for path in (folder / UNFINISHED).glob("*.tar.json"))


def remove_shard_files(folder: Path, keep: Collection[str]) -> None:
    """Remove the files of shards except some names; the folder was empty before, so no other files are affected."""
    for path in folder.iterdir():
        if _SHARD_FILES.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the notes of a run that was killed right after it wrote the manifest."""
    if (folder / UNFINISHED).is_dir():
        with suppress(OSError):  # for instance without permission to write
            _Claim(folder, ALL).release()


class _Claim:
    """The lock of this process on one part of a folder."""

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder, self.part = folder, part
        self.notes = folder / UNFINISHED
        self.path = self.notes / f"part-{part.number}-of-{part.of}.lock"
        self.lock: int | None = None

    def acquire(self, plan: WritingPlan | None, restart: bool) -> None:
        """Lock the part, remove files of a killed run, and store the plan; `restart` removes finished shards too.

        Raises:
            UserError: Another process writes to the folder, or it contains other files or another command's shards.
        """
        if foreign := self._foreign_files(restart):
            raise UserError(
                f"{self.folder} is not empty (it contains {foreign[0]}): give a new or empty folder as --out"
            )
        with _lock_folder(self.notes):
            running = self._running()
            if conflicts := [part for part in running if part == self.part or part.of != self.part.of]:
                which = "" if conflicts[0] == ALL else f" (part {conflicts[0]})"
                raise UserError(f"another make_shards is writing to {self.folder}{which}: wait for it, or stop it")
            if (self.folder / MANIFEST).exists() and not restart:
                raise UserError(f"{self.folder} has just been finished by another make_shards")
            self.lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            _flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove_temporary()
            if restart:
                # First and durably, since a folder with a manifest counts as finished.
                (self.folder / MANIFEST).unlink(missing_ok=True)
                sync(self.folder)
                _remove_all(self.folder)
            if plan:
                self._store_plan(plan, bool(running))

    def _foreign_files(self, restart: bool) -> list[str]:
        """Return files that were not written by a run that this one may resume or, with `restart`, replace."""
        names = {path.name for path in self.folder.iterdir()}
        if restart and MANIFEST in names:
            shards = {shard.name for shard in load(self.folder).shards}
            return sorted(names - shards - {MANIFEST, INDEX, REPORT, SOURCES, UNFINISHED})
        return [] if UNFINISHED in names else sorted(names)

    def _store_plan(self, plan: WritingPlan, shared: bool) -> None:
        """Store the plan, unless shards of another plan are finished or being written."""
        earlier = load_plan(self.notes)
        change = plan.difference(earlier) if earlier else None
        if change and (shared or count_finished(self.folder)):
            raise UserError(
                f"{self.folder} contains shards of an unfinished run made with {change}: run that command again, "
                "give another --out, or start over with --restart"
            )
        if shared and earlier and plan.shards != earlier.shards:
            what = "; ".join(compare_lists(earlier.lists, plan.lists)) or "it describes its samples differently"
            raise UserError(
                f"another make_shards is writing to {self.folder}, and the corpus changed since it started ({what}): "
                "wait for it, or stop it, then run all parts again"
            )
        if change:
            _remove_all(self.folder)
        if plan != earlier:
            plan.save(self.notes)

    def release(self) -> None:
        """Unlock the part; the last one removes the notes of a finished folder, or all if no shard is finished."""
        if not self.notes.is_dir():
            return
        with _lock_folder(self.notes) as locked:
            if self.lock is not None:
                self._remove_temporary()
                self.path.unlink(missing_ok=True)
                os.close(self.lock)
                self.lock = None
            if self._running():
                return
            if (self.folder / MANIFEST).exists():
                shutil.rmtree(self.notes)
            elif not count_finished(self.folder) and (
                locked or self.part == ALL
            ):  # without locks, parts may be running
                _remove_all(self.folder)
                shutil.rmtree(self.notes)

    def _running(self) -> list[Part]:
        """Return the parts that other processes have locked."""
        running = []
        for path in self.notes.glob("part-*-of-*.lock"):
            if path == self.path and self.lock is not None:
                continue
            descriptor = os.open(path, os.O_RDWR)
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is None:
                running.append(Part(*map(int, re.findall(r"\d+", path.name))))
            os.close(descriptor)
        return running

    def _remove_temporary(self) -> None:
        """Remove the temporary files of a killed run of this part."""
        plan = load_plan(self.notes)
        own_shards = list(plan.shards)[self.part.number - 1 :: self.part.of] if plan else []
        for path in (*self.folder.glob("*.tmp"), *self.notes.glob("*.tmp")):
            name = path.name.rsplit(".", 2)[0]
            if self.part == ALL or name.removesuffix(".json") in own_shards:
                path.unlink(missing_ok=True)


@contextmanager
def _lock_folder(notes: Path) -> Iterator[bool]:
    """Exclude other processes from starting or ending; yields whether the file system supports locks."""
    while True:
        notes.mkdir(exist_ok=True)
        try:
            descriptor = os.open(notes / _FOLDER_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has just removed the notes
            continue
        try:
            locked = _flock(descriptor, fcntl.LOCK_EX)
            if _is_same_file(descriptor, notes / _FOLDER_LOCK):
                yield bool(locked)
                return
        finally:
            os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _flock(descriptor: int, how: int) -> bool | None:
    """Lock a file: True; False if its file system has no locks; None if another process holds the lock."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _remove_all(folder: Path) -> None:
    """Remove all files of a run except the locks."""
    remove_shard_files(folder, ())
    for path in (folder / UNFINISHED).iterdir():
        if path.suffix != ".lock" and path.name != _FOLDER_LOCK:
            path.unlink(missing_ok=True)
