"""Checking one shard: damaged members are reported by name, and malicious input takes little memory."""

import io
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards import manifest
from shards.checking.check import check_folder, split_rows
from shards.checking.check_shard import MAX_PIXELS, check_shard, task_of
from shards.media.audio import Codec
from shards.reading import dataset
from tests.shards.checking import damage
from tests.shards.checking.damage import SHARD
from tests.shards.checking.findings import assert_sole, data_offset, problems

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
def test_malicious_header_under_a_correct_checksum(folder: Path, name: str) -> None:
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
    reported = problems(folder)
    assert any("member 't4.jpg'" in line and "is not in the index" in line for line in reported)
    assert any(re.search(r"member t4\.jpg at byte .* is in the index, but missing", line) for line in reported)


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
    assert dataset.MAX_PIXELS == MAX_PIXELS


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a" + bytes(40)])
def test_not_a_jpeg(folder: Path, data: bytes) -> None:
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
    reported = problems(folder)
    assert any("t4, caption 0: 3,700 s of audio, the limit is 600 s" in line for line in reported), reported


def test_recording_longer_than_its_header_says_costs_no_memory(folder: Path, hour: bytes) -> None:
    lie = hour[:22] + (3000).to_bytes(4, "big") + hour[26:]  # where a FLAC file has the number of its frames
    durations = manifest.load(folder).duration.copy()
    durations[8] = 3000 / 16000
    damage.replace(folder, "t4", 2, lie, duration=durations)
    stored = json.loads(damage.member(folder, "t4", 0))
    stored["captions"][0]["duration"] = 3000 / 16000
    damage.replace(folder, "t4", 0, json.dumps(stored).encode())
    tracemalloc.start()
    assert problems(folder) == []  # the audio is read as described by the header
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


def test_recording_that_is_not_finite(folder: Path) -> None:
    buffer = io.BytesIO()
    samples = np.zeros(round(float(manifest.load(folder).duration[9]) * 16000), np.float32)
    samples[7] = np.nan
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="FLOAT")
    damage.replace(folder, "t4", 3, buffer.getvalue())
    reported = problems(folder)
    assert f"{SHARD}: t4, caption 1: contains samples that are not finite" in reported


def loud() -> tuple[np.ndarray, int]:
    return np.tile(np.float32([1.0, -1.0]), (1, 2000)), 16000


@pytest.mark.parametrize("decode", [None, 0, 1])
@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_audio_files_to_check_by_ear_are_warnings_whether_decoded_or_not(
    tmp_path: Path, decode: int | None, codec: Codec
) -> None:
    items = damage.corpus()
    for number, source in ((4, damage.silent), (5, loud), (9, damage.silent)):
        items[number] = replace(items[number], captions=(damage.Caption(f"u{number}", source),))
    folder = damage.write(tmp_path / "shards", items, codec=codec)
    reported = [str(finding) for finding in check_folder(folder, decode).warnings]
    assert sorted(line.partition(", caption 0: ")[0] for line in reported) == [
        "test-000000.tar: e0",
        "train-000001.tar: t4",
        "train-000001.tar: t5",
    ]
    assert sorted(re.findall("silence|clipped", " ".join(reported))) == ["clipped", "silence", "silence"]


def test_giant_member_and_bounded_memory(folder: Path) -> None:
    damage.replace(folder, "t4", 1, bytes(65 << 20))
    m = manifest.load(folder)
    tracemalloc.start()
    findings = check_shard(task_of(m, 1, np.ones(len(m.key), bool)), lambda done: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_sole(findings.problems, "member 't4.jpg' has 68,157,440 bytes, the limit is 67,108,864")
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
    reported = problems(folder)
    assert len(reported) == 9
    assert reported[-1] == f"{SHARD}: and 4 more like these"
