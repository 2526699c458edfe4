"""A copy of the code in the run folder: what is edited later does not change a job that waits or is started again.

RUN/code/HASH/{toolkit,launch,shards}/   HASH is of the content: the same code is copied once
RUN/code/HASH.json                       where it was copied from, and git's state there
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path

from shards.errors import UserError
from toolkit.run_folder import git_state

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("toolkit", "launch", "shards")


def snapshot(run: Path, root: Path = ROOT) -> Path:
    """Copy the packages into a run folder, if they are not there yet.

    Args:
        run: The run folder.
        root: Holds the packages.

    Returns:
        The folder that holds the copy, absolute: what PYTHONPATH takes.

    Raises:
        UserError: The folder cannot be written, or the copy that is there was changed.
    """
    contents = read_code(root)
    target = place(run, contents)
    try:
        if not target.is_dir():
            _write(target, contents)
            _write_origin(target.with_suffix(".json"), root)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; name another with --run DIR") from None
    if place(run, read_code(target)) != target:
        raise UserError(f"{target}, the copy of the code, was changed: remove it, and it is made again")
    return target


def place(run: Path, contents: dict[str, bytes]) -> Path:
    """The folder, absolute, of the copy of what `read_code` gave; it need not be there."""
    return (run / "code" / digest(contents)).resolve()


def read_code(root: Path) -> dict[str, bytes]:
    """The files of the packages by their path from `root`, whether git knows them or not; no caches, nothing hidden."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    names = {path: path.relative_to(root).parts for path in found}
    return {
        "/".join(parts): path.read_bytes()
        for path, parts in names.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in parts)
    }


def digest(contents: dict[str, bytes]) -> str:
    """Twelve hex digits of the names and contents."""
    total = hashlib.sha256()
    for name, content in sorted(contents.items()):
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:12]


def _write(target: Path, contents: dict[str, bytes]) -> None:
    """Write under another name first: several may submit at once, and a copy is whole or not there."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    for name, content in contents.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # else another submission of the same code was first
            raise


def _write_origin(path: Path, root: Path) -> None:
    origin = {
        "root": str(root),
        "time": time.time(),
        "git": git_state(root, *PACKAGES),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(origin, indent=1))
    temporary.replace(path)
