"""Checking shards: damage is reported by name, malicious input takes little memory, and intact shards pass."""

import errno
import io
import json
import os
import random
import re
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import manifest
from shards.checking.check import CheckResult, check_folder, split_rows
from shards.checking.check_shard import MAX_PIXELS, check_shard, task_of
from shards.checking.finding import Finding
from shards.errors import UserError
from shards.media.audio import Codec
from shards.reading import dataset as stream
from shards.reading.dry_run import advise
from shards.writing.folder_lock import UNFINISHED
from shards.writing.sources import SOURCES
from tests.shards.checking import damage
from tests.shards.checking.damage import SHARD


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.write(tmp_path_factory.mktemp("healthy") / "shards")


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "shards"))


def problems(folder: Path, decode: int | None = None) -> list[str]:
    return [str(finding) for finding in check_folder(folder, decode).problems]


def warnings(folder: Path) -> list[str]:
    result = check_folder(folder, None)
    assert result.healthy, result.text()
    return [str(finding) for finding in result.warnings]


def data_offset(folder: Path, key: str, column: str = "image_offset") -> int:
    m = manifest.load(folder)
    return int(getattr(m, column)[m.key.tolist().index(key.encode())])


def assert_sole(lines: list[str], *parts: str) -> None:
    """There is one line, and it holds these parts."""
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


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


def test_decodes_as_many_as_asked_for_spread_over_the_folder(folder: Path) -> None:
    for asked, expected in ((0, 0), (1, 1), (4, 4), (11, 11), (1000, 11)):
        result = check_folder(folder, asked)
        assert (result.pictures, result.audio_files) == (expected, 2 * expected)
    damage.replace(folder, "e1", 1, damage.member(folder, "e1", 1)[:700])  # the last sample
    assert_sole(problems(folder, 2), "test-000000.tar: e1.jpg: ", "cannot be decoded")
    assert problems(folder, 0) == []


def truncate(folder: Path) -> None:
    m = manifest.load(folder)
    os.truncate(folder / SHARD, int(m.audio_offset[9]) + 10)  # in the last member of t4


def lengthen(folder: Path) -> None:
    with open(folder / SHARD, "ab") as file:
        file.write(bytes(512))


def flip_data(folder: Path) -> None:
    offset = data_offset(folder, "t4")
    damage.edit(folder / SHARD, lambda data: data.__setitem__(offset + 400, data[offset + 400] ^ 1))


def make_pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


ACCIDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated, 1 of its 3 samples are complete"),
    "longer": (lengthen, "it was changed"),
    "a byte flipped": (flip_data, "its checksum differs from the manifest"),
    "missing": (lambda folder: (folder / SHARD).unlink(), "is missing"),
    "a pipe": (make_pipe, "is not a regular file"),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_accident(folder: Path, name: str) -> None:
    cause, line = ACCIDENTS[name]
    cause(folder)
    assert_sole(problems(folder, 0), f"{SHARD}: ", line)
    assert "NOT HEALTHY (1 problem)" in check_folder(folder, 0).text()


def test_all_that_is_wrong_is_found_at_once(folder: Path) -> None:
    truncate(folder)
    (folder / "dev-000000.tar").unlink()
    (folder / "more.tar").touch()
    assert [line.split(":")[0] for line in problems(folder)] == [SHARD, "dev-000000.tar", "more.tar"]


