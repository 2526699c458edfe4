import logging
import os

import numpy as np
import pytest

from shards.corpora.item import Item
from shards.errors import UserError
from shards.manifest import load
from shards.media.audio import decode_audio, read_audio
from shards.reading.reader import Reader
from shards.writing.writer import Format, write_shards
from tests.shards.corpora.reading import load_corpus, read, splits
from tests.shards.tars import stock_tars as stock
from toolkit.make_shards import main


def contents(item: Item):
    return item.picture.read(), [caption.audio.read() for caption in item.captions]


def test_one_caption_each(tmp_path):
    items = read("webdataset", "--root", stock.one_caption_each(tmp_path / "s"))
    assert [(item.image_id, item.split) for item in items] == [(f"k{n}", "train") for n in range(6)]
    for n, item in enumerate(items):
        assert contents(item) == (stock.picture(f"p{n}"), [stock.speech(f"s{n}")])
        (caption,) = item.captions
        assert (caption.utterance, caption.text, caption.speaker) == (f"k{n}", f"text {n}", None)


def test_samples_with_one_image_id_are_joined(tmp_path):
    items = read("webdataset", "--root", stock.joined_by_image_id(tmp_path / "s"))
    assert [(item.image_id, item.split) for item in items] == [("0", "train"), ("1", "train"), ("2", "test")]
    for n, item in enumerate(items):
        assert contents(item)[0] == stock.picture(f"p{n}", "PNG")
        assert [(one.utterance.rpartition("/")[2], one.text, one.speaker, one.language) for one in item.captions] == [
            (f"{n}_{k}", f"text {n} {k}", f"s{k}", "en") for k in (0, 1)
        ]


def test_other_names_of_the_members(tmp_path):
    root = stock.several_captions(tmp_path / "s", "train")
    stock.several_captions(root, "val", first=3)
    options = ("--image", "photo.webp", "--audio", "wav;speech.ogg", "--text", "transcript")
    items = read("webdataset", "--root", root, *options)
    assert splits(items) == {"train": 3, "val": 3}
    for n, item in enumerate(items):
        assert contents(item) == (stock.picture(f"p{n}", "WEBP"), [stock.speech(f"s{n}.{k}", "OGG") for k in (0, 1)])
        assert [(one.utterance, one.text) for one in item.captions] == [(f"k{n}.{k}", f"text {n} {k}") for k in (0, 1)]
    with pytest.raises(UserError, match=r"no sample in 2 tars .* members end in '0\.speech\.ogg'"):
        read("webdataset", "--root", root, "--image", "tiff", "--audio", "aac", "--text", "t", "--json", "j")


def test_from_stock_tars_to_shards(tmp_path):
    """Pictures and sounds are what the tars have, whatever their formats; several processes write the same bytes."""
    root = stock.joined_by_image_id(tmp_path / "s")
    for name, jobs in (("one", 1), ("two", 2)):
        items = read("webdataset", "--root", root)
        write_shards(items, tmp_path / name, "webdataset", Format(samples_per_shard=1), {}, jobs)
    made = load(tmp_path / "one")
    assert made.hash == load(tmp_path / "two").hash
    reader = Reader(made)
    for n in range(3):
        number = int(made.image_id[n])
        for k, row in enumerate(made.captions(n)):
            expected = read_audio(stock.speech(f"s{number}.{k}", "FLAC", 22050), 10)
            assert np.abs(decode_audio(reader.audio(row)) - expected).max() < 1e-4
        assert reader.meta(n)["captions"][1]["text"] == f"text {number} 1"


def test_our_own_shards_are_read_as_stock_tars(tmp_path):
    first = read("webdataset", "--root", stock.joined_by_image_id(tmp_path / "s"))
    write_shards(first, tmp_path / "made", "webdataset", Format(), {})
    again = sorted(read("webdataset", "--root", tmp_path / "made"), key=lambda item: item.image_id)
    assert [(item.image_id, item.split) for item in again] == [(item.image_id, item.split) for item in first]
    for one, other in zip(first, again, strict=True):
        assert [(c.utterance, c.text, c.speaker, c.language) for c in one.captions] == [
            (c.utterance, c.text, c.speaker, c.language) for c in other.captions
        ]


def test_places_of_tars(tmp_path, caplog):
    root = stock.one_caption_each(tmp_path / "s")
    names = [f"k{n}" for n in range(6)]
    for given in (f"{root}/*.tar", f"{root}/train-{{000000..000001}}.tar", f"file://{root}", f"file://{root}/*.tar"):
        assert [item.image_id for item in read("webdataset", "--root", given)] == names
    assert [i.image_id for i in read("webdataset", "--root", root / "train-000001.tar", root)] == [
        *names[3:],
        *names[:3],
    ]
    for given, reason in (
        ("pipe:touch x", "no commands"),
        (f"simplecache::file://{root}/train-000000.tar", "no commands and no chains"),
        (root / "nothing", "no such folder"),
        (f"{root}/*.tgz", "no tar in"),
        (f"file://{root}/train-000009.tar", "is missing"),
    ):
        with pytest.raises(UserError, match=reason):
            read("webdataset", "--root", given)
    (root / "train-000000.tar").rename(root / "a.tar")
    caplog.set_level(logging.WARNING)
    assert splits(read("webdataset", "--root", root)) == {"train": 6}
    assert "no split in the name of" in caplog.text


