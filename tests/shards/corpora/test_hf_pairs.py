import logging
import sys

import pyarrow
import pyarrow.parquet
import pytest

from shards.errors import UserError
from shards.manifest import load
from shards.reading.reader import Reader
from shards.writing.writer import Format, write_shards
from tests.shards.corpora.reading import load_corpus, read, splits
from tests.shards.tars.stock_tars import picture, speech

BYTES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def parquet(path, rows, column=None, group=2):
    """A file as the library `datasets` writes it; media are structs of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    if column:
        columns[column] = pyarrow.array(columns[column], BYTES)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def pairs(root, pictures=3, captions=2, swapped=False):
    """Recordings that lie in another order than the pictures, in two files."""
    images = [
        {"id": f"p{n}", "image": {"bytes": picture(f"p{n}"), "path": f"{n}_ab.jpg"}, "modality": "image"}
        for n in range(pictures)
    ]
    spoken = [
        {"id": f"q{n}.{k}", "audio": {"bytes": speech(f"s{n}.{k}"), "path": None}, "text": f"text {n} {k}"}
        for k in range(captions)
        for n in range(pictures)
    ]
    relevance = [
        {"query-id": f"q{n}.{k}", "corpus-id": f"p{n}", "score": 1} for n in range(pictures) for k in range(captions)
    ]
    relevance.append({"query-id": "q0.0", "corpus-id": "p1", "score": 0})
    folders = ("corpus", "queries")
    if swapped:
        folders = folders[::-1]
        for row in relevance:
            row["query-id"], row["corpus-id"] = row["corpus-id"], row["query-id"]
    parquet(root / folders[0] / "test-00000-of-00001.parquet", images, "image")
    for number in range(2):
        half = spoken[number::2]
        parquet(root / folders[1] / f"test-0000{number}-of-00002.parquet", half, "audio")
    parquet(root / "qrels" / "test-00000-of-00001.parquet", relevance)
    parquet(root / ".cache" / "old.parquet", images, "image")
    return root


@pytest.mark.parametrize("swapped", [False, True], ids=["A2I", "I2A"])
def test_pictures_with_their_recordings(tmp_path, swapped):
    items = read("hf-pairs", "--root", pairs(tmp_path, swapped=swapped))
    assert [(item.image_id, item.split) for item in items] == [(f"p{n}", "test") for n in range(3)]
    for n, item in enumerate(items):
        assert item.picture.read() == picture(f"p{n}")
        for k, caption in enumerate(item.captions):
            assert (caption.utterance, caption.text) == (f"q{n}.{k}", f"text {n} {k}")
            assert caption.audio.read() == speech(f"s{n}.{k}")


def test_shards_of_them_are_the_same_with_any_number_of_processes(tmp_path):
    root = pairs(tmp_path / "data")
    for jobs in (1, 2):
        form = Format(samples_per_shard=1)
        write_shards(read("hf-pairs", "--root", root), tmp_path / str(jobs), "hf-pairs", form, {}, jobs)
    made = load(tmp_path / "1")
    assert made.hash == load(tmp_path / "2").hash
    assert Reader(made).meta(2)["captions"][1]["text"] == "text 2 1"


def test_splits(tmp_path, caplog):
    root = pairs(tmp_path / "data")
    assert splits(read("hf-pairs", "--root", root, "--split", "all")) == {"all": 3}
    (tmp_path / "train.txt").write_text("0_ab.jpg\n")
    (tmp_path / "dev.txt").write_text("p2\n")
    lists = ["--split-list", f"train={tmp_path}/train.txt", "--split-list", f"dev={tmp_path}/dev.txt"]
    caplog.set_level(logging.WARNING)
    assert [(item.image_id, item.split) for item in read("hf-pairs", "--root", root, *lists)] == [
        ("p0", "train"),
        ("p2", "dev"),
    ]
    assert "1 pictures are in no --split-list" in caplog.text
    (tmp_path / "dev.txt").write_text("p2\n0_ab.jpg\n")
    with pytest.raises(UserError, match=r"0_ab\.jpg is in the list of train too"):
        read("hf-pairs", "--root", root, *lists)
    with pytest.raises(UserError, match="expected NAME=FILE"):
        read("hf-pairs", "--root", root, "--split-list", "x")


QRELS = "qrels/test-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("file", "rows", "column", "reason"),
    [
        (QRELS, [{"query-id": "q0.0", "corpus-id": "p9", "score": 1}], None, "no picture and recording have the ids"),
        (
            QRELS,
            [{"query-id": "q0.0", "corpus-id": f"p{n}", "score": 1} for n in (0, 1)],
            None,
            r"recording q0\.0 is relevant to p0 too",
        ),
        (QRELS, [{"query-id": "", "corpus-id": "p0", "score": 1}], None, "query-id is empty"),
        (
            "corpus/more.parquet",
            [{"id": "p0", "image": {"bytes": b"", "path": None}}],
            "image",
            "id p0 is repeated: first at",
        ),
    ],
)
def test_bad_rows(tmp_path, file, rows, column, reason):
    root = pairs(tmp_path)
    parquet(root / file, rows, column)
    with pytest.raises(UserError, match=reason):
        read("hf-pairs", "--root", root)
    assert load_corpus("hf-pairs", "--root", pairs(tmp_path / "more"), "--skip-bad").items


def test_folders_without_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"has no \.parquet file with rows and the columns id, image"):
        read("hf-pairs", "--root", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file"):
        read("hf-pairs", "--root", tmp_path)


def test_pictures_that_are_named_and_not_stored(tmp_path):
    root = pairs(tmp_path / "data")
    parquet(root / "corpus/test-00000-of-00001.parquet", [{"id": "p0", "image": {"bytes": None, "path": "a"}}], "image")
    parquet(root / QRELS, [{"query-id": "q0.0", "corpus-id": "p0", "score": 1}])
    items = read("hf-pairs", "--root", root)
    with pytest.raises(UserError, match="image p0: its bytes are not in the file"):
        write_shards(items, tmp_path / "made", "hf-pairs", Format(), {})


def test_without_pyarrow(tmp_path, monkeypatch):
    root = pairs(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'speech-image-toolkit\[parquet\]'"):
        load_corpus("hf-pairs", "--root", root)
