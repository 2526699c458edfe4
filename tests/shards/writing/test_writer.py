"""Written shards: members, bytes and manifest; bad input is refused, or dropped and reported."""

import io
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from shards import files, manifest
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.report import load_report
from shards.writing import writer as module
from shards.writing.writer import Format, plan_shards, sample_key
from tests.shards import tiny_corpora as tiny
from tests.shards.tars.stock_tars import members
from tests.shards.writing.small_corpus import ITEMS, drawn, no_voice, tone, write


def test_members_in_their_order(tmp_path):
    write(ITEMS, tmp_path, samples_per_shard=2)
    assert list(members(tmp_path / "train-000000.tar")) == [
        *("t-2.json", "t-2.jpg", "t-2.0.flac", "t-2.1.flac", "t-2.2.flac"),
        *("t-1.json", "t-1.jpg", "t-1.0.flac", "t-1.1.flac"),
    ]
    assert list(members(tmp_path / "train-000001.tar")) == ["t-3.json", "t-3.jpg", "t-3.0.flac"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("dev-000000.tar", "extra-000000.tar", "index.npz", "manifest.json", "report.json", "sources.json"),
        *("train-000000.tar", "train-000001.tar"),
    ]


def test_headers_do_not_depend_on_machine_or_time(tmp_path):
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
    spoken = (Caption("x-0", tone, language="pt-br"), Caption("x-1", tone))
    write([replace(drawn("x"), captions=spoken)], tmp_path / "other")
    captions = json.loads(members(tmp_path / "other/train-000000.tar")["x.json"])["captions"]
    assert [caption.get("language") for caption in captions] == ["pt-br", None]
    assert "language" not in captions[1]


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
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, files.file_sha256(path))
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
        ([drawn("a"), drawn("b"), drawn("a", "dev")], "image id a occurs 2 times"),
        ([drawn("a", captions=0)], "a has no captions"),
        ([drawn("a", twin="b")], "a is the twin of b, which is not in the corpus"),
        ([drawn("a", split="my/split")], "split 'my/split'"),
    ],
)
def test_impossible_corpora(tmp_path, items, reason):
    with pytest.raises(UserError, match=reason):
        write(items, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HALF = "\ud83d"  # of a letter outside of the basic plane, as JSON may have it


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_id": f"a{HALF}"}, r"picture 'a\\ud83d': its image id 'a\\ud83d' is not valid text"),
        ({"image_id": 7}, "picture 7: its image id 7 is not valid text"),
        ({"image_id": ["a"]}, r"its image id \['a'\] is not valid text"),
        ({"split": None}, "picture 'a': its split None is not valid text"),
        ({"twin": 7}, "picture 'a': its twin 7 is not valid text"),
        ({"captions": (Caption("u", tone, HALF),)}, r"picture 'a': its text '\\ud83d' is not valid text"),
        ({"captions": (Caption("u", tone, speaker=0),)}, "picture 'a': its speaker 0 is not valid text"),
        ({"captions": (Caption(None, tone),)}, "picture 'a': its utterance None is not valid text"),
        ({"captions": (Caption("u", Path(f"{HALF}.wav")),)}, r"'\\ud83d.wav' is not a valid file name"),
        ({"picture": Path("a\0.jpg")}, r"'a\\x00.jpg' is not a valid file name"),
    ],
)
def test_text_that_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, change, named, skip_bad):
    with pytest.raises(UserError, match=named) as caught:
        write([drawn("b"), replace(drawn("a"), **change)], tmp_path / "out", skip_bad=skip_bad)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_file_names_may_be_of_any_bytes(tmp_path):
    photo = tiny.photo(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    write([replace(drawn("a"), picture=photo)], tmp_path / "out")
    assert [shard.samples for shard in manifest.load(tmp_path / "out").shards] == [1]


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
    bad = replace(items[number], split="dev")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / named}: ")) as caught:
        write([items[4], bad], tmp_path / "new/out", max_seconds=1)
    assert "kept" not in str(caught.value)
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


@pytest.mark.parametrize(
    ("limit", "named"), [("MAX_META", r"a: its \.json would have 3\d\d"), ("MAX_MEMBER", r"a: its \.jpg would have")]
)
def test_members_that_no_reader_takes_are_refused_or_dropped(tmp_path, monkeypatch, limit, named):
    monkeypatch.setattr(module, limit, 300)
    items = [drawn("a", captions=3), drawn("b", captions=1)]
    monkeypatch.setattr(module, "read_picture", lambda image, *_: bytes(301 if limit == "MAX_MEMBER" else 9))
    monkeypatch.setattr(module, "encode_audio", lambda *_: bytes(9))
    with pytest.raises(UserError, match=f"picture {named}.*, the limit is 300: "):
        write(items, tmp_path / "out")
    if limit == "MAX_META":
        report = write(items, tmp_path / "out", skip_bad=True)
        assert [(one.name, one.captions) for one in report.dropped] == [("a", 3)]
        assert manifest.load(tmp_path / "out").image_id.tolist() == [b"b"]


def test_twin_of_a_dropped_picture(tmp_path):
    items = [with_files(tmp_path)[2], drawn("twin", twin="blind")]
    write(items, tmp_path / "out", skip_bad=True)
    assert manifest.load(tmp_path / "out").twin.tolist() == [-1]


def test_nothing_left_to_write(tmp_path):
    with pytest.raises(UserError, match=r"no sample is left to write: .*gone\.jpg: no such file"):
        write(with_files(tmp_path)[3:4], tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_failing_synthesis_is_no_bad_file(tmp_path):
    items = [drawn("a"), Item("b", "train", ITEMS[0].picture, (Caption("b-0", no_voice),))]
    with pytest.raises(UserError, match="install the voices"):
        write(items, tmp_path / "out", skip_bad=True)


def test_a_shard_does_not_depend_on_where_the_corpus_names_its_samples():
    moved = [replace(item, where="t.csv line 9") for item in ITEMS]
    assert plan_shards(moved, "tiny", Format(), {}).plan == plan_shards(ITEMS, "tiny", Format(), {}).plan


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(UserError, match=r"is not empty \(it contains train-000000\.tar\)"):
        write(ITEMS, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"someone else's"
    with pytest.raises(UserError, match=r"cannot write into .*: File exists"):
        write(ITEMS, tmp_path / "train-000000.tar")
