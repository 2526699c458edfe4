"""The README: short, its links lead somewhere, its commands are real, and its Python runs."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = sorted(path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts))


def test_it_is_short() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", guide.read_text(encoding="utf-8")):
        assert "://" in target or (guide.parent / target).exists(), f"{guide.name}: {target}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(guide: Path) -> None:
    """Paths in backticks, from the root or from the guide's folder."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|md|sh))`", guide.read_text(encoding="utf-8")):
        if not re.search(r"[A-Z]{3}", name):
            places = (ROOT, guide.parent, *guide.parent.parents)
            assert any((place / name).exists() for place in places), f"{guide.name}: {name}"


def test_the_tree_is_that_of_the_repository() -> None:
    """Each folder of the tree is there, and each package with code is in it."""
    tree = README.split("## The code")[1].split("```")[1]
    path: list[str] = []
    named = set()
    for line in tree.strip().splitlines():
        if match := re.match(r"( *)([\w.]+)/", line):
            path = [*path[: len(match[1]) // 4], match[2]]
            named.add("/".join(path))
    assert all((ROOT / name).is_dir() for name in named)
    packages = {
        str(file.parent.relative_to(ROOT))
        for top in ("shards", "toolkit", "launch")
        for file in (ROOT / top).rglob("*.py")
    }
    assert packages <= named, sorted(packages - named)


def test_its_python_retrieves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree(ROOT / "tests/compatibility/0.1/run/export/best", tmp_path / "runs/quickstart/export/best")
    (tmp_path / "photos").mkdir()
    chance = np.random.default_rng(0)
    for n in range(7):
        Image.fromarray(chance.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"photos/{n}.jpg")
    soundfile.write(tmp_path / "query.wav", 0.3 * np.sin(np.arange(8000) / 9), 16000)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(set(re.findall(r"photos/\d\.jpg", printed))) == 5, printed