SIGNED: dict[str, tuple[dict[str, bytes], str]] = {
    "up": ({"name": b"../x"}, "member '../x' at byte {} would be written outside of the folder"),
    "absolute": ({"name": b"/etc/x"}, "member '/etc/x' at byte {} would be written outside of the folder"),
    "in a folder": ({"name": b"x/t4.jpg"}, "member 'x/t4.jpg' at byte {} is in a folder"),
    "renamed": ({"name": b"t4.png"}, "member 't4.png' at byte {} is t4.jpg in the index"),
    "of control characters": ({"name": b"t4\n\x1b[31m.jpg"}, r"member 't4\n\x1b[31m.jpg' at byte {} is t4.jpg"),
    "not utf-8": ({"name": b"t4\xff.jpg"}, r"member 't4\\xff.jpg' at byte {} is t4.jpg"),
    "sparse": ({"type": b"S"}, "is a sparse file, not a regular file"),
    "a link": ({"type": b"2"}, "is a symbolic link, not a regular file"),
    "a hard link": ({"type": b"1"}, "is a hard link, not a regular file"),
    "an extended header": ({"type": b"x"}, "is an extended header, not a regular file"),
    "a long name": ({"type": b"L"}, "is a GNU long name, not a regular file"),
    "unknown": ({"type": b"Z"}, "is of unknown type b'Z', not a regular file"),
    "giant": ({"size": b"77777777777"}, "claims 8,589,934,591 bytes, more than the file has"),
    "giant in base 256": ({"size": b"\x80" + b"\x7f" * 11}, "more than the file has"),
    "negative": ({"size": b"\xff" * 12}, "claims -1 bytes, more than the file has"),
    "no size": ({"size": b"many"}, "the header at byte {header} is damaged"),
}


@pytest.mark.parametrize("name", SIGNED)
def test_hostile_header_under_a_true_checksum(folder: Path, name: str) -> None:
    fields, line = SIGNED[name]
    offset = data_offset(folder, "t4")
    damage.edit(folder / SHARD, lambda data: damage.header(data, offset, **fields))
    damage.sign(folder)
    assert_sole(problems(folder), f"{SHARD}: ", line.format(f"{offset:,}", header=f"{offset - 512:,}"))


def test_header_with_a_wrong_sum(folder: Path) -> None:
    offset = data_offset(folder, "t4")
    damage.edit(folder / SHARD, lambda data: data.__setitem__(offset - 400, 7))
    damage.sign(folder)
    assert_sole(
        problems(folder), f"the header at byte {offset - 512:,} is damaged", "rest of the shard was not checked"
    )


