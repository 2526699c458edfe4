import errno
import fcntl
import io
import json
import os
import re
import tarfile
from functools import partial

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from shards import manifest
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.folder import UNFINISHED
from shards.report import load_report
from shards.write import Format, sample_key, write_shards
from tests.shards import tiny_corpora as tiny


def tone(hertz=300, rate=22050, seconds=0.2):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.stack([wave, 0 * wave]).astype(np.float32), rate


def drawn(image_id, split="train", captions=2, **how):
    """A picture and captions that need no file."""
    spoken = tuple(
        Caption(f"{image_id}-{k}", partial(tone, 300 + 50 * k), f"«text» {k}", f"speaker {k}") for k in range(captions)
    )
    return Item(image_id, split, partial(Image.new, "RGB", (20, 20), "red"), spoken, **how)


def write(items, folder, **how):
    return write_shards(items, folder, "tiny", Format(**how), {"corpus": "tiny"})


def members(path):
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


ITEMS = [
    drawn("dev/1", "dev"),
    drawn("t-2", "train", captions=3),
    drawn("t-1", "train"),
    drawn("x", "extra", captions=1, twin="t-1"),
    drawn("t-3", "train", captions=1),
]


def test_members_in_their_order(tmp_path):
    write(ITEMS, tmp_path, samples_per_shard=2)
    assert list(members(tmp_path / "train-000000.tar")) == [
        *("t-2.json", "t-2.jpg", "t-2.0.flac", "t-2.1.flac", "t-2.2.flac"),
        *("t-1.json", "t-1.jpg", "t-1.0.flac", "t-1.1.flac"),
    ]
    assert list(members(tmp_path / "train-000001.tar")) == ["t-3.json", "t-3.jpg", "t-3.0.flac"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("dev-000000.tar", "extra-000000.tar", "index.npz", "manifest.json", "report.json"),
        *("train-000000.tar", "train-000001.tar"),
    ]


def test_headers_hold_nothing_of_this_machine_or_moment(tmp_path):
    write(ITEMS, tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
    assert (tmp_path / "train-000000.tar").read_bytes()[257:265] == b"ustar\x0000"


def test_json_member(tmp_path):
    write(ITEMS, tmp_path)
    meta = json.loads(members(tmp_path / "extra-000000.tar")["x.json"])
    caption = {"text": "«text» 0", "speaker": "speaker 0", "utterance": "x-0", "duration": 0.2}
    assert meta == {"image_id": "x", "split": "extra", "captions": [caption], "twin": "t-1"}
    assert "twin" not in json.loads(members(tmp_path / "train-000000.tar")["t-1.json"])


def test_audio_is_mono_16_khz(tmp_path):
    write(ITEMS, tmp_path)
    wave, rate = soundfile.read(io.BytesIO(members(tmp_path / "extra-000000.tar")["x.0.flac"]))
    assert (rate, wave.shape) == (16000, (3200,))
    assert np.abs(wave).max() == pytest.approx(0.25, abs=0.01)  # one of the two channels was silent
    assert np.abs(np.fft.rfft(wave)).argmax() * 16000 / 3200 == 300


def test_manifest_points_at_every_member(tmp_path):
    write(ITEMS, tmp_path, samples_per_shard=2)
    made = manifest.load(tmp_path)
    assert made.splits == ("train", "dev", "extra")
    assert made.key.tolist()[:3] == [b"t-2", b"t-1", b"t-3"]
    assert made.image_id.tolist() == [b"t-2", b"t-1", b"t-3", b"dev/1", b"x"]
    assert made.split.tolist() == [0, 0, 0, 1, 2]
    assert made.shard.tolist() == [0, 0, 1, 2, 3]
    assert made.twin.tolist() == [-1, -1, -1, -1, 1]
    assert [len(made.captions(n)) for n in range(5)] == [3, 2, 1, 2, 1]
    assert made.duration.tolist() == pytest.approx([0.2] * 9)
    for n in range(5):
        shard = made.shards[made.shard[n]]
        stored = members(tmp_path / shard.name)
        data, key = (tmp_path / shard.name).read_bytes(), made.key[n].decode()

        def cut(offset, size, data=data):
            return data[offset : offset + size]

        assert cut(made.meta_offset[n], made.meta_bytes[n]) == stored[f"{key}.json"]
        assert cut(made.image_offset[n], made.image_bytes[n]) == stored[f"{key}.jpg"]
        for k, row in enumerate(made.captions(n)):
            assert cut(made.audio_offset[row], made.audio_bytes[row]) == stored[f"{key}.{k}.flac"]
    for shard in made.shards:
        path = tmp_path / shard.name
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, manifest.file_sha256(path))
    assert [shard.samples for shard in made.shards] == [2, 1, 1, 1]


