import pytest

from shards.files import read_records


def test_an_unfinished_line_is_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n\n"three"\n{"b": \xff}\n{"c": "\xff"}\n{"d": 4, "e')
    assert list(read_records(path)) == [{"a": 1}, {"c": "\ufffd"}]


def test_a_file_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "log.jsonl"))