def test_members_that_the_index_does_not_know(folder: Path) -> None:
    m = manifest.load(folder)
    end = (folder / SHARD).read_bytes().rstrip(b"\0").__len__()
    start = -(-end // 512) * 512

    def append(data: bytearray) -> None:
        data[start : start + 1024] = bytes(1024)
        data[start + 257 : start + 265] = b"ustar\x0000"
        damage.header(data, start + 512, name=b"t9.jpg", size=b"00000000001", type=b"0")

    damage.edit(folder / SHARD, append)
    damage.sign(folder)
    assert_sole(problems(folder), f"{SHARD}: member 't9.jpg' at byte {start + 512:,} is not in the index")
    assert m.shards[1].name == SHARD


def test_bytes_behind_the_end_of_the_archive(folder: Path) -> None:
    damage.edit(folder / SHARD, lambda data: data.__setitem__(-1, 1))
    damage.sign(folder)
    assert_sole(problems(folder), f"{SHARD}: there are bytes after the end of the archive")


def test_archive_without_an_end(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: -(-len(data.rstrip(b"\0")) // 512) * 512])
    damage.sign(folder)
    assert_sole(problems(folder), f"{SHARD}: it ends without the end-of-archive marker")


def test_offset_of_the_index_where_no_member_is(folder: Path) -> None:
    m = manifest.load(folder)
    offsets = m.image_offset.copy()
    offsets[m.key.tolist().index(b"t4")] += 512
    damage.resave(folder, image_offset=offsets)
    found = problems(folder)
    assert any("member 't4.jpg'" in line and "is not in the index" in line for line in found)
    assert any(re.search(r"member t4\.jpg at byte .* is in the index, but missing", line) for line in found)


def test_size_of_the_index_that_is_not_the_members(folder: Path) -> None:
    m = manifest.load(folder)
    sizes = m.audio_bytes.copy()
    sizes[8] -= 1  # the first recording of t4
    damage.resave(folder, audio_bytes=sizes)
    assert_sole(problems(folder), f"member 't4.0.flac' has {sizes[8] + 1:,} bytes, the index has {sizes[8]:,}")


def test_samples_out_of_their_order(folder: Path) -> None:
    m = manifest.load(folder)
    swapped = np.arange(len(m.key))
    swapped[[3, 4]] = [4, 3]
    rows = np.concatenate([np.arange(m.first_caption[s], m.first_caption[s + 1]) for s in swapped])
    samples = {name: getattr(m, name)[swapped] for name in manifest.SAMPLE_COLUMNS if name != "twin"}
    damage.resave(folder, **samples, **{name: getattr(m, name)[rows] for name in manifest.CAPTION_COLUMNS})
    assert_sole(problems(folder), f"{SHARD}: its members are not consecutive in the order of the index")


def test_sample_without_captions(folder: Path) -> None:
    m = manifest.load(folder)
    first = m.first_caption.copy()
    first[5] = first[4]  # those of t4 go to t5
    damage.resave(folder, first_caption=first)
    assert f"{SHARD}: sample t4: it has no captions" in problems(folder, 0)
    hours = replace(manifest.load(folder), duration=np.full(22, 3600, np.float32))
    assert [row["hours"] for row in split_rows(hours)] == [14, 4, 4]


def test_key_that_webdataset_would_split(folder: Path) -> None:
    m = manifest.load(folder)
    damage.resave(folder, key=np.where(m.key == b"t4", b"t4.x", m.key))
    assert f"{SHARD}: sample 't4.x': a key must consist of letters, digits, _ and -" in problems(folder, 0)


def test_overlapping_members_of_the_index(folder: Path) -> None:
    m = manifest.load(folder)
    offsets = m.image_offset.copy()
    offsets[4] = offsets[3]
    damage.resave(folder, image_offset=offsets)
    assert any("are not consecutive" in line for line in problems(folder))


def meta(**changes: object) -> Callable[[dict], bytes]:
    return lambda stored: json.dumps({**stored, **changes}).encode()


def in_captions(**changes: object) -> Callable[[dict], bytes]:
    return lambda stored: json.dumps(
        {**stored, "captions": [stored["captions"][0], {**stored["captions"][1], **changes}]}
    ).encode()


METAS: dict[str, tuple[Callable[[dict], bytes], str]] = {
    "id": (meta(image_id="t5"), "image_id is 't5', in the index 't4'"),
    "split": (meta(split="test"), "split is 'test', in the index 'train'"),
    "captions": (meta(captions=[]), "it has 0 captions, in the index 2"),
    "duration": (in_captions(duration=9.5), "caption 1 is 9.5 s long, in the index 0."),
    "text": (in_captions(text=7), "caption 1 has no text or utterance"),
    "utterance": (in_captions(utterance=None), "caption 1 has no text or utterance"),
    "no captions": (meta(captions=None), "not a sample's JSON"),
    "a list": (lambda stored: b"[]", "not a sample's JSON"),
    "not JSON": (lambda stored: b"\xff{", "not a sample's JSON"),
    "too deep": (lambda stored: b"[" * 500_000, "not a sample's JSON (RecursionError"),
    "too long": (lambda stored: b" " * 1_500_000 + b"{}", "1,500,002 bytes, the limit is"),
}


@pytest.mark.parametrize("name", METAS)
def test_json_that_is_not_the_samples(folder: Path, name: str) -> None:
    change, line = METAS[name]
    damage.replace(folder, "t4", 0, change(json.loads(damage.member(folder, "t4", 0))))
    assert_sole(problems(folder), f"{SHARD}: t4.json: ", line)


def test_twin_that_the_json_does_not_name(folder: Path) -> None:
    stored = json.loads(damage.member(folder, "t1", 0))
    assert stored.pop("twin") == "t0"
    damage.replace(folder, "t1", 0, json.dumps(stored).encode())
    assert_sole(problems(folder), "t1.json: twin is None, in the index 't0'")


def test_twin_whose_original_was_dropped(folder: Path) -> None:
    damage.resave(folder, twin=np.full(11, -1))
    assert problems(folder) == []


@pytest.mark.parametrize(("side", "line"), [(30_000, "more pixels than"), (8_000, "8,000 x 8,000 pixels, ")])
def test_picture_bomb_is_refused_by_its_header(folder: Path, side: int, line: str) -> None:
    damage.replace(folder, "t4", 1, damage.bomb(damage.member(folder, "t4", 1), side))
    for decode in (0, None):
        assert_sole(
            problems(folder, decode), f"{SHARD}: t4.jpg: a decompression bomb: {line}", "the limit", "50,000,000"
        )
    assert stream.MAX_PIXELS == MAX_PIXELS


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a" + bytes(40)])
def test_what_is_no_jpeg(folder: Path, data: bytes) -> None:
    damage.replace(folder, "t4", 1, data)
    assert_sole(problems(folder, 0), f"{SHARD}: t4.jpg: not a JPEG")


@pytest.fixture(scope="module")
def hour() -> bytes:
    return damage.recording(3700)


def test_hour_long_recording(folder: Path, hour: bytes) -> None:
    damage.replace(folder, "t4", 2, hour)
    assert_sole(problems(folder, 0), f"{SHARD}: t4, caption 0: 3,700 s of audio, the limit is 600 s")
    durations = manifest.load(folder).duration.copy()
    durations[8] = 3700
    damage.resave(folder, duration=durations)
    found = problems(folder)
    assert any("t4, caption 0: 3,700 s of audio, the limit is 600 s" in line for line in found), found


def test_recording_longer_than_its_header_says_costs_no_memory(folder: Path, hour: bytes) -> None:
    lie = hour[:22] + (3000).to_bytes(4, "big") + hour[26:]  # where a FLAC file has the number of its frames
    durations = manifest.load(folder).duration.copy()
    durations[8] = 3000 / 16000
    damage.replace(folder, "t4", 2, lie, duration=durations)
    stored = json.loads(damage.member(folder, "t4", 0))
    stored["captions"][0]["duration"] = 3000 / 16000
    damage.replace(folder, "t4", 0, json.dumps(stored).encode())
    tracemalloc.start()
    assert problems(folder) == []  # what is read is what the header says
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


RECORDINGS = {
    "rate": (lambda: damage.recording(0.3, rate=8000), "8,000 Hz, 1 channels; expected 16,000 Hz, 1"),
    "stereo": (lambda: damage.recording(0.3, channels=2), "16,000 Hz, 2 channels"),
    "another length": (lambda: damage.recording(9), "9.00 s of audio, the index has 0."),
    "no recording": (lambda: b"hello", "cannot be decoded as audio"),
    "empty": (lambda: b"", "cannot be decoded as audio"),
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_recording_that_is_not_the_captions(folder: Path, name: str) -> None:
    make, line = RECORDINGS[name]
    damage.replace(folder, "t4", 3, make())
    assert_sole(problems(folder, 0), f"{SHARD}: t4, caption 1: ", line)


def test_recording_with_a_hole_is_found_by_decoding(folder: Path) -> None:
    sound = damage.member(folder, "t4", 3)
    damage.replace(folder, "t4", 3, sound[: len(sound) // 2])
    assert problems(folder, 0) == []
    assert_sole(problems(folder), f"{SHARD}: t4, caption 1: ")


def test_recording_with_numbers_that_are_none(folder: Path) -> None:
    buffer = io.BytesIO()
    samples = np.zeros(round(float(manifest.load(folder).duration[9]) * 16000), np.float32)
    samples[7] = np.nan
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="FLOAT")
    damage.replace(folder, "t4", 3, buffer.getvalue())
    found = problems(folder)
    assert f"{SHARD}: t4, caption 1: has samples that are not finite" in found


def test_silence_is_a_warning(tmp_path: Path) -> None:
    quiet = damage.Caption("hush", damage.silent, "nothing")
    items = damage.corpus()
    items[4] = damage.Item("t4", "train", damage.partial(damage.drawn, 4), (quiet,))
    assert_sole(warnings(damage.write(tmp_path / "shards", items)), f"{SHARD}: t4, caption 0: silence")


def loud() -> tuple[np.ndarray, int]:
    return np.tile(np.float32([1.0, -1.0]), (1, 2000)), 16000


@pytest.mark.parametrize("decode", [None, 0, 1])
@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_recordings_to_listen_to_are_warnings_whether_decoded_or_not(
    tmp_path: Path, decode: int | None, codec: Codec
) -> None:
    items = damage.corpus()
    for number, source in ((4, damage.silent), (5, loud), (9, damage.silent)):
        items[number] = replace(items[number], captions=(damage.Caption(f"u{number}", source),))
    folder = damage.write(tmp_path / "shards", items, codec=codec)
    found = [str(finding) for finding in check_folder(folder, decode).warnings]
    assert sorted(line.partition(", caption 0: ")[0] for line in found) == [
        "test-000000.tar: e0",
        "train-000001.tar: t4",
        "train-000001.tar: t5",
    ]
    assert sorted(re.findall("silence|clipped", " ".join(found))) == ["clipped", "silence", "silence"]


def test_giant_member_and_bounded_memory(folder: Path) -> None:
    damage.replace(folder, "t4", 1, bytes(65 << 20))
    m = manifest.load(folder)
    tracemalloc.start()
    found = check_shard(task_of(m, 1, np.ones(len(m.key), bool)), lambda done: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_sole(found.problems, "member 't4.jpg' has 68,157,440 bytes, the limit is 67,108,864")
    assert peak < 8e6


def test_many_findings_of_a_shard_are_counted(folder: Path) -> None:
    def rename(data: bytearray) -> None:
        for n, offset in enumerate(offsets):
            damage.header(data, offset, name=b"../%d" % n)

    m = manifest.load(folder)
    rows = slice(int(m.first_caption[3]), int(m.first_caption[6]))
    offsets = [*m.meta_offset[3:6].tolist(), *m.image_offset[3:6].tolist(), *m.audio_offset[rows].tolist()]
    damage.edit(folder / SHARD, rename)
    damage.sign(folder)
    found = problems(folder)
    assert len(found) == 9
    assert found[-1] == f"{SHARD}: and 4 more like these"


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
            found = result.warnings if lost else result.problems
            assert any(path.name in str(finding) for finding in found), (path.name, turn, result.text())
            shutil.rmtree(folder)


def test_manifest_written_otherwise_is_named(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    head = json.loads(path.read_bytes())
    path.write_text(json.dumps(head))
    assert problems(folder, 0) == ["manifest.json: its bytes changed since it was written"]
    for change, line in (
        ({"arguments": {}}, "was changed: its checksum does not match its contents"),
        ({"hash": "0" * 64}, "has another hash than what it says of the shards gives"),
        ({"sha257": head["sha256"]}, "its bytes changed since it was written: it has no key 'sha257'"),
    ):
        path.write_bytes(manifest.encoded(head | change))
        if "sha257" in change:
            path.write_bytes(manifest.encoded({name: v for name, v in (head | change).items() if name != "sha256"}))
        assert_sole(problems(folder, 0), "manifest.json", line)


def test_folder_of_an_earlier_version_has_no_checksum_of_its_report(folder: Path) -> None:
    damage.older(folder)
    assert warnings(folder) == [EARLIER]


EARLIER = "report.json: an earlier version wrote no checksum of it: not every change is detected"


def test_report_that_counts_something_else(folder: Path) -> None:
    damage.older(folder)
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


def test_folders_that_cannot_be_asked_for_or_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check_folder(folder / ("x" * 300))

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", fail)
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
def test_any_change_is_found_and_nothing_breaks_the_doctor(
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
    found = check_shard(task, lambda done: None)
    assert bool(found.problems) == (bytes(data) != before)
