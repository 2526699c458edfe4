"""Checking a folder: damage is reported by name, and intact shards pass."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import manifest
from shards.checking.check import CheckResult, check_folder, split_rows
from shards.checking.check_shard import check_shard, task_of
from shards.checking.finding import Finding
from shards.errors import UserError
from shards.reading.dry_run import advise
from shards.writing.folder_lock import UNFINISHED
from shards.writing.sources import SOURCES
from tests.shards.checking import damage
from tests.shards.checking.damage import SHARD
from tests.shards.checking.findings import assert_sole, data_offset, problems, warnings


@pytest.mark.parametrize("codec", ["flac", "wav", "opus"])
def test_healthy(tmp_path: Path, codec: str) -> None:
    result = check_folder(damage.write(tmp_path / "shards", codec=codec), None)
    assert result.healthy
    assert (result.problems, result.warnings) == ([], [])
    assert (result.pictures, result.audio_files) == (11, 22)
    assert result.text().endswith("\nhealthy")
    rows = {row["split"]: (row["pictures"], row["captions"], row["shards"]) for row in split_rows(result.manifest)}
    assert rows == {"train": (7, 14, 3), "dev": (2, 4, 1), "test": (2, 4, 1)}
    assert sum(row["hours"] for row in split_rows(result.manifest)) * 3600 == pytest.approx(
        result.manifest.duration.sum(), abs=1
    )


def test_a_folder_of_no_samples(tmp_path: Path) -> None:
    columns = {name: [0] if name == "first_caption" else [] for name in manifest.COLUMNS}
    manifest.save(tmp_path, "none", [], ["train"], columns, {})
    result = check_folder(tmp_path)
    assert result.healthy, result.text()
    assert advise(result.manifest, 8, 4) == []


def test_decodes_the_given_number_of_samples_spread_over_the_folder(folder: Path) -> None:
    for count, expected in ((0, 0), (1, 1), (4, 4), (11, 11), (1000, 11)):
        result = check_folder(folder, count)
        assert (result.pictures, result.audio_files) == (expected, 2 * expected)
    damage.replace(folder, "e1", 1, damage.member(folder, "e1", 1)[:700])  # the last sample
    assert_sole(problems(folder, 2), "test-000000.tar: e1.jpg: ", "cannot be decoded")
    assert problems(folder, 0) == []


def truncate(folder: Path) -> None:
    m = manifest.load(folder)
    os.truncate(folder / SHARD, int(m.audio_offset[9]) + 10)  # in the last member of t4


def flip_data(folder: Path) -> None:
    offset = data_offset(folder, "t4")
    damage.edit(folder / SHARD, lambda data: data.__setitem__(offset + 400, data[offset + 400] ^ 1))


ACCIDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated, 1 of its 3 samples are complete"),
    "longer": (lambda folder: damage.edit(folder / SHARD, lambda data: data.extend(bytes(512))), "it was changed"),
    "a byte flipped": (flip_data, "its checksum differs from the manifest"),
    "missing": (lambda folder: (folder / SHARD).unlink(), "is missing"),
    "a pipe": (lambda folder: damage.DAMAGES["a pipe"](folder / SHARD, random.Random(0)), "is not a regular file"),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_accident(folder: Path, name: str) -> None:
    cause, line = ACCIDENTS[name]
    cause(folder)
    assert_sole(problems(folder, 0), f"{SHARD}: ", line)
    assert "NOT HEALTHY (1 problem)" in check_folder(folder, 0).text()


def test_all_problems_are_found_at_once(folder: Path) -> None:
    truncate(folder)
    (folder / "dev-000000.tar").unlink()
    (folder / "more.tar").touch()
    assert [line.split(":")[0] for line in problems(folder)] == [SHARD, "dev-000000.tar", "more.tar"]


def test_foreign_files(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "train-000009.tar")
    for name in ("notes.txt", "train-000000.tar.77.tmp"):
        (folder / name).touch()
    (folder / UNFINISHED).mkdir()
    result = check_folder(folder, 0)
    assert_sole([str(one) for one in result.problems], "train-000009.tar: is not in the manifest")
    assert [str(one) for one in result.warnings] == [
        f"{UNFINISHED}: was left by an unfinished run: it can be removed",
        "notes.txt: does not belong to the data set",
        "train-000000.tar.77.tmp: was left by an unfinished run: it can be removed",
    ]


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_random_damage_to_any_file_is_named(healthy: Path, tmp_path: Path, name: str) -> None:
    for number, path in enumerate(sorted(healthy.iterdir())):
        chance = random.Random(f"{name}/{path.name}")
        for turn in range(3 if path.suffix == ".tar" else 12):
            folder = Path(shutil.copytree(healthy, tmp_path / f"{number}-{turn}"))
            damage.DAMAGES[name](folder / path.name, chance)
            result = check_folder(folder, 0)
            lost = path.name == SOURCES and name == "lost"  # no training needs it
            findings = result.warnings if lost else result.problems
            assert any(path.name in str(finding) for finding in findings), (path.name, turn, result.text())
            shutil.rmtree(folder)


def test_manifest_written_otherwise_is_named(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    head = json.loads(path.read_bytes())
    path.write_text(json.dumps(head))
    assert problems(folder, 0) == ["manifest.json: its bytes changed since it was written"]
    for change, line in (
        ({"arguments": {}}, "was changed: its checksum does not match its contents"),
        ({"hash": "0" * 64}, "was changed: its hash does not match its shards"),
        ({"sha257": head["sha256"]}, "its bytes changed since it was written: unknown key 'sha257'"),
    ):
        path.write_bytes(manifest.encoded(head | change))
        if "sha257" in change:
            path.write_bytes(manifest.encoded({name: v for name, v in (head | change).items() if name != "sha256"}))
        assert_sole(problems(folder, 0), "manifest.json", line)


EARLIER = "report.json: an earlier version wrote no checksum of it: not every change is detected"


def test_report_of_an_earlier_version_without_a_checksum(folder: Path) -> None:
    damage.older(folder)
    assert warnings(folder) == [EARLIER]
    path = folder / "report.json"
    path.write_text(path.read_text().replace('"captions": 14', '"captions": 15'))
    assert_sole(
        problems(folder, 0), "report.json: it counts 7 pictures and 15 captions in train, the index has 7 and 14"
    )
    path.unlink()
    assert warnings(folder)[0] == EARLIER
    assert_sole(warnings(folder)[1:], "report.json: ", "missing")


@pytest.mark.parametrize(
    "change",
    [
        {"splits": []},
        {"splits": {"train": []}},
        {"splits": {"train": {"pictures": "7", "captions": 14, "seconds": 1.0, "speakers": []}}},
        {"splits": {"train": {"pictures": 7, "captions": 1e3, "seconds": 1.0, "speakers": []}}},
        {"splits": {"train": {"pictures": 7, "captions": 14, "seconds": 10**400, "speakers": []}}},
        {"splits": {"train": {"pictures": 7, "captions": 14, "seconds": "1", "speakers": []}}},
        {"splits": {"train": {"pictures": 7, "captions": 14, "seconds": 1.0, "speakers": [[]]}}},
        {"durations": 3},
        {"durations": ["x"]},
        {"shards": None},
        {"bytes": 10**400},
        {"dropped": [{"what": "picture", "name": "a", "split": "train", "reason": "", "captions": "2"}]},
        {"dropped": [7]},
    ],
)
def test_report_that_is_damaged(folder: Path, change: dict[str, object]) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_sole(problems(folder), "report.json: ", "its checksum differs from the manifest")
    damage.older(folder)
    assert_sole(warnings(folder)[1:], "report.json: ", "damaged")


@pytest.mark.parametrize("content", ["[]", "7", pytest.param("[" * 100_000, id="deep")])
def test_report_that_is_no_report_is_a_warning(folder: Path, content: str) -> None:
    damage.older(folder)
    (folder / "report.json").write_text(content)
    assert_sole(warnings(folder)[1:], "report.json: ", "damaged")


def test_index_or_manifest_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    damage.edit(folder / manifest.INDEX, lambda data: data.__setitem__(-200, data[-200] ^ 1))
    result = check_folder(folder)
    assert result.manifest is None
    assert_sole([str(one) for one in result.problems], "manifest.json: ", "is not the index")
    assert "NOT HEALTHY" in result.text()
    assert result.as_json()["splits"] == {}
    (folder / manifest.MANIFEST).unlink()
    assert_sole(problems(folder), "manifest.json: ", "no shards in")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no shards in"):
        check_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        check_folder(tmp_path / "nowhere")


def test_folders_that_do_not_exist_or_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check_folder(folder / ("x" * 300))
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=f"{folder} cannot be listed: Permission denied"):
        check_folder(folder, 0)
    (folder / manifest.MANIFEST).unlink()
    with pytest.raises(UserError, match=f"{folder} cannot be listed: Permission denied"):
        check_folder(folder, 0)


def test_findings_are_one_printable_line(tmp_path: Path) -> None:
    line = str(Finding("a\nb", "c\x1b[2J\u202e\r\ud800"))
    assert line.isprintable()
    assert line.encode()
    assert CheckResult(tmp_path, None, [Finding("x", "y")]).text().count("\n") == 2


def test_several_processes_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate(folder)
    (folder / "dev-000000.tar").unlink()
    damage.edit(folder / "train-000000.tar", lambda data: data.__setitem__(100, 7))
    one, done = check_folder(folder, 5), list[int]()
    monkeypatch.setattr("shards.checking.check.progress_bar", lambda total, *_, **__: nullcontext(done.append))
    two = check_folder(folder, 5, jobs=2, show_progress=True)
    assert len(one.problems) == 4
    assert (one.problems, one.warnings, one.pictures) == (two.problems, two.warnings, two.pictures)
    assert sum(done) == 11


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), length=st.integers(1, 40), value=st.binary(min_size=40, max_size=40))
def test_random_bytes_are_found_and_raise_nothing(
    healthy: Path, tmp_path: Path, place: float, length: int, value: bytes
) -> None:
    m = manifest.load(healthy)
    data = bytearray((healthy / SHARD).read_bytes())
    before = bytes(data)
    at = int(place * (len(data) - length))
    data[at : at + length] = value[:length]
    (tmp_path / SHARD).write_bytes(data)
    every = np.ones(len(m.key), bool)
    task = task_of(m, 1, every)
    task = type(task)(tmp_path / SHARD, task.info, task.split, task.samples)
    findings = check_shard(task, lambda done: None)
    assert bool(findings.problems) == (bytes(data) != before)
