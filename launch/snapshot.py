"""A copy of the code in the run folder: later edits do not change a job that is pending or restarted.

RUN/code/HASH/{toolkit,launch,shards}/   HASH of the content: the same code is copied once
RUN/code/HASH.json                       folder that was copied, and its state in git
"""

import hashlib
import json
import shutil
import time
import uuid
from pathlib import Path

from shards.errors import UserError
from shards.files import atomic_write
from toolkit.run_folder import git_state

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("toolkit", "launch", "shards")


def snapshot(run: Path, root: Path = ROOT) -> Path:
    """Copy the packages into a run folder, unless they are there.

    Args:
        run: Run folder.
        root: Folder of the packages.

    Returns:
        Absolute folder of the copy, for PYTHONPATH.

    Raises:
        UserError: The folder cannot be written, or an earlier copy was changed.
    """
    contents = read_code(root)
    target = snapshot_folder(run, contents)
    try:
        if not target.is_dir():
            _write(target, contents)
            origin = {"root": str(root), "time": time.time(), "git": git_state(root, *PACKAGES)}
            with atomic_write(target.with_suffix(".json")) as file:
                file.write(json.dumps(origin, indent=1).encode())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; name another with --run DIR") from None
    if snapshot_folder(run, read_code(target)) != target:
        raise UserError(f"{target}, the copy of the code, was changed: remove it and submit again")
    return target


def snapshot_folder(run: Path, contents: dict[str, bytes]) -> Path:
    """Return the absolute folder for a copy of this code; it need not exist."""
    return (run / "code" / digest(contents)).resolve()


def read_code(root: Path) -> dict[str, bytes]:
    """Return the files of the packages by their path from `root`, tracked or not, without caches and hidden files."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    names = {path: path.relative_to(root).parts for path in files}
    return {
        "/".join(parts): path.read_bytes()
        for path, parts in names.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in parts)
    }


def digest(contents: dict[str, bytes]) -> str:
    """Return twelve hex digits of the SHA-256 of names and contents."""
    total = hashlib.sha256()
    for name, content in sorted(contents.items()):
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:12]


def _write(target: Path, contents: dict[str, bytes]) -> None:
    """Write under a temporary name and rename: several may submit at once, and a copy is complete or absent."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    for name, content in contents.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # else another submission has just written the same code
            raise
