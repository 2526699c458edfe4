import logging
import os
import shutil
from pathlib import Path

import pytest

from shards.checking.check import check_folder
from shards.errors import UserError
from shards.files import file_sha256
from shards.manifest import INDEX, MANIFEST, load
from shards.reading.caption_attributes import read_caption_attributes
from shards.reading.reader import Reader
from shards.report import REPORT
from shards.tars.index import IndexOptions, index_folder
from shards.writing.writer import Format, write_shards
from tests.shards.corpora.reading import read
from tests.shards.media.noise import noise
from tests.shards.reading.test_dataset import assert_same, batches
from tests.shards.tars import stock_tars as stock
from toolkit.make_shards import main


def index(folder: Path, jobs: int = 1, **options):
    return index_folder(folder, "mine", IndexOptions(**options), jobs)


def identities(folder: Path):
    return {p.name: (file_sha256(p), p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.tar")}


def copy_tars(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.glob("*.tar"):
        shutil.copy2(path, folder)
    return folder


def test_our_tars_without_their_manifest(tmp_path):
    """The index is the writer's to the byte, so the data set has the same identity and the same batches."""
    made = noise(tmp_path / "made")
    folder = copy_tars(tmp_path / "made", tmp_path / "tars")
    before = identities(folder)
    main(["index", str(folder), "--jobs", "2"])
    assert identities(folder) == before
    indexed = load(folder)
    assert indexed.hash == made.hash
    assert indexed.corpus == "tars"
    for name in (INDEX, REPORT):
        assert (folder / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert_same(batches(made, range(5)), batches(indexed, range(5), 2, 1, 1))
    assert Reader(indexed).meta(3)["captions"] == [
        one | {"language": None, "duration": pytest.approx(one["duration"])} for one in Reader(made).meta(3)["captions"]
    ]


def test_stock_tars_train_like_the_shards_that_webdataset_makes_of_them(tmp_path):
    """The pictures have one color, so that the writer's JPEGs have the same pixels."""
    folder = stock.one_caption_each(tmp_path / "s", samples=18)
    before = identities(folder)
    written = write_shards(read("webdataset", "--root", folder), tmp_path / "w", "w", Format(samples_per_shard=3), {})
    report = index(folder, jobs=2)
    assert identities(folder) == before
    assert report.splits == written.splits
    indexed, made = load(folder), load(tmp_path / "w")
    assert [shard.samples for shard in indexed.shards] == [shard.samples for shard in made.shards] == [3] * 6
    expected = batches(made, range(6))
    assert_same(expected, batches(indexed, range(6)))
    assert_same(expected, batches(indexed, range(6), world_size=2, accumulation=2, workers=1))
    assert_same(expected[4:], batches(indexed, range(4, 6), world_size=4))
    assert Reader(indexed).meta(4)["captions"][0]["text"] == "text 4"
    assert read_caption_attributes(indexed, "train").text == [f"text {n}" for n in range(18)]
    result = check_folder(folder, decode=None)
    assert (result.problems, result.warnings) == ([], [])
    assert (result.pictures, result.audio_files) == (18, 18)


def test_several_captions_and_other_names(tmp_path):
    folder = stock.several_captions(tmp_path / "s", "train")
    stock.several_captions(folder, "val", first=3)
    options = ["--image", "photo.webp", "--audio", "speech.ogg", "--text", "transcript"]
    main(["index", str(folder), "--name", "mine", "--jobs", "1", *options])
    made = load(folder)
    assert made.splits == ("train", "val")
    reader = Reader(made)
    for n in range(6):
        assert reader.picture(n) == stock.picture(f"p{n}", "WEBP")
        assert [reader.audio(row) for row in made.captions(n)] == [stock.speech(f"s{n}.{k}", "OGG") for k in (0, 1)]
        assert [one["text"] for one in reader.meta(n)["captions"]] == [f"text {n} {k}" for k in (0, 1)]
    assert check_folder(folder).healthy


META = {"image_id": "x", "split": "dev", "text": "hello", "speaker": "anna", "language": "en"}
SAMPLE = {"a.jpg": stock.picture("a"), "a.wav": stock.speech("a")}


def test_json_of_another_program(tmp_path):
    stock.pack(tmp_path / "t.tar", {**SAMPLE, "a.json": META, "a.cls": "3"})
    index(tmp_path)
    made = load(tmp_path)
    (caption,) = Reader(made).meta(0)["captions"]
    assert (made.splits, made.image_id.tolist(), made.key.tolist()) == (("dev",), [b"x"], [b"a"])
    assert caption == {
        **{name: META[name] for name in ("text", "speaker", "language")},
        **{"utterance": "a.0", "duration": 0.25},
    }


def test_without_any_text(tmp_path, caplog):
    stock.pack(tmp_path / "t.tar", SAMPLE)
    caplog.set_level(logging.WARNING)
    index(tmp_path)
    assert "no split in the name of t.tar: all is train" in caplog.text
    assert load(tmp_path).meta_bytes.tolist() == [0]
    assert Reader(load(tmp_path)).meta(0)["captions"][0]["text"] is None
    assert check_folder(tmp_path).healthy


PICTURE, SPEECH = stock.picture("b"), stock.speech("b")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"b.jpg": PICTURE, "b.wav": stock.speech("b", rate=8000)},
            r"b\.wav: 8,000 Hz, 1 channels; expected 16,000 Hz",
        ),
        ({"b.jpg": b"GIF89a", "b.wav": SPEECH}, "not a JPEG or PNG or WEBP"),
        ({"b.jpg": PICTURE[:-20], "b.wav": SPEECH}, "cannot be decoded"),
        ({"b.jpg": PICTURE, "b.wav": b"RIFF"}, "cannot be decoded as audio"),
        ({"b.wav": SPEECH}, "has 0 pictures"),
        ({"b.jpg": PICTURE}, "has no audio"),
        ({"x/b.jpg": PICTURE, "x/b.wav": SPEECH}, "a key has to consist"),
        ({"b.jpg": PICTURE, "b.wav": SPEECH, "b.json": "{"}, "Expecting"),
        ({"b.jpg": PICTURE, "b.wav": SPEECH, "b.json": " " * (1 << 20) + "{}"}, "longer than 1 MiB|limit is 1,048,576"),
    ],
)
def test_samples_that_do_not_fit(tmp_path, files, reason):
    stock.pack(tmp_path / "train.tar", {**SAMPLE, **files})
    before = identities(tmp_path)
    with pytest.raises(UserError, match=f"{reason}.*--skip-bad leaves such samples out, make_shards.py webdataset"):
        index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"], "nothing is written"
    report = index(tmp_path, skip_bad=True)
    assert [(one.name.rpartition("/")[2], one.split) for one in report.dropped] == [("b", "train")]
    assert load(tmp_path).key.tolist() == [b"a"]
    assert check_folder(tmp_path).healthy
    assert identities(tmp_path) == before


