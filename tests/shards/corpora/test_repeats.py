import json
import os
import shutil

import pytest

from shards.corpora import repeats
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read, splits

ROWS = [
    {"image": "a.png", "audio": "a.wav", "split": "train"},
    {"image": "b.png", "audio": "b.wav", "split": "train"},
    {"image": "c.png", "audio": "c.wav", "split": "dev"},
    {"image": "d.png", "audio": "d.wav", "split": "test"},
]


def table(root, *rows):
    """A table of the rows above and some more, whose files may be there already."""
    tiny.table(root, ROWS)
    (root / "table.csv").write_text(
        "image,audio,split\n" + "".join(f"{','.join(row.values())}\n" for row in [*ROWS, *rows])
    )
    return root / "table.csv"


def row(image, audio, split):
    return {"image": image, "audio": audio, "split": split}


def copied(root, name, other):
    shutil.copy(root / name, root / other)


WAYS = {
    "the same": (lambda root, name, other: None, "a{}"),
    "copied": (copied, "copy{}"),
    "linked": (lambda root, name, other: (root / other).symlink_to(root / name), "link{}"),
    "linked hard": (lambda root, name, other: os.link(root / name, root / other), "hard{}"),
    "in a linked folder": (lambda root, name, other: (root / other).parent.symlink_to(root), "f/a{}"),
}


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("kind", ["picture", "audio file"])
@pytest.mark.parametrize(("way", "name"), WAYS.values(), ids=WAYS)
def test_a_file_in_two_splits_is_a_leak(tmp_path, way, name, kind, split):
    ending = ".png" if kind == "picture" else ".wav"
    other = name.format(ending)
    new = row(other, "new.wav", split) if kind == "picture" else row("new.png", other, split)
    tiny.speech(tmp_path / "new.wav"), tiny.photo(tmp_path / "new.png")
    path = table(tmp_path, new)
    way(tmp_path, f"a{ending}", other)
    with pytest.raises(UserError) as caught:
        read("table", "--root", path)
    message = f"table.csv line 2: {kind} {tmp_path}/a{ending} is in split train, "
    assert message in str(caught.value)
    assert f"in split {split}: " in str(caught.value)
    assert "table.csv line 6" in str(caught.value)
    assert str(caught.value).endswith("keep one of the two, or --skip-bad drops and reports duplicates")
    corpus = load_corpus("table", "--root", path, "--skip-bad")
    assert splits(corpus.items) == {"train": 1, "dev": 1, "test": 1} | {split: 2}
    assert corpus.items[-1].image_id == new["image"]  # what evaluation has stays
    assert corpus.dropped[0].split == "train"
    assert sum(one.captions for one in corpus.dropped) == 1


def test_a_leak_between_evaluation_splits_stays_in_the_first(tmp_path):
    path = table(tmp_path, row("d.png", "new.wav", "dev"))
    tiny.speech(tmp_path / "new.wav")
    corpus = load_corpus("table", "--root", path, "--skip-bad")
    assert splits(corpus.items) == {"train": 2, "dev": 1, "test": 1}
    assert [(one.what, one.name, one.split) for one in corpus.dropped] == [("picture", "d.png", "dev")]


def test_a_split_that_is_dropped_completely_is_reported(tmp_path, caplog):
    path = table(tmp_path, row("a.png", "c.wav", "test"), row("b.png", "d.wav", "test"))
    corpus = load_corpus("table", "--root", path, "--skip-bad")
    assert "train" not in splits(corpus.items)
    assert "table: split train is empty: all of its samples were dropped" in caplog.text


def test_a_row_that_comes_twice(tmp_path):
    path = table(tmp_path, ROWS[0], row("./a.png", "a.wav", "train"))
    with pytest.raises(
        UserError, match=r"line 6: the same picture and audio file as at table\.csv line 2 \(and 1 more\)"
    ):
        read("table", "--root", path)
    corpus = load_corpus("table", "--root", path, "--skip-bad")
    assert [len(item.captions) for item in corpus.items] == [1, 1, 1, 1]
    assert [(one.what, one.captions) for one in corpus.dropped] == [("caption", 1)] * 2


