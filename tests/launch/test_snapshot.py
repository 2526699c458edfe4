"""The copy of the code: complete, named by its content, and imported before the working directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.snapshot import PACKAGES, ROOT, read_code, snapshot
from shards.errors import UserError


@pytest.fixture
def source(tmp_path):
    """A small tree in place of the repository."""
    for package in PACKAGES:
        (tmp_path / "source" / package / "inner").mkdir(parents=True)
        (tmp_path / "source" / package / "__init__.py").write_text("NAME = 'before'\n")
        (tmp_path / "source" / package / "inner" / "values.yaml").write_text("a: 1\n")
    return tmp_path / "source"


def test_the_same_code_is_copied_once(source, tmp_path):
    first = snapshot(tmp_path / "run", source)
    made = first.stat().st_mtime_ns
    (source / "toolkit" / "__pycache__").mkdir()
    (source / "toolkit" / "__pycache__" / "x.pyc").write_bytes(b"1")
    (source / "toolkit" / ".hidden").write_text("x")
    assert snapshot(tmp_path / "run", source) == first
    assert first.stat().st_mtime_ns == made
    assert read_code(first) == read_code(source)
    assert [path.name for path in first.rglob("*") if path.suffix == ".pyc" or path.name == ".hidden"] == []


def test_an_edit_makes_another_copy_and_leaves_the_first(source, tmp_path):
    first = snapshot(tmp_path / "run", source)
    (source / "launch" / "__init__.py").write_text("NAME = 'after'\n")
    second = snapshot(tmp_path / "run", source)
    assert second != first
    assert (first / "launch" / "__init__.py").read_text() == "NAME = 'before'\n"
    shutil.move(source / "shards" / "__init__.py", source / "shards" / "other.py")
    assert snapshot(tmp_path / "run", source) not in (first, second)


def test_a_copy_that_was_changed_is_refused(source, tmp_path):
    copy = snapshot(tmp_path / "run", source)
    (copy / "shards" / "__init__.py").write_text("changed")
    with pytest.raises(UserError, match="was changed"):
        snapshot(tmp_path / "run", source)


def test_a_copy_is_complete_or_absent(source, tmp_path, monkeypatch):
    def full(path, content):
        if path.name == "values.yaml":
            raise OSError(28, "No space left on device")
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        snapshot(tmp_path / "run", source)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "code").iterdir() if not path.name.startswith(".")] == []
    assert read_code(snapshot(tmp_path / "run", source)) == read_code(source)


def test_the_origin_is_written_beside_the_copy(tmp_path):
    copy = snapshot(tmp_path / "run")
    origin = copy.with_suffix(".json").read_text()
    assert str(ROOT) in origin
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    code = "from toolkit.training.metrics.log import _environment; print(_environment(1)['git']['commit'] or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=copy)
    assert done.stdout.strip() == head, "the run's environment.json names the commit of the copy"


def test_the_repository_is_not_changed(source, tmp_path):
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    os.utime(source / "shards" / "__init__.py", (1, 1))  # of which git would take note in its index, under a lock
    before = (source / ".git" / "index").read_bytes()
    origin = json.loads(snapshot(tmp_path / "run", source).with_suffix(".json").read_text())
    assert (len(origin["git"]["commit"]), origin["git"]["changed"]) == (40, "")
    assert (source / ".git" / "index").read_bytes() == before


def test_ranks_import_the_copy_and_not_the_working_directory(tmp_path):
    """submitit starts `python -m`, which would import from the working directory first."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "launch").mkdir(parents=True)
    (elsewhere / "launch" / "__init__.py").write_text("raise SystemExit('the working directory was imported')")
    copy = snapshot(tmp_path / "run")
    probe = tmp_path / "submitit" / "core"
    probe.mkdir(parents=True)
    (tmp_path / "submitit" / "__init__.py").touch()
    (probe / "__init__.py").touch()
    (probe / "submission.py").write_text(
        "import sys\ndef submitit_main():\n    import launch\n    print(launch.__file__, *sys.argv[1:])\n"
    )
    command = [sys.executable, "-u", str(copy / "launch" / "node.py"), "-u", "-m", "submitit.core._submit", "FOLDER"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.stdout.split() == [str(copy / "launch" / "__init__.py"), "FOLDER"], done.stderr
