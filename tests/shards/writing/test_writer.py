import errno
import fcntl
import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from shards import files, manifest
from shards.corpora.item import Caption, Item
from shards.corpora.text_files import ListFile
from shards.errors import UserError
from shards.report import Dropped, Report, load_report
from shards.writing import writer as module
from shards.writing.folder_lock import UNFINISHED, Part, claim_folder, count_finished, remove_leftovers
from shards.writing.writer import (
    Format,
    estimate_sizes,
    merge_shards,
    plan_shards,
    sample_key,
    write_part,
    write_shards,
)
from tests.shards import tiny_corpora as tiny


def tone(hertz=300, rate=16000, seconds=0.2):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.stack([wave, 0 * wave]).astype(np.float32), rate


def drawn(image_id, split="train", captions=2, rate=16000, **how):
    """A picture and captions that need no file."""
    spoken = tuple(
        Caption(f"{image_id}-{k}", partial(tone, 300 + 50 * k, rate), f"«text» {k}", f"speaker {k}")
        for k in range(captions)
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
    drawn("x", "extra", captions=1, rate=22050, twin="t-1"),
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
        *("dev-000000.tar", "extra-000000.tar", "index.npz", "manifest.json", "report.json", "sources.json"),
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
def test_words_that_cannot_be_stored_are_named_before_anything_is_written(tmp_path, change, named, skip_bad):
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
    assert lines[5].startswith("4 shards")
    assert lines[6:] == ["seconds       captions", "0 to 1               9  " + 40 * "#", "nothing dropped"]
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["durations"] == [9]
    assert sorted(stored) == ["bytes", "dropped", "durations", "shards", "splits"]


LEFT_OUT = Dropped("caption", "u", "train", "t.csv line 3: no audio", captions=1)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_was_left_out_when_the_corpus_was_read_is_reported(tmp_path, parts):
    if parts == 1:
        write_shards(ITEMS, tmp_path, "tiny", Format(), {}, dropped=[LEFT_OUT])
    else:
        planned = plan_shards(ITEMS, "tiny", Format(), {}, parts, [LEFT_OUT])
        for number in range(1, parts + 1):
            write_part(planned, tmp_path, Part(number, parts))
        merge_shards(tmp_path)
    assert load_report(tmp_path).dropped == [LEFT_OUT]


def test_a_shard_does_not_depend_on_where_the_corpus_names_its_samples():
    moved = [replace(item, place="t.csv line 9") for item in ITEMS]
    assert plan_shards(moved, "tiny", Format(), {}).plan == plan_shards(ITEMS, "tiny", Format(), {}).plan


def doubtful(folder):
    """Pictures with recordings that are clipped, silent, very quiet, in opposite channels, and fine."""
    wave = tone()[0][0]
    recordings = {
        "loud": (2 * wave.clip(-0.25, 0.25)) * 2,
        "mute": 0 * wave,
        "fine": wave,
        "faint": wave / 200,
        "opposite": np.stack([wave, -0.9 * wave], axis=1),
    }
    items = []
    for n, (name, samples) in enumerate(recordings.items()):
        soundfile.write(folder / f"{name}.wav", samples, 16000)
        items.append(Item(f"p{n}", "train", tiny.photo(folder / f"{n}.jpg"), (Caption(name, folder / f"{name}.wav"),)))
    return items


@pytest.mark.parametrize("parts", [1, 2])
def test_recordings_to_listen_to_are_counted_and_named(tmp_path, parts):
    items, out = doubtful(tmp_path), tmp_path / "out"
    if parts == 1:
        report = write(items, out, samples_per_shard=1)
    else:
        for number in (2, 1):
            write_one_part(items, out, number, 2)
        report = merge_shards(out)
    assert [(one.utterance, one.sample, one.caption, one.what.partition(":")[0]) for one in report.warnings] == [
        ("loud", "p0", 0, "clipped"),
        ("mute", "p1", 0, "silence"),
        ("faint", "p3", 0, "very quiet"),
        ("opposite", "p4", 0, "cancelled"),
    ]
    assert all(f"{one.sample}.0.flac" in members(out / one.shard) for one in report.warnings)
    assert load_report(out) == report
    lines = report.text().splitlines()
    at = lines.index("nothing dropped")
    assert lines[at + 1].startswith(
        "stored, but should be checked by ear: 4 audio files (1 clipped, 1 silence, 1 very quiet"
    )
    assert lines[at + 2].startswith("  train caption loud: clipped: ")
    assert (
        lines[at + 5] == "  train caption opposite: cancelled: the mean of its channels is nearly 0; channel 1 was kept"
    )
    kept = members(out / "train-000004.tar")["p4.0.flac"]
    assert np.abs(soundfile.read(io.BytesIO(kept))[0]).max() == pytest.approx(0.5, abs=0.01)


def test_progress_counts_every_picture(tmp_path):
    done = []
    write_shards(ITEMS, tmp_path, "tiny", Format(), {}, progress=done.append)
    assert sum(done) == len(ITEMS)


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(UserError, match=r"is not empty \(it contains train-000000\.tar\)"):
        write(ITEMS, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"someone else's"
    with pytest.raises(UserError, match=r"cannot write into .*: File exists"):
        write(ITEMS, tmp_path / "train-000000.tar")


@pytest.mark.parametrize(
    ("durations", "bars"),
    [
        ([], []),
        ([3.0, 3.99, 5.5], [("3 to 4", 2, 40), ("4 to 5", 0, 0), ("5 to 6", 1, 20)]),
        (
            [1.0] * 1000 + [23.0],
            [("0 to 2", 1000, 40), *((f"{n} to {n + 2}", 0, 0) for n in range(2, 22, 2)), ("22 to 24", 1, 1)],
        ),
        (
            [100.0, 3600.0],
            [
                ("0 to 300", 1, 40),
                *((f"{n} to {n + 300}", 0, 0) for n in range(300, 3600, 300)),
                ("3600 to 3900", 1, 40),
            ],
        ),
    ],
)
def test_histogram(durations, bars):
    report = Report()
    report.add_durations(durations)
    rows = [re.fullmatch(r"(\d+ to \d+) +([\d,]+) *(#*)", line) for line in report.text().splitlines()[3:-1]]
    assert [(row[1], int(row[2].replace(",", "")), len(row[3])) for row in rows] == bars


# What a stopped run leaves, and how the next one goes on.


def shard_corpus(folder, bad=None):
    """Three shards of two pictures from files, and one of drawn ones; the recording of picture `bad` is empty."""
    items = []
    for n in range(6):
        photo = tiny.photo(folder / f"{n}.png", colour=("red", "blue", "green")[n % 3])
        speech = tiny.speech(folder / f"{n}.wav")
        if n == bad:
            speech.write_bytes(b"")
        items.append(Item(f"p{n}", "train", photo, (Caption(f"u{n}", speech, f"text {n}", "anna"),)))
    return [*items, drawn("d0", "dev", 1), drawn("d1", "dev", 1)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """What a shard keeps if no one writes it again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def stop(items, folder, **how):
    """Begin to write, and end with shards kept because of a bad recording."""
    with pytest.raises(
        UserError, match=r"empty file \(0 bytes\); \d of 4 shards are finished and kept: the same comm"
    ) as e:
        write(items, folder, samples_per_shard=2, **how)
    assert "\n" not in str(e.value)
    return identities(folder)


def test_bad_input_keeps_finished_shards_and_the_next_run_goes_on(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    assert sorted(kept) == ["train-000000.tar", "train-000001.tar"]
    tiny.speech(tmp_path / "corpus/4.wav")
    done = []
    report = write_shards(items, out, "tiny", Format(2), {"corpus": "tiny"}, progress=done.append)
    assert sum(done) == len(items)
    assert kept.items() <= identities(out).items()
    assert "4 shards, " in report.text()
    assert ", 2 of them kept from an earlier run\n" in report.text()
    write(items, tmp_path / "undisturbed", samples_per_shard=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_with_skip_bad_a_run_goes_on_and_without_it_does_not(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=2), tmp_path / "out"
    kept = stop(items, out)
    items.append(Item("gone", "dev", tmp_path / "gone.jpg", items[0].captions))  # dev is planned anew, train is not
    items.append(Item("end", "test", no_voice, items[0].captions))
    with pytest.raises(UserError, match=r"install the voices; 4 of 6 shards .*: the same command resumes"):
        write(items, out, samples_per_shard=2, skip_bad=True)
    assert kept.items() <= identities(out).items()
    with pytest.raises(UserError, match=r"2\.wav: empty file"):  # the shard without it is not taken for whole
        write(items, out, samples_per_shard=2)
    report = write(items[:-1], out, samples_per_shard=2, skip_bad=True)
    assert [one.name for one in report.dropped] == ["u2", "p2", "gone"]
    write(items[:-1], tmp_path / "undisturbed", samples_per_shard=2, skip_bad=True)
    assert contents(out) == contents(tmp_path / "undisturbed")


def other_caption(item, **how):
    return replace(item, captions=(replace(item.captions[0], **how),))


def touched(item):
    os.utime(item.picture, ns=(1, 1))
    return item


def other_recording(item):
    tiny.speech(item.captions[0].audio, seconds=0.1)
    return item


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, touched),
        (0, other_recording),
        (0, partial(replace, image_id="other")),
        (0, partial(replace, twin="p1")),
        (0, partial(other_caption, text="other")),
        (0, partial(other_caption, speaker=None)),
        (0, partial(other_caption, utterance="other")),
        (6, partial(other_caption, audio=partial(tone, 301))),
        (6, partial(other_caption, audio=partial(tone, 300, seconds=0.3))),
        (6, partial(replace, picture=partial(Image.new, "RGB", (20, 20), "blue"))),
        (6, partial(replace, picture=partial(Image.fromarray, np.zeros((2000, 1, 3), np.uint8)))),
    ],
)
def test_a_changed_shard_alone_is_written_again(tmp_path, number, change):
    items = [*shard_corpus(tmp_path / "corpus"), Item("end", "test", no_voice, (Caption("end", no_voice),))]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="4 of 5 shards are finished"):
        write(items, out, samples_per_shard=2)
    before = identities(out)
    again = [*items[:number], change(items[number]), *items[number + 1 : -1]]
    assert write(again, out, samples_per_shard=2).kept == 3
    name = "train-000000.tar" if number == 0 else "dev-000000.tar"
    assert {one for one, identity in identities(out).items() if before[one] != identity} == {name}
    write(again, tmp_path / "undisturbed", samples_per_shard=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_arrays_that_look_alike_are_told_apart(tmp_path):
    pixels = np.zeros((2000, 3, 3), np.uint8)
    other = pixels.copy()
    other[1000] = 255  # numpy shows neither in full
    plans = [
        plan_shards([replace(drawn("a"), picture=partial(Image.fromarray, one))], "tiny", Format(), {})
        for one in (pixels, pixels.copy(), other)
    ]
    digests = [planned.plan.shards["train-000000.tar"] for planned in plans]
    assert digests[0] == digests[1] != digests[2]


def spoil_tar(tar, record):
    os.truncate(tar, tar.stat().st_size - 1)


def spoil_record(tar, record):
    os.truncate(record, record.stat().st_size - 1)


def lose_tar(tar, record):
    tar.unlink()


def lose_record(tar, record):
    record.unlink()


@pytest.mark.parametrize("harm", [spoil_tar, spoil_record, lose_tar, lose_record])
def test_a_shard_that_is_not_as_recorded_is_written_again(tmp_path, harm):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    harm(out / "train-000000.tar", out / UNFINISHED / "train-000000.tar.json")
    report = write(items, out, samples_per_shard=2, skip_bad=True)
    assert report.kept == 1
    assert identities(out)["train-000001.tar"] == kept["train-000001.tar"]
    write(items, tmp_path / "undisturbed", samples_per_shard=2, skip_bad=True)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_shards_of_a_corpus_that_shrank_are_removed(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    stop(items, out)
    write(items[:2], out, samples_per_shard=2)
    assert sorted(contents(out)) == ["index.npz", "manifest.json", "report.json", "sources.json", "train-000000.tar"]


def test_another_command_is_refused_where_there_is_something_to_lose(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    with pytest.raises(UserError, match=r"unfinished run made with quality 90, now 80: run that .* with --restart$"):
        write(items, out, samples_per_shard=2, quality=80)
    with pytest.raises(UserError, match=r"made with corpus tiny, now other"):
        write_shards(items, out, "other", Format(2), {})
    assert identities(out) == kept
    write_shards(items[:4], out, "other", Format(2), {}, restart=True)
    assert manifest.load(out).corpus == "other"
    assert not kept.items() & identities(out).items()


def test_another_command_takes_over_where_no_shard_is_finished(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(quality=50), {}).plan
    (tmp_path / UNFINISHED).mkdir()
    plan.save(tmp_path / UNFINISHED)
    (tmp_path / "train-000000.tar.77.tmp").write_bytes(b"junk")
    write(ITEMS, tmp_path)
    write(ITEMS, tmp_path / "undisturbed")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == contents(tmp_path / "undisturbed")


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(), {"corpus": "tiny"}).plan
    (tmp_path / UNFINISHED).mkdir()
    plan.save(tmp_path / UNFINISHED)
    for name in (
        f"{UNFINISHED}/part-1-of-1.lock",
        f"{UNFINISHED}/plan.json.77.tmp",
        f"{UNFINISHED}/train-000000.tar.json.77.tmp",
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
    assert left == contents(tmp_path / "undisturbed")
    assert not (tmp_path / UNFINISHED).exists()


def killed_at(moment, after, work):
    """Work in a process that dies just before or after its n-th change of a name; whether it got as far."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    calls = []

    def dying(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) == moment and not after:
                os._exit(9)
            try:
                real(*arguments, **options)
            finally:
                if len(calls) == moment:
                    os._exit(9)

        return call

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_change_of_a_name(tmp_path, after):
    items = ITEMS[:3]  # none to be resampled: torch is not made for a fork
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    moment = 1
    while killed_at(moment, after, partial(write, items, out := tmp_path / f"{moment}", samples_per_shard=1)):
        notes = out / UNFINISHED
        kept = {name: value for name, value in identities(out).items() if (notes / f"{name}.json").exists()}
        if not (out / manifest.MANIFEST).exists():
            assert write(items, out, samples_per_shard=1).kept == len(kept)
        remove_leftovers(out)
        assert kept.items() <= identities(out).items()
        assert contents(out) == contents(tmp_path / "undisturbed")
        moment += 1
    assert moment > 12  # the plan, three shards with their records, the report, the index, the manifest, the notes
    assert contents(tmp_path / f"{moment}") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_change_of_a_name_while_a_finished_folder_is_made_again(tmp_path, after):
    items = ITEMS[:2]
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    again, moment, left_finished = True, 0, 0
    while again:
        moment += 1
        out = tmp_path / f"{moment}"
        write(ITEMS[1:3], out, samples_per_shard=2)  # other shards, one of another name
        old = contents(out)
        work = partial(write_shards, items, out, "tiny", Format(1), {"corpus": "tiny"}, restart=True)
        again = killed_at(moment, after, work)
        if (out / manifest.MANIFEST).exists() and again:
            remove_leftovers(out)
            left_finished += 1
            assert contents(out) in (old, contents(tmp_path / "undisturbed")), "neither the old folder nor the new one"
            write_shards(items, out, "tiny", Format(1), {"corpus": "tiny"}, restart=True)
        elif again:
            write(items, out, samples_per_shard=1)
        assert contents(out) == contents(tmp_path / "undisturbed")
    assert moment > 12
    assert left_finished


def test_restart_of_a_finished_folder_removes_nothing_of_others(tmp_path):
    write(ITEMS, tmp_path)
    before = identities(tmp_path)
    (tmp_path / "mine-000001.tar").touch()
    with pytest.raises(UserError, match=r"is not empty \(it contains mine-000001.tar\)"):
        write_shards(ITEMS, tmp_path, "tiny", Format(), {}, restart=True)
    assert before.items() <= identities(tmp_path).items()
    (tmp_path / "mine-000001.tar").unlink()
    write_shards(ITEMS, tmp_path, "tiny", Format(), {"corpus": "tiny"}, restart=True)
    assert not before.items() & identities(tmp_path).items()


# What shards were made from.


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def other_content(path):
    """As long as before; the time of change is set, since that of the file system may not be fine enough."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


CHANGES = [(longer, "has another size"), (other_content, "has other content")]


@pytest.mark.parametrize(("change", "line"), CHANGES)
@pytest.mark.parametrize("name", ["0.png", "1.wav"])
def test_a_file_that_changes_after_it_was_read_is_noticed_at_the_end(tmp_path, name, change, line):
    items, out = shard_corpus(tmp_path / "corpus"), tmp_path / "out"
    done = []

    def progress(count):
        done.append(count)
        if len(done) == 4:  # the first shard is written, the second nearly
            change(tmp_path / "corpus" / name)

    with pytest.raises(
        UserError, match=rf"{name} {line} since train-000000\.tar was written: run the same command again"
    ):
        write_shards(items, out, "tiny", Format(2), {"corpus": "tiny"}, progress=progress)
    assert write(items, out, samples_per_shard=2).kept == 3
    write(items, tmp_path / "undisturbed", samples_per_shard=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_merge_refuses_parts_made_from_files_that_changed_since(tmp_path, change, line):
    items = shard_corpus(tmp_path / "corpus")
    for number in (1, 2):
        write_one_part(items, tmp_path / "out", number, 2)
    change(tmp_path / "corpus/1.wav")
    shard = r"since train-000001\.tar was written"
    with pytest.raises(UserError, match=rf"corpus/1\.wav {line} {shard}: run --part 2/2 again$"):
        merge_shards(tmp_path / "out")
    assert write_one_part(items, tmp_path / "out", 2, 2) == (1, 3)
    merge_shards(tmp_path / "out")
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_merge_takes_files_that_were_touched_and_names_how_many_are_gone(tmp_path):
    items = shard_corpus(tmp_path / "corpus")
    for number in (1, 2):
        write_one_part(items, tmp_path / "out", number, 2)
    os.utime(tmp_path / "corpus/1.wav", ns=(1, 1))
    (tmp_path / "corpus/2.wav").unlink()
    (tmp_path / "corpus/2.png").unlink()
    report = merge_shards(tmp_path / "out")
    assert report.missing_sources == 2
    assert "\n2 source files are missing now: whether these changed is unknown\n" in report.text()


def test_parts_that_read_other_lists_are_refused_while_one_is_at_work(tmp_path):
    plans = [
        plan_shards(items, "tiny", Format(), {}, 2, lists=[ListFile("t.csv", 1, sha)]).plan
        for items, sha in ((ITEMS, "a"), (ITEMS[:3], "b"))
    ]
    line = r"the corpus changed since it started \(t\.csv was edited\): wait for it"
    with (
        claim_folder(tmp_path, Part(1, 2), plans[0]),
        pytest.raises(UserError, match=line),
        claim_folder(tmp_path, Part(2, 2), plans[1]),
    ):
        pass


def forget(notes):
    """Make plan and records those of a version that did not note what shards are made from."""
    for path in notes.glob("*.json"):
        stored = json.loads(path.read_bytes())
        for name in ("sources", "lists", "pictures", "captions", "dropped")[: 1 if "sha256" in stored else None]:
            stored.pop(name, None)
        path.write_text(json.dumps(stored))


def test_a_run_of_an_earlier_version_is_gone_on_from(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    forget(out / UNFINISHED)
    tiny.speech(tmp_path / "corpus/4.wav")
    assert write(items, out, samples_per_shard=2).kept == 2
    assert kept.items() <= identities(out).items()
    write(items, tmp_path / "undisturbed", samples_per_shard=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_parts_of_an_earlier_version_are_merged_and_their_sources_are_not_known(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus"), tmp_path / "out"
    write_one_part(items, out, 1, 1)
    forget(out / UNFINISHED)
    merge_shards(out)
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    undisturbed = contents(tmp_path / "undisturbed")
    del undisturbed["sources.json"]
    assert contents(out) == undisturbed


def test_one_writer_at_a_time(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(), {"corpus": "tiny"}).plan
    with claim_folder(tmp_path, plan=plan):
        with pytest.raises(UserError, match=rf"^another make_shards is writing to {tmp_path}: wait for it"):
            write(ITEMS, tmp_path)
        assert (tmp_path / UNFINISHED / "plan.json").exists()
    assert contents(tmp_path) == {}
    write(ITEMS, tmp_path)


# fsync of: the plan and its folder, a shard, its folder, its record, the report, the index
@pytest.mark.parametrize(("moment", "kept"), [(1, 0), (2, 0), (3, 0), (5, 0), (7, 1), (9, 1)])
def test_full_disk_leaves_finished_shards_or_nothing(tmp_path, monkeypatch, moment, kept):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(descriptor)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write(ITEMS[:1], tmp_path / "out")
    assert (tmp_path / "out").exists() == bool(kept)
    assert not list(tmp_path.glob("**/*.tmp"))
    assert write(ITEMS[:1], tmp_path / "out").kept == kept
    write(ITEMS[:1], tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


# Parts.


def write_one_part(items, folder, number, of, **how):
    planned = plan_shards(items, "tiny", Format(samples_per_shard=1, **how), {"corpus": "tiny"}, of)
    return write_part(planned, folder, Part(number, of))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_in_any_order_give_the_same_bytes(tmp_path, parts):
    out = tmp_path / "out"
    written = [write_one_part(ITEMS, out, number, parts) for number in range(parts, 0, -1)]
    assert sum(shards for shards, _ in written) == len(ITEMS)
    assert [kept for _, kept in written] == [0] * parts
    assert not (out / "manifest.json").exists()
    assert write_one_part(ITEMS, out, 1, parts) == (0, written[-1][0])
    before = identities(out)
    report = merge_shards(out)
    undisturbed = write(ITEMS, tmp_path / "undisturbed", samples_per_shard=1)
    assert report == undisturbed
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert identities(out) == before


def test_a_new_tar_never_goes_with_an_old_record(tmp_path):
    items = [Item("p", "train", tiny.photo(tmp_path / "p.png"), (Caption("u", tmp_path / "u.wav"),))]
    other = tiny.speech(tmp_path / "other.wav").read_bytes()  # as long, so that the tar has the same size
    moment, refused = 0, 0
    again = True
    while again:
        moment += 1
        tiny.speech(tmp_path / "u.wav")
        out = tmp_path / f"{moment}"
        write_one_part(items, out, 1, 1, codec="wav")
        (tmp_path / "u.wav").write_bytes(other)
        again = killed_at(moment, True, partial(write_one_part, items, out, 1, 1, codec="wav"))
        if not count_finished(out):
            refused += 1
            continue
        merge_shards(out)
        (shard,) = manifest.load(out).shards
        assert shard.sha256 == files.file_sha256(out / shard.name)
    assert refused >= 2


def test_another_number_of_parts_goes_on(tmp_path):
    write_one_part(ITEMS, tmp_path / "out", 2, 3)
    assert write_one_part(ITEMS, tmp_path / "out", 2, 2) == (1, 1)
    assert write(ITEMS, tmp_path / "out", samples_per_shard=1).kept == 3
    write(ITEMS, tmp_path / "undisturbed", samples_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_merge_names_what_is_missing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"out contains no parts to merge: write them with .* --part I/N"):
        merge_shards(out)
    assert not out.exists()
    write_one_part(ITEMS, out, 2, 3)
    line = r"^3 of 5 shards are missing.*: train-000000\.tar \(part 1/3\), train-000002\.tar \(part 3/3\), "
    with pytest.raises(UserError, match=line + r"dev-000000\.tar \(part 1/3\): run --part 1/3, 3/3 again$"):
        merge_shards(out)
    write_one_part(ITEMS, out, 1, 3)
    write_one_part(ITEMS, out, 3, 3)
    os.truncate(out / "train-000001.tar", 1024)
    with pytest.raises(UserError, match=r"1 of 5 .* train-000001\.tar \(part 2/3\): run --part 2/3 again"):
        merge_shards(out)
    assert not (out / "manifest.json").exists()
    assert write_one_part(ITEMS, out, 2, 3) == (1, 1)
    merge_shards(out)
    assert len(manifest.load(out).key) == 5
    with pytest.raises(UserError, match="contains no parts to merge"):
        merge_shards(out)


def test_merge_refuses_parts_of_a_corpus_that_changed_between_them(tmp_path):
    items = [*ITEMS[:3], replace(ITEMS[4], image_id="t-0")]
    write_one_part(ITEMS, tmp_path, 1, 2)
    write_one_part(items, tmp_path, 2, 2)  # train: t-2, t-1, t-0 rather than t-3; no extra
    with pytest.raises(UserError, match=r"1 of 4 shards .* train-000002\.tar \(part 1/2\): run --part 1/2 again"):
        merge_shards(tmp_path)
    assert write_one_part(items, tmp_path, 1, 2) == (1, 1)
    merge_shards(tmp_path)
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    (tmp_path / "undisturbed").rename(tmp_path.with_name("undisturbed"))
    assert contents(tmp_path) == contents(tmp_path.with_name("undisturbed"))


def test_parts_at_work_at_once(tmp_path):
    out = tmp_path / "out"
    items = [Item("late", "dev", tmp_path / "late.png", ITEMS[0].captions), *ITEMS]
    plan = plan_shards(items, "tiny", Format(samples_per_shard=1), {"corpus": "tiny"}, 2).plan
    with claim_folder(out, Part(1, 2), plan):
        temporary = out / "train-000000.tar.77.tmp"
        temporary.touch()
        for number, of in ((1, 2), (1, 1), (2, 3)):
            with pytest.raises(UserError, match=r"another make_shards is writing to .* \(part 1/2\): wait for it"):
                write_one_part(items, out, number, of)
        with pytest.raises(UserError, match=r"\(part 1/2\): wait"):
            merge_shards(out)
        with pytest.raises(UserError, match="quality 90, now 80"):
            write_one_part(items, out, 2, 2, quality=80)
        with pytest.raises(
            UserError, match=r"corpus changed since it started \(.*\): wait for it, or stop it, then"
        ):
            write_one_part(ITEMS, out, 2, 2)
        with pytest.raises(UserError, match=r"late\.png: no such file"):
            write_one_part(items, out, 2, 2)
        assert temporary.exists(), "of the part at work"
        assert (out / UNFINISHED / "plan.json").exists()
        tiny.photo(tmp_path / "late.png")
        write_one_part(items, out, 2, 2)
    assert not temporary.exists()
    assert write_one_part(items, out, 1, 2) == (3, 0)
    merge_shards(out)
    assert not (out / UNFINISHED).exists()


def test_last_part_to_fail_leaves_nothing(tmp_path):
    bad = [Item("bad", "train", tmp_path / "none.jpg", ITEMS[0].captions)]
    with pytest.raises(UserError, match=r"no such file$"):
        write_one_part(bad, tmp_path / "out", 1, 2)
    assert not (tmp_path / "out").exists()


def test_the_last_one_removes_the_notes_while_another_comes(tmp_path, monkeypatch):
    calls = []

    def flock(descriptor, how, real=fcntl.flock):
        calls.append(how)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / UNFINISHED)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert write_one_part(ITEMS, tmp_path, 1, 1) == (5, 0)
    assert len(calls) > 1


def test_without_locks_of_the_file_system(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "out"
    bad = [ITEMS[1], Item("bad", "train", tmp_path / "none.jpg", ITEMS[0].captions)]
    with pytest.raises(UserError, match=r"none\.jpg"):
        write_one_part(bad, out, 2, 2)
    assert (out / UNFINISHED / "plan.json").exists()  # the other part may be at work
    write_one_part(ITEMS[1:3], out, 1, 2)
    write_one_part(ITEMS[1:3], out, 2, 2)
    merge_shards(out)
    assert len(manifest.load(out).key) == 2


# Before anything is written.


def test_size_estimate(tmp_path):
    items = [drawn(f"t{n}", captions=1 + n % 3) for n in range(40)] + [drawn("d", "dev")]
    lines = estimate_sizes(items, Format(samples_per_shard=9)).splitlines()
    report = write(items, tmp_path / "out", samples_per_shard=9)
    train, dev, every = (line.split() for line in lines[1:4])
    assert train[:4] == ["train", "40", "79", "5"]
    assert dev[:4] == ["dev", "1", "2", "1"]
    assert every[:4] == ["all", "41", "81", "6"]
    assert float(every[5]) == pytest.approx(report.bytes / 1e6, rel=0.3, abs=0.1)
    assert lines[4] == "hours and MB are estimated from 9 samples; nothing is written"
    with pytest.raises(UserError, match="occurs 2 times"):
        estimate_sizes(items + items[:1], Format())


def test_estimate_of_longer_speech():
    minute = Caption("m", partial(tone, seconds=60))
    items = [replace(drawn(f"{n}"), captions=(minute,)) for n in range(120)]
    row = estimate_sizes(items, Format(codec="wav")).splitlines()[1].split()
    assert row[:5] == ["train", "120", "120", "1", "2.00"]
    assert float(row[5]) == pytest.approx(120 * 60 * 32000 / 1e6, rel=0.01)