def test_stock_webdataset_reads_the_same_bytes(tmp_path):
    write(ITEMS, tmp_path, samples_per_shard=2)
    shards = [str(tmp_path / f"train-{n:06d}.tar") for n in range(2)]
    read = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        read |= {f"{sample['__key__']}.{name}": data for name, data in sample.items() if not name.startswith("__")}
    assert read == members(shards[0]) | members(shards[1])
    decoded = list(webdataset.WebDataset(shards[:1], shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["image_id"] for sample in decoded] == ["t-2", "t-1"]
    assert decoded[0]["jpg"].shape == (20, 20, 3)


@pytest.mark.parametrize("codec", ["wav", "opus"])
def test_other_codecs(tmp_path, codec):
    write(ITEMS, tmp_path, codec=codec)
    data = members(tmp_path / "extra-000000.tar")[f"x.0.{codec}"]
    assert soundfile.info(io.BytesIO(data)).frames == 3200


def test_keys():
    ids = ["plain_1-a", "a/b.jpg", "a_b_jpg", "x" * 300, "x" * 301, "ünïcode", "a.b/jpg", ""]
    keys = [sample_key(image_id) for image_id in ids]
    assert keys[0] == "plain_1-a"
    assert len(set(keys)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([], "no samples"),
        ([drawn("a"), drawn("b"), drawn("a", "dev")], "image id a comes 2 times"),
        ([drawn("a", captions=0)], "a has no captions"),
        ([drawn("a", twin="b")], "a is the twin of b, which is not in the corpus"),
        ([drawn("a", split="my/split")], "split 'my/split'"),
    ],
)
def test_impossible_corpora(tmp_path, items, reason):
    with pytest.raises(UserError, match=reason):
        write(items, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_files(folder):
    """A train picture with a good and an empty recording, one with no good one, one unreadable; a good dev picture."""
    for name in ("good", "1", "2"):
        tiny.photo(folder / f"{name}.jpg")
        tiny.speech(folder / f"{name}.wav")
    (folder / "empty.wav").touch()
    (folder / "text.jpg").write_text("no picture")
    tiny.speech(folder / "long.wav", seconds=3)

    def item(name, split, picture, *audio):
        spoken = tuple(Caption(f"{name}-{k}", folder / one, speaker=f"s{k}") for k, one in enumerate(audio))
        return Item(name, split, folder / picture, spoken)

    return [
        item("half", "train", "1.jpg", "empty.wav", "1.wav"),
        item("mute", "train", "2.jpg", "long.wav", "missing.wav"),
        item("blind", "train", "text.jpg", "1.wav", "2.wav"),
        item("lost", "test", "gone.jpg", "1.wav"),
        item("fine", "dev", "good.jpg", "good.wav"),
    ]


@pytest.mark.parametrize(("number", "named"), [(0, "empty.wav"), (1, "long.wav"), (2, "text.jpg"), (3, "gone.jpg")])
def test_first_bad_file_ends_the_run(tmp_path, number, named):
    items = with_files(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / named}: ")):
        write([items[4], items[number]], tmp_path / "new/out", max_seconds=1)
    assert not (tmp_path / "new").exists()


def test_bad_files_can_be_skipped_and_are_reported(tmp_path):
    report = write(with_files(tmp_path), tmp_path / "out", max_seconds=1, skip_bad=True)
    made = manifest.load(tmp_path / "out")
    assert made.image_id.tolist() == [b"half", b"fine"]
    assert made.splits == ("train", "dev")  # test lost all it had
    assert [shard.name for shard in made.shards] == ["train-000000.tar", "dev-000000.tar"]
    assert list(members(tmp_path / "out/train-000000.tar")) == ["half.json", "half.jpg", "half.0.flac"]
    assert [(one.what, one.name, one.split, one.captions) for one in report.dropped] == [
        ("caption", "half-0", "train", 1),
        ("caption", "mute-0", "train", 1),
        ("caption", "mute-1", "train", 1),
        ("picture", "mute", "train", 0),
        ("picture", "blind", "train", 2),
        ("picture", "lost", "test", 1),
    ]
    text = report.text()
    assert "dropped: 3 pictures, 6 captions" in text
    assert f"train caption half-0: {tmp_path}/empty.wav: empty file (0 bytes)" in text
    assert report.splits["train"].captions + report.splits["dev"].captions + 6 == 8
    assert load_report(tmp_path / "out") == report


def test_twin_of_a_dropped_picture(tmp_path):
    items = [with_files(tmp_path)[2], drawn("twin", twin="blind")]
    write(items, tmp_path / "out", skip_bad=True)
    assert manifest.load(tmp_path / "out").twin.tolist() == [-1]


def test_nothing_left_to_write(tmp_path):
    with pytest.raises(UserError, match=r"no sample is left to write: .*gone\.jpg: no such file"):
        write(with_files(tmp_path)[3:4], tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


def no_voice():
    raise UserError("install the voices")


def test_failing_synthesis_is_no_bad_file(tmp_path):
    items = [drawn("a"), Item("b", "train", ITEMS[0].picture, (Caption("b-0", no_voice),))]
    with pytest.raises(UserError, match="install the voices"):
        write(items, tmp_path / "out", skip_bad=True)


def test_report(tmp_path):
    report = write(ITEMS, tmp_path, samples_per_shard=2)
    train = report.splits["train"]
    assert (train.pictures, train.captions, train.speakers) == (3, 6, {"speaker 0", "speaker 1", "speaker 2"})
    assert train.seconds == pytest.approx(1.2)
    lines = report.text().splitlines()
    assert lines[1].split() == ["train", "3", "6", "0.00", "3"]
    assert lines[4].split() == ["all", "5", "9", "0.00", "3"]
    assert lines[-2].startswith("4 shards")
    assert lines[-1] == "nothing dropped"


def test_progress_counts_every_picture(tmp_path):
    done = []
    write_shards(ITEMS, tmp_path, "tiny", Format(), {}, progress=done.append)
    assert sum(done) == len(ITEMS)


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(UserError, match=r"is not empty \(it holds train-000000\.tar\)"):
        write(ITEMS, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"someone else's"
    with pytest.raises(UserError, match=r"cannot write into .*: File exists"):
        write(ITEMS, tmp_path / "train-000000.tar")


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    for name in (
        UNFINISHED,
        "train-000000.tar",
        "train-000009.tar",
        "old-000000.tar",
        "train-000001.tar.77.tmp",
        "index.npz",
    ):
        (tmp_path / name).write_bytes(b"junk")
    write(ITEMS, tmp_path)
    write(ITEMS, tmp_path / "undisturbed")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}


def test_one_writer_at_a_time(tmp_path):
    with open(tmp_path / UNFINISHED, "w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another make_shards is writing into"):
            write(ITEMS, tmp_path)
    write(ITEMS, tmp_path)


@pytest.mark.parametrize("moment", [1, 3, 5, 6])  # a shard, another, the report, the index
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, moment):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(descriptor)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write(ITEMS[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()