def test_splits_by_option_folder_and_json(tmp_path):
    root = stock.one_caption_each(tmp_path / "s")
    options = ("--split", "dev=*-000001.tar", "--split", "train=*")
    assert splits(read("webdataset", "--root", root, *options)) == {"train": 3, "dev": 3}
    with pytest.raises(UserError, match="no --split pattern matches its tar"):
        read("webdataset", "--root", root, "--split", "dev=*-000001.tar")
    (root / "test").mkdir()
    (root / "train-000001.tar").rename(root / "test" / "000001.tar")
    assert splits(read("webdataset", "--root", root)) == {"test": 3, "train": 3}


def test_keys_that_begin_anew_in_each_tar(tmp_path):
    for number in range(2):
        files = {"0.jpg": stock.picture(f"p{number}"), "0.wav": stock.speech(f"s{number}")}
        stock.pack(tmp_path / f"train-{number}.tar", files)
    assert [item.image_id for item in read("webdataset", "--root", tmp_path)] == ["train-0/0", "train-1/0"]


SAMPLE = {"a.jpg": stock.picture("a"), "a.wav": stock.speech("a")}
TWO = {"a.jpg": stock.picture("a"), "a.0.wav": stock.speech("a0"), "a.1.wav": stock.speech("a1")}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"b.jpg": b"x"}, "has no audio"),
        ({"b.wav": b"x"}, "has no picture"),
        ({"b.x.jpg": b"x", "b.y.jpg": b"y", "b.wav": b"z"}, "several pictures: b.x.jpg, b.y.jpg"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": "{"}, "Expecting"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": "[1]"}, "a list, expected an object"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": "[" * 9999}, "nested too deeply"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": b"\xff"}, "utf-8"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": " " * (1 << 20) + "{}"}, "longer than 1 MiB"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": {"split": "../x"}}, "split is '../x'"),
        ({"b.jpg": b"x", "b.wav": b"z", "b.json": {"text": ["1", "2"]}}, "describes 2 captions, and it has 1 audio"),
        ({"b.jpg": b"x", "b.0.wav": b"z", "b.1.wav": b"z", "b.txt": "one"}, "1 lines for 2 captions"),
        ({"b.jpg": b"x", "b.0.wav": b"z", "b.1.wav": b"z", "b.json": {"text": "one"}}, "one text for 2 captions"),
        ({"b.jpg": b"xx", "b.wav": b"z", "b.json": {"image_id": "a"}}, "its picture differs"),
        ({"b.jpg": b"x", "b.wav": b"z", "B.JPG": b"x", "b.JPG": b"y"}, "duplicate|next to each other|no audio"),
        ({"b.jpg": b"x", "c.jpg": b"x", "b.wav": b"z"}, "not next to each other|no audio"),
    ],
)
def test_bad_samples(tmp_path, files, reason):
    stock.pack(tmp_path / "train.tar", {**SAMPLE, **files})
    with pytest.raises(UserError, match=reason):
        read("webdataset", "--root", tmp_path)
    corpus = load_corpus("webdataset", "--root", tmp_path, "--skip-bad")
    assert corpus.items[0].image_id == "a"
    assert corpus.dropped


def test_a_truncated_tar_keeps_the_complete_samples(tmp_path):
    path = stock.pack(tmp_path / "train.tar", {**SAMPLE, "b.jpg": stock.picture("b"), "b.wav": stock.speech("b")})
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(UserError, match=r"train\.tar"):
        read("webdataset", "--root", tmp_path)
    corpus = load_corpus("webdataset", "--root", tmp_path, "--skip-bad")
    assert [item.image_id for item in corpus.items] == ["a"]


def test_a_copy_in_another_split_is_a_leak(tmp_path):
    stock.pack(tmp_path / "train.tar", SAMPLE)
    stock.pack(tmp_path / "test.tar", {"b.jpg": SAMPLE["a.jpg"], "b.wav": stock.speech("b")})
    with pytest.raises(UserError, match=r"is in split train, a copy of it in split test"):
        read("webdataset", "--root", tmp_path)


def test_data_that_would_run_code_is_never_decoded(tmp_path):
    """Stock `webdataset` unpickles members that end in pyd, pickle and pth."""
    hostile = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    stock.pack(tmp_path / "train.tar", {**TWO, "a.pyd": hostile, "a.pickle": hostile, "a.pth": hostile})
    (item,) = read("webdataset", "--root", tmp_path)
    assert len(item.captions) == 2
    assert not (tmp_path / "ran").exists()


def test_an_unreadable_member_is_named(tmp_path):
    stock.pack(tmp_path / "train.tar", {**SAMPLE, "b.jpg": b"x", "b.wav": stock.speech("b")})
    items = read("webdataset", "--root", tmp_path)
    with pytest.raises(UserError, match=r"train\.tar: b\.jpg: text that begins"):
        write_shards(items, tmp_path / "made", "webdataset", Format(), {})
    report = write_shards(items, tmp_path / "made", "webdataset", Format(skip_bad=True), {})
    assert [one.name for one in report.dropped] == ["b"]


def test_a_touched_or_changed_tar(tmp_path, capsys):
    """A tar with another time and the same content is the same corpus; one with another picture is not."""
    root = stock.one_caption_each(tmp_path / "s")
    command = ["webdataset", "--root", str(root), "--out", str(tmp_path / "made"), "--jobs", "1"]
    main(command)
    path = root / "train-000001.tar"
    os.utime(path, ns=(1, 1))
    capsys.readouterr()
    main(command)
    assert "finished already, made with the same arguments" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    data[data.index(stock.picture("p3")) + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"its corpus changed since: .*train-000001\.tar: k3\.jpg has other content"):
        main(command)
