import json

import pytest

from shards.corpora.item import Caption
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read, splits


def test_spokencoco_as_shipped(tmp_path):
    root = tiny.spokencoco(tmp_path)
    items = read("spokencoco", "--root", root)
    assert splits(items) == {"train": 3, "dev": 3}
    item = items[3]
    assert item.image_id == "COCO_val2014_000000000300"
    assert item.picture == root / "val2014/COCO_val2014_000000000300.jpg"
    assert item.captions[1] == Caption("m1-val_0_1", root / "wavs/val/0/m1-val_0_1.wav", "TEXT 1", "m1")


def test_spokencoco_regrouped(tmp_path, caplog):
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
    assert "1 pictures are in no part" in caplog.text


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


GOOD = {"text": "t", "speaker": "s", "uttid": "u", "wav": "wavs/train/0/m0-train_0_0.wav"}
BAD_CAPTIONS = {
    "null for a path": ({**GOOD, "wav": None}, "wav is null, expected text"),
    "no path": ({key: GOOD[key] for key in GOOD if key != "wav"}, "wav is missing"),
    "a URL": ({**GOOD, "wav": "https://example.org/u.wav"}, "wav is the URL 'https://example.org/u.wav', expected the"),
    "blank": ({**GOOD, "wav": " "}, "wav is empty"),
    "no id": ({key: GOOD[key] for key in GOOD if key != "uttid"}, "uttid is missing"),
    "a number for an id": ({**GOOD, "uttid": 7}, "uttid is the number 7, expected text"),
    "NaN": ({**GOOD, "text": float("nan")}, "text is NaN, expected text"),
    "a number for a speaker": ({**GOOD, "speaker": 7}, "speaker is the number 7, expected text"),
    "true": ({**GOOD, "speaker": True}, "speaker is true, expected text"),
    "a list": ({**GOOD, "text": ["t"]}, "text is a list, expected text"),
    "an object": ({**GOOD, "text": {}}, "text is an object, expected text"),
    "half a character": ({**GOOD, "text": "\ud83d"}, "which cannot be stored as text"),
    "a zero byte": ({**GOOD, "uttid": "u\0"}, "which cannot be stored as text"),
    "no object": ("u", "'u', expected an object"),
}


def with_record(root, change):
    """Change the second record of the training file."""
    path = root / "SpokenCOCO_train.json"
    content = json.loads(path.read_text())
    change(content["data"][1])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("caption", "reason"), BAD_CAPTIONS.values(), ids=BAD_CAPTIONS)
def test_a_bad_caption_is_named_or_dropped(tmp_path, caption, reason):
    root = tiny.spokencoco(tmp_path)
    with_record(root, lambda record: record["captions"].append(caption))
    with pytest.raises(UserError) as caught:
        read("spokencoco", "--root", root)
    assert f"{root}/SpokenCOCO_train.json data[1].captions[2]: " in str(caught.value)
    assert reason in str(caught.value)
    assert "--skip-bad drops" in str(caught.value)
    corpus = load_corpus("spokencoco", "--root", root, "--skip-bad")
    assert [len(item.captions) for item in corpus.items] == [2] * 6
    (dropped,) = corpus.dropped
    assert (dropped.what, dropped.captions, dropped.split) == ("caption", 1, "train")
    assert dropped.name.endswith("data[1].captions[2]")
    assert reason in dropped.reason


@pytest.mark.parametrize(
    ("record", "reason", "lost"),
    [
        ({"captions": []}, "captions is an empty list", 0),
        ({"captions": None}, "captions is null, expected a list", 0),
        ({"captions": {}}, "captions is an object, expected a list", 0),
        ({"image": None}, "image is null, expected text", 2),
        ({"image": 7}, "image is the number 7, expected text", 2),
        ({"image": "http://x.org/a_1.jpg"}, "image is the URL", 2),
        ({"captions": [None]}, "captions[0]: null, expected an object", 1),
    ],
)
def test_a_bad_record_is_named_or_dropped(tmp_path, record, reason, lost):
    root = tiny.spokencoco(tmp_path)
    with_record(root, lambda one: one.update(record))
    with pytest.raises(UserError) as caught:
        read("spokencoco", "--root", root)
    assert f"{root}/SpokenCOCO_train.json data[1]" in str(caught.value)
    assert reason in str(caught.value)
    corpus = load_corpus("spokencoco", "--root", root, "--skip-bad")
    assert len(corpus.items) == 5
    assert sum(one.what == "picture" for one in corpus.dropped) == 1
    assert sum(one.captions for one in corpus.dropped) == lost


def test_a_key_that_comes_twice(tmp_path):
    root = tiny.spokencoco(tmp_path)
    path = root / "SpokenCOCO_train.json"
    text = path.read_text()
    path.write_text(text.replace('"speaker": "m1"', '"speaker": "m1", "speaker": "m7"', 1))
    with pytest.raises(UserError, match=r"data\[0\]\.captions\[1\]: the key 'speaker' is repeated; --skip-bad"):
        read("spokencoco", "--root", root)
    assert len(load_corpus("spokencoco", "--root", root, "--skip-bad").dropped) == 1
    path.write_text(text.replace('{"data"', '{"data": [], "data"'))
    with pytest.raises(UserError, match="has a repeated key 'data'"):
        read("spokencoco", "--root", root, "--skip-bad")


def test_records_are_counted(tmp_path):
    root = tiny.spokencoco(tmp_path)
    (root / "SpokenCOCO_val.json").write_text('{"data": [{}, 7, null]}')
    with pytest.raises(UserError, match=r"data\[0\]: image is missing \(and 2 more\); "):
        read("spokencoco", "--root", root)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "null, expected an object"),
        ({"split": "train"}, "cocoid is missing"),
        ({"cocoid": True, "split": "train"}, "cocoid is true, expected an integer"),
        ({"cocoid": 500, "split": "minival"}, "split is 'minival', expected train, restval, val, test"),
        ({"cocoid": 500, "split": "test"}, "picture 500 is in test, in an earlier entry in train"),
    ],
)
def test_bad_entries_of_karpathys_file(tmp_path, entry, reason):
    root = tiny.spokencoco(tmp_path)
    entries = [{"cocoid": n, "split": "train"} for n in (500, 501, 502, 300, 301, 302)]
    (root / "k.json").write_text(json.dumps({"images": [*entries, entry]}))
    with pytest.raises(UserError) as caught:
        read("spokencoco", "--root", root, "--karpathy", root / "k.json")
    assert f"k.json images[6]: {reason}" in str(caught.value)
    corpus = load_corpus("spokencoco", "--root", root, "--karpathy", root / "k.json", "--skip-bad")
    assert (splits(corpus.items), len(corpus.dropped)) == ({"train": 6}, 1)


def test_a_picture_without_cocos_number(tmp_path):
    root = tiny.spokencoco(tmp_path)
    with_record(root, lambda record: record.update(image="x_y.jpg"))
    (root / "k.json").write_text(json.dumps({"images": [{"cocoid": 500, "split": "train"}]}))
    with pytest.raises(UserError, match=r"data\[1\]: image is 'x_y.jpg', expected a name that ends in COCO's id"):
        read("spokencoco", "--root", root, "--karpathy", root / "k.json")