def test_tars_that_do_not_fit(tmp_path):
    first = stock.pack(tmp_path / "train-0.tar", SAMPLE)
    second = stock.pack(tmp_path / "train-1.tar", {"a.jpg": PICTURE, "a.wav": SPEECH})
    with pytest.raises(UserError, match=r"image id a occurs twice, in train-0\.tar and train-1\.tar .*make_shards"):
        index(tmp_path)
    stock.pack(second, {"b.jpg": PICTURE, "b.wav": SPEECH, "b.json": {"split": "test"}, "c.jpg": PICTURE})
    stock.pack(
        second,
        {
            **{f"{key}.{end}": data for key in "bc" for end, data in (("jpg", PICTURE), ("wav", SPEECH))},
            "c.json": {"split": "test"},
        },
    )
    with pytest.raises(UserError, match="samples of several splits"):
        index(tmp_path)
    other = {"c.jpg": stock.picture("c"), "c.wav": stock.speech("c"), "c.json": {"split": "test"}}
    stock.pack(second, other | {"b.jpg": SAMPLE["a.jpg"], "b.wav": SPEECH, "b.json": {"split": "test"}})
    with pytest.raises(UserError, match="a and b are the same picture"):
        index(tmp_path)
    index(tmp_path, splits=("train=*",))  # in one split it may be meant
    second.unlink()
    first.write_bytes(first.read_bytes()[:-10_000])
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"the rest: .*(damaged|end-of-archive marker)"):
        index(tmp_path)


def test_folders_that_are_refused(tmp_path):
    noise(tmp_path / "made", pictures=2)
    with pytest.raises(UserError, match="has the manifest of make_shards"):
        index(tmp_path / "made")
    with pytest.raises(UserError, match="has no tar"):
        index(tmp_path)
    folder = copy_tars(tmp_path / "made", tmp_path / "tars")
    index(folder)
    with pytest.raises(UserError, match="has an index already: --restart"):
        index(folder)
    before = load(folder).hash
    main(["index", str(folder), "--restart", "--jobs", "1"])
    assert load(folder).hash == before
    (path,) = folder.glob("*.tar")
    path.rename(folder / "a b.tar")
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="the name has to consist of"):
        index(folder)


def test_a_changed_tar_is_noticed_by_the_check(tmp_path):
    folder = stock.one_caption_each(tmp_path / "s", samples=3)
    index(folder)
    (path,) = folder.glob("*.tar")
    data, status = bytearray(path.read_bytes()), path.stat()
    data[data.index(stock.speech("s1")) + 600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert any("its checksum differs" in str(finding) for finding in check_folder(folder).problems)
