"""Records of submissions and attempts, also damaged ones."""

import json

import pytest

from launch.record import ATTEMPTS, SUBMISSION, Submission, newest, read_attempts, restarts, submissions
from shards.errors import UserError
from tests.launch.records import record


def test_the_last_submission_is_found_by_its_time(tmp_path):
    record(tmp_path, "b", time=5.0, job="1")
    more = {"code": "/code", "index": "3", "members": {"0": "/m"}, "logs": "/logs"}
    folder = record(tmp_path, "a", time=6.0, job="2", command=["--nodes", "2"], **more)
    (tmp_path / "logs" / "c").mkdir()
    (tmp_path / "logs" / "c" / SUBMISSION).write_text("{")
    last = newest(tmp_path)
    assert [each.submission.job for each in submissions(tmp_path)] == ["1", "2"]
    assert (last.folder, last.submission.id, last.submission.command) == (folder, "2_3", ["--nodes", "2"])
    assert str(last.log(1, "err")) == "/logs/2_3_1_log.err"
    assert newest(tmp_path / "none") is None
    assert [path.name for path in folder.iterdir()] == [SUBMISSION], "it is written under another name first"


def test_a_later_version_may_write_more(tmp_path):
    folder = record(tmp_path, "a")
    values = json.loads((folder / SUBMISSION).read_text())
    (folder / SUBMISSION).write_text(json.dumps(values | {"weather": "fair"}))
    assert newest(tmp_path).submission.job == "17"


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        Submission("17", "slurm", "runs/x", 2, 4, []).write(tmp_path / "none")


def test_attempts(tmp_path):
    folder = record(tmp_path, "a")
    lines = [
        {"restart": 0, "began": 1.0, "hosts": ["n1", "n2"], "more": 1},
        {"restart": 0, "ended": 2.0, "code": 75, "requeued": True, "why": "saved", "cause": "saved"},
        {"restart": 1, "began": 3.0, "hosts": ["n3"]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / ATTEMPTS).write_text(text + "not JSON\n[1]\n" + '{"restart": 1, "en')
    first, second = read_attempts(folder)
    assert (first.hosts, first.ended, first.code, first.requeued, first.why) == (["n1", "n2"], 2.0, 75, True, "saved")
    assert (second.restart, second.began, second.ended, second.requeued) == (1, 3.0, None, False)
    assert read_attempts(tmp_path) == []


def test_restarts_count_those_by_slurm_and_those_by_hand(tmp_path):
    assert restarts(tmp_path) == 0
    record(tmp_path, "never began", time=1.0)
    assert restarts(tmp_path) == 0
    first = record(tmp_path, "a", time=2.0)
    (first / ATTEMPTS).write_text('{"restart": 0, "began": 1}\n{"restart": 1, "began": 2}\n')
    assert restarts(tmp_path) == 1
    (record(tmp_path, "b", time=3.0) / "rank0.json").write_text("{}")
    assert restarts(tmp_path) == 2


def test_attempts_under_the_name_of_earlier_versions(tmp_path):
    (tmp_path / "incarnations.jsonl").write_text('{"restart": 0, "began": 1.0}\n')
    assert [each.restart for each in read_attempts(tmp_path)] == [0]
    (tmp_path / ATTEMPTS).write_text('{"restart": 1, "began": 2.0}\n')
    assert [each.restart for each in read_attempts(tmp_path)] == [1]
