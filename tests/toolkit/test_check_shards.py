import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.shards.checking import damage
from toolkit.check_shards import main

ROOT = Path(__file__).parents[2]


def check(*arguments: object) -> int:
    """Exit code of the script, run here."""
    try:
        main([str(one) for one in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does, in another folder."""
    command = [sys.executable, ROOT / "toolkit/check_shards.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return damage.write(tmp_path / "shards")


def test_exit_codes(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "--jobs", 2, "--ranks", 16, "--workers", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nhealthy\n" in done.stdout
    assert "for 16 ranks x 3 workers: " in done.stdout
    os.truncate(folder / damage.SHARD, 100)
    done = run(folder, "--jobs", 2)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"\nproblem: {damage.SHARD}: has 100 bytes, the manifest has " in done.stdout
    assert "\nNOT HEALTHY (1 problem)\n" in done.stdout
    done = run(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/nowhere: no such folder\n"


def test_how_much_is_decoded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage.replace(folder, "t4", 1, damage.member(folder, "t4", 1)[:700])
    assert check(folder, "--decode", 0, "--jobs", 1) == 0
    assert "decoded: 0 pictures, 0 audio files" in capsys.readouterr().out
    assert check(folder, "--decode", "all", "--jobs", 1) == 1
    assert "decoded: 11 pictures, 22 audio files" in capsys.readouterr().out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more.tar").touch()
    (folder / "notes.txt").touch()
    assert check(folder, "--json", "--jobs", 1) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["healthy"] is False
    assert shown["splits"]["train"]["pictures"] == 7
    assert shown["decoded"] == {"pictures": 11, "recordings": 22}
    line = "more.tar: is not in the manifest, but programs that read *.tar would read it: remove it"
    assert shown["problems"] == [line]
    assert shown["warnings"] == ["notes.txt: does not belong to the data set"]
    assert shown["advice"]


def test_page(folder: Path, tmp_path: Path) -> None:
    assert check(folder, "--html", tmp_path / "page.html", "--jobs", 1) == 0
    page = (tmp_path / "page.html").read_text()
    assert "for 8 ranks x 4 workers" in page
    (folder / "manifest.json").write_text("{}")
    assert check(folder, "--html", tmp_path / "page.html", "--jobs", 1) == 1
    assert "NOT HEALTHY" in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_costs_no_findings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "nowhere/page.html"
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        check(folder, "--html", page, "--jobs", 1)
    assert "\nhealthy\n" in capsys.readouterr().out
    os.truncate(folder / damage.SHARD, 100)
    assert check(folder, "--html", page, "--jobs", 1) == 1
    shown = capsys.readouterr()
    assert "NOT HEALTHY (1 problem)" in shown.out
    assert shown.err == f"error: cannot write {page}: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "arguments are required: DIR"),
        (["x", "--decode", "some"], "--decode: expected a number of samples or all, got 'some'"),
        (["x", "--decode", "-1"], "--decode: "),
        (["x", "--jobs", "0"], "--jobs: expected a whole number of at least 1, got '0'"),
        (["x", "--ranks", "many"], "--ranks: expected a whole number of at least 1, got 'many'"),
        (["x", "--fast"], "unrecognized arguments: --fast"),
        (["/no/where"], "/no/where: no such folder"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--help") == 0
    assert "exit code: 0 healthy, 1 a check failed" in capsys.readouterr().out


def test_a_page_of_the_augmentation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, page = tmp_path / "noisy.yaml", tmp_path / "page.html"
    config.write_text("base: quickstart\ndata.augment.speech.noise: 1.0\n")
    assert check(folder, "--decode", 0, "--jobs", 1, "--html", page, "--augment", config) == 0
    assert "Augmentation: each kind alone" in page.read_text()
    with pytest.raises(UserError, match="add --html FILE"):
        check(folder, "--augment", config)
    with pytest.raises(UserError, match=r"--augment quickstart: every probability of its data\.augment is 0"):
        check(folder, "--html", page, "--augment", "quickstart")
