import pytest

from shards.corpora.text_files import RepeatedKey, parse_json, read_json_records, read_text
from shards.errors import UserError

TEXT = "image,audio,text\ngood.jpg,good.wav,ein Köter\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16 text: save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "line 1 has zero bytes, so it is UTF-16 or binary: save it as UTF-8"),
        (TEXT.encode("utf-16-be"), "line 1 has zero bytes, so it is UTF-16 or binary: save it as UTF-8"),
        (b"image,audio\n\0.jpg,b.wav\n", "line 2 has zero bytes"),
        (TEXT.encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xf6, as in Latin-1 or Windows-1252\): save it as UTF-8"),
        (b"image,audio\n\n\x93a\x94.jpg,b.wav\n", r"line 3 is not UTF-8 \(byte 0x93"),
        (b"PK\3\4\x14\0\xff", r"is a workbook or an archive, not text: save the table as UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", r"is a workbook or an archive, not text: save the table as UTF-8"),
        (b"\x1f\x8b\x08\0\xff", "is not UTF-8 text but gzip-compressed: unpack it"),
    ],
)
def test_files_that_are_not_utf_8(tmp_path, data, reason):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=reason):
        read_text(tmp_path / "t.csv")


def test_line_ends_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_text(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\nd")
    assert read_text(tmp_path / "t.csv") == "a\nb\nc\nd"


def test_json_keys_that_come_twice():
    one, two = parse_json('[{"a": 1, "b": {}}, {"a": 1, "b": 2, "b": 3}]')
    assert not isinstance(one, RepeatedKey)
    assert isinstance(two, RepeatedKey)
    assert (two.key, two) == ("b", {"a": 1, "b": 3})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("<!DOCTYPE html><html></html>", "is not JSON .an HTML page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not JSON .a git-lfs pointer"),
        ("[]", "is not a list of things .it has no list 'data'.: look"),
        ('{"data": {}}', "it has no list 'data'"),
        ('{"data": [], "x": 1, "x": 2}', "has a repeated key 'x'"),
    ],
)
def test_json_files_of_another_kind(tmp_path, text, reason):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_json_records(tmp_path / "t.json", "data", "a list of things", "look")
    assert "\n" not in str(caught.value)
