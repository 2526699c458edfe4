import argparse
import errno
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from shards.corpora import CORPORA, checked, existing, module
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny

SHARED = Path(__file__).parents[2].parent / "shared/data"


def read(name, *arguments):
    """What the corpus module makes of a command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-bad", action="store_true")
    module(name).add_arguments(parser)
    return module(name).read(parser.parse_args([str(one) for one in arguments]))


def splits(items):
    return dict(Counter(item.split for item in items))


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_has_a_module_that_says_how_it_works(name):
    assert module(name).__doc__
    parser = argparse.ArgumentParser()
    module(name).add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such-option"])


def test_flickr8k(tmp_path):
    root = tiny.flickr8k(tmp_path, {"train": 3, "dev": 1, "test": 2})
    items = read("flickr8k", "--root", root)
    assert splits(items) == {"train": 3, "dev": 1, "test": 2}
    first = items[0]
    assert first.image_id == "1000_ab0"
    assert first.picture == root / "Flicker8k_Dataset/1000_ab0.jpg"
    assert first.captions == tuple(
        Caption(
            f"1000_ab0_{k}",
            root / f"flickr_audio/wavs/1000_ab0_{k}.wav",
            f"caption {k} of 1000_ab0 .",
            str(k + 7),
        )
        for k in (0, 1)
    )


def test_flickr8k_folders_as_people_unpack_them(tmp_path):
    root = tiny.flickr8k(tmp_path)
    expected = [item.image_id for item in read("flickr8k", "--root", root)]
    (root / "Flicker8k_Dataset").rename(root / "Flickr8k_Dataset")
    for path in (root / "Flickr8k_text").iterdir():
        path.rename(root / path.name)
    assert [item.image_id for item in read("flickr8k", "--root", root)] == expected


def test_flickr8k_stray_names_and_unrecorded_pictures(tmp_path, capsys):
    root = tiny.flickr8k(tmp_path)
    for path in (root / "flickr_audio/wav2capt.txt", root / "Flickr8k_text/Flickr8k.token.txt"):
        path.write_text(path.read_text().replace("1000_ab0.jpg", "1000_ab0.jpg.1"))  # as in the real corpus
    splits_file = root / "Flickr8k_text/Flickr_8k.testImages.txt"
    splits_file.write_text(splits_file.read_text() + "9999_unheard.jpg\n")
    (root / "flickr_audio/wavs/readme.txt").write_text("no recording")
    items = read("flickr8k", "--root", root)
    assert splits(items) == {"train": 3, "dev": 1, "test": 1}
    assert items[0].captions[0].text == "caption 0 of 1000_ab0 ."
    assert "1 pictures of the official splits have no recording" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("flickr_audio/wav2capt.txt", "wav2capt.txt"),
        ("flickr_audio/wav2spk.txt", "wav2spk.txt"),
        ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt"),
        ("Flickr8k_text/Flickr_8k.devImages.txt", "Flickr_8k.devImages.txt"),
        ("flickr_audio/wavs/1001_ab1_0.wav", "1001_ab1_0.wav is missing"),
        ("Flicker8k_Dataset/1001_ab1.jpg", "1001_ab1.jpg is missing"),
    ],
)
def test_flickr8k_missing_files_are_named(tmp_path, missing, named):
    root = tiny.flickr8k(tmp_path)
    (root / missing).unlink()
    with pytest.raises(UserError, match=named):
        read("flickr8k", "--root", root)


def test_flickr8k_broken_line(tmp_path):
    root = tiny.flickr8k(tmp_path)
    (root / "flickr_audio/wav2capt.txt").write_text("1000_ab0_0.wav 1000_ab0.jpg #0\n1000_ab0_1.wav\n")
    with pytest.raises(UserError, match=r"wav2capt\.txt line 2: expected 3 fields"):
        read("flickr8k", "--root", root)


def test_spokencoco_as_shipped(tmp_path):
    root = tiny.spokencoco(tmp_path)
    items = read("spokencoco", "--root", root)
    assert splits(items) == {"train": 3, "dev": 3}
    item = items[3]
    assert item.image_id == "COCO_val2014_000000000300"
    assert item.picture == root / "val2014/COCO_val2014_000000000300.jpg"
    assert item.captions[1] == Caption("m1-val_0_1", root / "wavs/val/0/m1-val_0_1.wav", "TEXT 1", "m1")


def test_spokencoco_regrouped(tmp_path, capsys):
    root = tiny.spokencoco(tmp_path)
    parts = {500: "train", 501: "train", 300: "restval", 301: "val", 302: "test"}  # picture 502 is in none
    images = [{"cocoid": number, "split": split, "filename": "x"} for number, split in parts.items()]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    items = read("spokencoco", "--root", root, "--karpathy", root / "dataset_coco.json")
    assert {int(item.image_id[-3:]): item.split for item in items} == {
        500: "train",
        501: "train",
        300: "train",
        301: "dev",
        302: "test",
    }
    assert "1 pictures are in no part" in capsys.readouterr().err


def test_spokencoco_photos_elsewhere(tmp_path):
    root = tiny.spokencoco(tmp_path / "speech")
    (tmp_path / "coco").mkdir()
    for part in ("train2014", "val2014"):
        (root / part).rename(tmp_path / "coco" / part)
    with pytest.raises(UserError, match=r"train2014/COCO_.* is missing \(and 5 more\)"):
        read("spokencoco", "--root", root)
    items = read("spokencoco", "--root", root, "--images", tmp_path / "coco")
    assert items[0].picture.is_file()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"data": [{"image": "a.jpg"}]}', '{"data": [{"image": "x_1.jpg"}]}'),
        '{"data": [{"image": "x_1.jpg", "captions": [7]}]}',
    ],
)
def test_spokencoco_damaged_json(tmp_path, content):
    root = tiny.spokencoco(tmp_path)
    (root / "SpokenCOCO_val.json").write_text(content)
    with pytest.raises(UserError, match=r"SpokenCOCO_val\.json"):
        read("spokencoco", "--root", root)


def test_spokencoco_wrong_karpathy_file(tmp_path):
    root = tiny.spokencoco(tmp_path)
    with pytest.raises(UserError, match="is not Karpathy's"):
        read("spokencoco", "--root", root, "--karpathy", root / "SpokenCOCO_val.json")


def test_places(tmp_path):
    root = tiny.places(tmp_path)
    items = read("places", "--root", root)
    assert [(item.image_id, item.split, len(item.captions)) for item in items] == [
        ("a/abbey/1.jpg", "train", 2),
        ("a/abbey/2.jpg", "train", 1),
        ("b/bar/1.jpg", "dev_seen", 1),
        ("b/bar/1.jpg@dev_unseen", "dev_unseen", 1),
    ]
    caption = items[0].captions[1]
    assert caption == Caption("train_2020-2", root / "wavs/2/train_2020-2.wav", "a place", "s2")
    assert items[3].picture == root / "images/b/bar/1.jpg"


def test_places_of_the_first_release(tmp_path):
    root = tiny.places(tmp_path)
    (root / "metadata").mkdir()
    (root / "train_2020.json").rename(root / "metadata/train.json")
    (root / "dev_seen_2020.json").rename(root / "metadata/val.json")
    (root / "dev_unseen_2020.json").unlink()
    assert splits(read("places", "--root", root)) == {"train": 2, "dev": 1}


def test_places_base_paths(tmp_path):
    root = tiny.places(tmp_path / "a")
    (root / "images").rename(tmp_path / "photos")
    (root / "wavs").rename(tmp_path / "wavs")
    items = read("places", "--root", root, "--images", tmp_path / "photos", "--audio", tmp_path)
    assert items[0].picture.is_file()
    for path in root.glob("*.json"):  # base paths that exist are taken as they are
        head = json.loads(path.read_text()) | {
            "image_base_path": f"{tmp_path}/photos",
            "audio_base_path": f"{tmp_path}/",
        }
        path.write_text(json.dumps(head))
    assert read("places", "--root", root) == items


@pytest.mark.parametrize(
    "content",
    [
        *("[]", '{"data": [{"image": "a.jpg"}]}', "{}", pytest.param("[" * 100_000, id="deep")),
        *(f'{{"data": [{{"image": {image}, "wav": "a.wav"}}]}}' for image in ("null", "7", '["a"]')),
    ],
)
def test_places_damaged_json(tmp_path, content):
    root = tiny.places(tmp_path)
    (root / "dev_seen_2020.json").write_text(content)
    with pytest.raises(UserError, match=r"dev_seen_2020\.json"):
        read("places", "--root", root)


ROWS = [
    {"image": "p/1.png", "audio": "s/1a.wav", "text": "one", "speaker": "anna", "split": "train"},
    {"image": "p/2.png", "audio": "s/2.wav", "split": "test"},
    {"image": "./p/1.png", "audio": "s/1b.wav"},
]


def expected_items(root):
    first = Caption("s/1a.wav", root / "s/1a.wav", "one", "anna"), Caption("s/1b.wav", root / "s/1b.wav")
    return [
        Item("p/1.png", "train", root / "p/1.png", first),
        Item("p/2.png", "test", root / "p/2.png", (Caption("s/2.wav", root / "s/2.wav"),)),
    ]


def test_table_csv(tmp_path):
    root = tiny.table(tmp_path, ROWS)
    assert read("table", "--root", root) == expected_items(root)
    assert read("table", "--root", root / "table.csv") == expected_items(root)


def test_table_json_lines_and_tsv(tmp_path):
    root = tiny.table(tmp_path, ROWS)
    (root / "table.csv").unlink()
    (root / "t.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert read("table", "--root", root) == expected_items(root)
    (root / "t.tsv").write_text("image\taudio\np/1.png\ts/1a.wav\n")
    with pytest.raises(UserError, match="holds 2 tables"):
        read("table", "--root", root)
    assert [item.split for item in read("table", "--root", root / "t.tsv")] == ["train"]


def test_table_texts_may_hold_unusual_ends_of_lines(tmp_path):
    root = tiny.table(tmp_path, ROWS[:1])
    row = {"image": "p/1.png", "audio": "s/1a.wav", "text": "a\u2028b\u2029c\u0085d"}
    (root / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read("table", "--root", root / "t.jsonl")[0].captions[0].text == row["text"]


def test_table_from_a_spreadsheet(tmp_path):
    root = tiny.table(tmp_path, ROWS[:1])
    (root / "table.csv").write_bytes(
        b'\xef\xbb\xbfimage,audio,text\r\np/1.png,s/1a.wav,"red, and\nblue"\r\n'  # byte-order mark, quotes, CR LF
    )
    assert read("table", "--root", root)[0].captions[0].text == "red, and\nblue"


def test_table_absolute_paths(tmp_path):
    root = tiny.table(tmp_path / "data", ROWS[:1])
    (tmp_path / "t.csv").write_text(f"image,audio\n{root}/p/1.png,{root}/s/1a.wav\n")
    assert read("table", "--root", tmp_path / "t.csv")[0].picture == root / "p/1.png"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "picture,audio\n1.png,1.wav\n", "line 1: no column image"),
        ("t.csv", "", "no column audio and no column image"),
        ("t.csv", "image,audio\n", "has no rows"),
        ("t.csv", "image,audio\n1.png,\n", "line 2: no audio"),
        ("t.csv", "image,audio,split\n1.png,1.wav,train\n1.png,2.wav,dev\n", "line 3: 1.png is in split dev"),
        ("t.csv", b"image,audio\n\xff.png,1.wav\n", "not UTF-8"),
        ("t.csv", 'image,audio,text\n1.png,1.wav,a\n2.png,2.wav,"b\n3.png,3.wav,c\n', "line 3: unexpected end of data"),
        ("t.csv", 'image,audio,text\n1.png,1.wav,"a"b\n', "line 2: .* expected after"),
        pytest.param("t.csv", f"image,audio\n1.png,{'a' * 200_000}\n", "line 2: field larger than", id="long"),
        ("t.csv", "image,audio,text,split\n1.png,1.wav,a, b,dev\n", "line 2: not as many fields as in line 1"),
        ("t.csv", "image,audio,speaker,split\n1.png,1.wav,test\n", "line 2: not as many fields as in line 1"),
        pytest.param("t.jsonl", "[" * 100_000, "line 1 is not JSON", id="deep"),
        ("t.jsonl", '{"image": "\\ud83d/1.png", "audio": "1.wav"}\n', "is missing"),
        ("t.jsonl", '{"image": "1.png", "audio": "1.wav"}\n{\n', "line 2 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is not an object"),
        ("t.jsonl", '{"image": "1.png"}\n', "line 1: no audio"),
        ("t.csv", "image,audio\n1.png,1.wav\n", r"1\.png is missing \(and 1 more\)"),
        ("t.xlsx", "", "holds 0 tables"),
    ],
)
def test_table_mistakes(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=reason):
        read("table", "--root", tmp_path)


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "scenes"])
@pytest.mark.parametrize("there", [True, False])
def test_wrong_root_is_named(tmp_path, name, there):
    root = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(UserError, match="--root") as caught:
        read(name, "--root", root)
    assert str(root) in str(caught.value)


LONG = "x" * 300  # no file system has such a name


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "scenes"])
def test_a_root_that_cannot_be_asked_for_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"no such folder, or no access to it \(--root\)"):
        read(name, "--root", tmp_path / LONG)


def test_a_candidate_that_cannot_be_asked_for_is_missing(tmp_path):
    with pytest.raises(UserError, match="is missing: look"):
        existing(tmp_path, LONG, hint="look")


def test_a_table_in_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be listed: Permission denied"):
        read("table", "--root", tmp_path)


def test_places_base_paths_that_cannot_be_asked_for_are_not_taken(tmp_path):
    root = tiny.places(tmp_path)
    expected = read("places", "--root", root)
    for path in root.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_base_path": f"/{LONG}"}))
    assert read("places", "--root", root) == expected


def test_skip_bad_leaves_missing_files_to_the_writer(tmp_path):
    root = tiny.flickr8k(tmp_path)
    (root / "flickr_audio/wavs/1001_ab1_0.wav").unlink()
    assert len(read("flickr8k", "--root", root, "--skip-bad")) == 5


def test_many_files_are_checked_quickly(tmp_path):
    (tmp_path / "p.jpg").touch()
    captions = tuple(Caption(str(n), tmp_path / f"{n}.wav") for n in range(5))
    for n in range(5):
        (tmp_path / f"{n}.wav").touch()
    items = [Item(str(n), "train", tmp_path / "p.jpg", captions) for n in range(8000)]
    start = time.process_time()
    assert checked(items, argparse.Namespace()) == items
    assert time.process_time() - start < 2


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="no Flickr8k")
def test_real_recordings():
    items = read("flickr8k", "--root", SHARED / "flickr8k")
    assert len(items) == 10
    assert all(len(item.captions) == 5 and all(one.text and one.speaker for one in item.captions) for item in items)
