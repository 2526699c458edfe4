import io
import tarfile

import pytest

from shards.errors import UserError
from shards.tars.members import MAX_TEXT, DamagedTar, list_tar, parse_header
from tests.shards.tars.stock_tars import members, one_caption_each, pack

FILES = {"a.jpg": b"x" * 700, "b/" + "c" * 150 + ".wav": b"", "é.txt": "text é", "d.json": {"a": 1}}


def listed(path):
    listing = list_tar(str(path), lambda name: name.endswith((".txt", ".json")))
    return {member.name: member.read() for member in listing.members}, listing


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_equal_tarfile(tmp_path, format):
    path = pack(tmp_path / "a.tar", FILES, format)
    with tarfile.open(path, "a", format=format) as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "l" * 200
            tar.addfile(info)
        info = tarfile.TarInfo("last.txt")
        info.size, info.mtime = 3, 0.5  # a time that only pax stores
        tar.addfile(info, io.BytesIO(b"end"))
    result, listing = listed(path)
    assert result == members(path)
    assert listing.problem is None
    assert {listing.members[n].name: data for n, data in listing.texts.items()} == {
        name: data for name, data in members(path).items() if name.endswith((".txt", ".json"))
    }


def test_members_of_a_stock_tar(tmp_path):
    path = one_caption_each(tmp_path / "s") / "train-000000.tar"
    result, listing = listed(path)
    assert result == members(path)
    assert len(result) == 9
    assert listing.problem is None


def test_a_tar_at_a_url(tmp_path):
    path = pack(tmp_path / "a.tar", FILES, tarfile.PAX_FORMAT)
    url = f"file://{path}"
    result, _ = listed(url)
    assert result == members(path)
    with pytest.raises(UserError, match=r"b\.tar is missing"):
        list_tar(f"file://{tmp_path}/b.tar")


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


GOOD = header("a.txt", 2) + b"ok".ljust(512, b"\0")
END = bytes(1024)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (GOOD, "without the end-of-archive marker"),
        (GOOD + GOOD[:700], r"'a\.txt' .* claims 2 bytes|ends without|header"),
        (GOOD + header("b", 1 << 40) + END, r"'b' at byte 1,024 claims 1,099,511,627,776 bytes"),
        (GOOD + header("b", -512) + END, r"claims -512 bytes"),
        (GOOD + b"x" * 512 + END, "header at byte 1,024 is damaged"),
        (GOOD + header("s", 0, tarfile.GNUTYPE_SPARSE) + END, "is sparse"),
        (GOOD + header("x", MAX_TEXT + 1, tarfile.XHDTYPE) + bytes(MAX_TEXT + 1024), "extended header .* limit"),
        (
            GOOD + header("x", 20, tarfile.XHDTYPE) + b"99 path=a\n".ljust(512, b"\0") + END,
            "extended header .* damaged",
        ),
        (GOOD + header("x", 20, tarfile.XHDTYPE) + b"0 path=a\n".ljust(512, b"\0") + END, "extended header .* damaged"),
        (
            GOOD + header("x", 15, tarfile.XHDTYPE) + b"15 size=999999\n".ljust(512, b"\0") + GOOD + END,
            r"claims 999,999 bytes",
        ),
    ],
)
def test_hostile_tars_end_at_the_damage(tmp_path, data, problem):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    listing = list_tar(str(path))
    assert [(member.name, member.read()) for member in listing.members][:1] == [("a.txt", b"ok")]
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(listing.problem)


def test_a_compressed_tar_is_named(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    assert "it is compressed, unpack it first" in (list_tar(str(path)).problem or "")


def test_a_long_text_is_listed_and_not_read(tmp_path):
    path = pack(tmp_path / "a.tar", {"a.txt": b"x" * (MAX_TEXT + 1)})
    listing = list_tar(str(path), lambda name: True)
    assert listing.members[0].size == MAX_TEXT + 1
    assert listing.texts == {}


def test_a_tar_that_shrank(tmp_path):
    path = pack(tmp_path / "a.tar", {"a.jpg": b"x" * 700})
    member = list_tar(str(path)).members[0]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match="shorter than when it was listed"):
        member.read()
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        member.read()


def test_only_the_first_header_can_be_of_a_compressed_file() -> None:
    block = b"\x1f\x8b".ljust(512, b"\1")
    with pytest.raises(DamagedTar, match=r"byte 0 is damaged .* it is compressed, unpack it first"):
        parse_header(block, 0)
    with pytest.raises(DamagedTar, match=r"byte 1,024 is damaged \([^)]*\)$"):
        parse_header(block, 1024)
