import json

import pytest

from shards.corpora.item import Caption
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read, splits

LONG = "x" * 300  # no file system has such a name


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


def test_places_base_paths_that_cannot_be_used_are_ignored(tmp_path):
    root = tiny.places(tmp_path)
    expected = read("places", "--root", root)
    for paths in ({"image_base_path": f"/{LONG}"}, {"image_base_path": 7, "audio_base_path": None}):
        for path in root.glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | paths))
        assert read("places", "--root", root) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wav": None}, "wav is null, expected text"),
        ({"wav": 7}, "wav is the number 7, expected text"),
        ({"image": ["a"]}, "image is a list, expected text"),
        ({"image": ""}, "image is empty"),
        ({"uttid": 7}, "uttid is the number 7, expected text"),
        ({"speaker": False}, "speaker is false, expected text"),
        ({"asr_text": float("inf")}, "asr_text is Infinity, expected text"),
        ({"image": "s3://bucket/a.jpg"}, "image is the URL"),
    ],
)
def test_a_bad_record_is_named_or_dropped(tmp_path, change, reason):
    root = tiny.places(tmp_path)
    path = root / "train_2020.json"
    content = json.loads(path.read_text())
    content["data"][2].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read("places", "--root", root)
    assert f"{path} data[2]: {reason}" in str(caught.value)
    corpus = load_corpus("places", "--root", root, "--skip-bad")
    assert [len(item.captions) for item in corpus.items] == [1, 1, 1, 1]
    assert [(one.what, one.split, one.captions) for one in corpus.dropped] == [("caption", "train", 1)]


def test_a_picture_of_training_in_another_split_is_a_leak(tmp_path):
    root = tiny.places(tmp_path)
    path = root / "dev_seen_2020.json"
    path.write_text(path.read_text().replace("b/bar/1.jpg", "a/abbey/2.jpg"))
    with pytest.raises(
        UserError, match=r"train_2020\.json data\[1\]: picture .*/2\.jpg is in split train, and in split dev"
    ):
        read("places", "--root", root)
    corpus = load_corpus("places", "--root", root, "--skip-bad")
    assert splits(corpus.items) == {"train": 1, "dev_seen": 1, "dev_unseen": 1}