def test_a_recording_of_two_pictures_of_a_split_is_reported(tmp_path, caplog):
    path = table(tmp_path, row("b.png", "a.wav", "train"))
    assert [len(item.captions) for item in read("table", "--root", path)] == [1, 2, 1, 1]
    message = "a.wav belongs to several captions: table.csv line 2 and table.csv line 6: each counts as a query"
    assert message in caplog.text


def test_copies_within_a_split_may_be_meant(tmp_path):
    path = table(tmp_path, row("copy.png", "copy.wav", "train"))
    for ending in ("png", "wav"):
        copied(tmp_path, f"a.{ending}", f"copy.{ending}")
    assert splits(read("table", "--root", path)) == {"train": 3, "dev": 1, "test": 1}


@pytest.mark.parametrize("corpus", ["spokencoco", "places"])
def test_an_utterance_id_that_comes_twice(tmp_path, corpus):
    root = {"spokencoco": tiny.spokencoco, "places": tiny.places}[corpus](tmp_path)
    path = next(root.glob("*train*.json"))
    content = json.loads(path.read_text())
    records = [one for record in content["data"] for one in record.get("captions", [record])]
    records[1]["uttid"] = first = records[0]["uttid"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"utterance {first} is repeated: another audio file has it at {path.name} data\[0"
    ):
        read(corpus, "--root", root)
    (dropped,) = [one for one in load_corpus(corpus, "--root", root, "--skip-bad").dropped if one.captions]
    assert (dropped.what, dropped.name) == ("caption", first)


def test_a_record_that_comes_twice(tmp_path):
    root = tiny.spokencoco(tmp_path)
    path = root / "SpokenCOCO_train.json"
    content = json.loads(path.read_text())
    other = json.loads(json.dumps(content["data"][0]))
    for one in other["captions"]:
        one["uttid"] += "b"
        one["wav"] = one["wav"].replace(".wav", "b.wav")
        tiny.speech(root / one["wav"])
    content["data"].append(other)
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"data\[3\]: image id \S+ is repeated: first at SpokenCOCO_train\.json data\[0\]"
    ):
        read("spokencoco", "--root", root)
    corpus = load_corpus("spokencoco", "--root", root, "--skip-bad")
    assert len(corpus.items) == 6
    assert [(one.what, one.captions) for one in corpus.dropped] == [("picture", 2)]


def test_files_of_equal_size_and_ends_are_distinguished(tmp_path):
    path = table(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"a" * 5000 + b"x" * 5000 + b"a" * 10_000)
    (tmp_path / "d.wav").write_bytes(b"a" * 5000 + b"y" * 5000 + b"a" * 10_000)
    assert len(read("table", "--root", path)) == 4


def test_empty_files_are_left_to_the_writer(tmp_path):
    path = table(tmp_path)
    for name in ("a.wav", "d.wav", "a.png", "d.png"):
        (tmp_path / name).write_bytes(b"")
    assert len(read("table", "--root", path)) == 4


def test_the_contents_of_many_files_are_not_compared(tmp_path, monkeypatch):
    path = table(tmp_path, row("new.png", "copy.wav", "test"))
    tiny.photo(tmp_path / "new.png")
    copied(tmp_path, "a.wav", "copy.wav")
    monkeypatch.setattr(repeats, "MAX_COMPARED", 4)
    assert len(read("table", "--root", path)) == 5
    monkeypatch.setattr(repeats, "MAX_COMPARED", 5)
    with pytest.raises(
        UserError, match=r"a\.wav is in split train, a copy of it in split test: \S+copy\.wav at table\.csv"
    ):
        read("table", "--root", path)
