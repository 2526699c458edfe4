import os
import unicodedata
from unittest.mock import Mock

import pytest

from shards.corpora import file_finder
from shards.corpora.file_finder import FileFinder
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("there", [NFC, NFD])
@pytest.mark.parametrize("where", ["{}.jpg", "{}/a.jpg", "{0}/{0}/b/{0}.jpg"])
def test_names_in_another_unicode_form_are_found(tmp_path, there, where):
    path = touch(tmp_path / where.format(there))
    touch(path.with_name("other.jpg"))
    named = tmp_path / where.format(NFC if there == NFD else NFD)
    assert FileFinder().find(named) == path
    assert FileFinder().find(path) == path


def test_of_two_forms_the_one_that_is_named_is_taken(tmp_path):
    both = [touch(tmp_path / f"{form}.jpg") for form in (NFC, NFD)]
    finder = FileFinder()
    assert [finder.find(path) for path in both] == both


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("UP.jpg", "is missing: did you mean UP.JPG?"),
        ("sub/Up.jpg", "is missing: did you mean ../UP.JPG?"),
        ("Sub/A.jpg", "is missing: did you mean {}/sub/a.jpg?"),
        (f"{NFC.upper()}.JPG", f"is missing: did you mean {NFD}.jpg?"),
        (r"sub\a.jpg", r"is missing: \ is not a separator here, did you mean sub/a.jpg?"),
        (r"SUB\a.jpg", r"is missing: \ is not a separator here, did you mean sub/a.jpg?"),
        (r"C:\data\a.jpg", r"is missing: \ is not a separator here"),
        ("sub", "is a folder: name a file in it"),
        ("linked", "is a folder: name a file in it"),
        ("annexed.jpg", "is a broken link to ../.git/annex/objects/xy: fetch its target, e.g. by git annex get"),
        ("loop.jpg", "is a broken link to loop.jpg: fetch"),
        ("nowhere/at/all.jpg", "is missing: there is no folder {}/nowhere"),
        ("UP.JPG/a.jpg", "is missing: there is no folder {}/UP.JPG"),
        ("b.jpg", "is missing: complete the corpus"),
        ("x" * 300, "is missing: complete the corpus"),
    ],
)
def test_why_a_file_is_missing(tmp_path, named, message):
    touch(tmp_path / "UP.JPG"), touch(tmp_path / "sub/a.jpg"), touch(tmp_path / f"{NFD}.jpg")
    (tmp_path / "annexed.jpg").symlink_to("../.git/annex/objects/xy")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "linked").symlink_to("sub")
    finder = FileFinder()
    path = tmp_path / named if named != "sub/Up.jpg" else tmp_path / "sub/../Up.jpg"
    assert finder.find(path) is None
    reason = ": ".join(finder.why_missing(path))
    assert reason.startswith(message.format(tmp_path).replace("../UP.JPG", "UP.JPG"))


def test_links_to_files_are_files_and_pipes_are_not(tmp_path):
    path = touch(tmp_path / "store/a.jpg")
    (tmp_path / "b.jpg").symlink_to(path)
    (tmp_path / "folder").symlink_to("store")
    finder = FileFinder()
    names = [tmp_path / name for name in ("b.jpg", "folder/a.jpg", "store/../store/a.jpg", "store/a.jpg")]
    assert [finder.find(name) for name in names] == names
    assert {finder.identity(name) for name in names} == {str(path.resolve())}
    os.mkfifo(tmp_path / "a.jpg")
    assert FileFinder().find(tmp_path / "a.jpg") is None


def test_a_folder_that_may_be_entered_but_not_listed(tmp_path, monkeypatch):
    path = touch(tmp_path / "a.jpg")
    monkeypatch.setattr(file_finder.os, "scandir", Mock(side_effect=PermissionError))
    assert FileFinder().find(path) == path
    assert FileFinder().find(tmp_path / "b.jpg") is None


def test_a_file_system_that_ignores_case(tmp_path, monkeypatch):
    touch(tmp_path / "UP.JPG")
    exact = os.path.isfile
    monkeypatch.setattr(file_finder.os.path, "isfile", lambda path: exact(path) or exact(str(path).replace("up", "UP")))
    path = tmp_path / "up.JPG"
    assert FileFinder().find(path) == path


def test_files_are_looked_up_in_one_listing_a_folder(tmp_path, monkeypatch):
    paths = [touch(tmp_path / f"{n % 3}/{n}.wav") for n in range(300)]
    requested = []
    scandir = os.scandir
    monkeypatch.setattr(file_finder.os, "scandir", lambda folder: requested.append(folder) or scandir(folder))
    monkeypatch.setattr(file_finder.os.path, "isfile", lambda path: requested.append(path))
    finder = FileFinder()
    assert [finder.find(path) for path in paths] == paths
    assert len({finder.identity(path) for path in paths}) == 300
    assert len(requested) == 3


TABLE = [{"image": "a.png", "audio": "a.wav"}, {"image": "b.png", "audio": "b.wav"}]


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("B.png", r"t\.csv line 3: \S+/B\.png is missing: did you mean b\.png\? Or drop such samples by --skip-bad"),
        ("gone.png", r"t\.csv line 3: \S+/gone\.png is a broken link to nowhere: fetch .*, or drop such samples by"),
        ("folder", r"t\.csv line 3: \S+/folder is a folder: name a file in it, or drop"),
    ],
)
def test_missing_files_are_named_with_their_row_before_anything_is_written(tmp_path, named, reason):
    tiny.table(tmp_path, TABLE)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.csv").write_text(f"image,audio\na.png,a.wav\n{named},b.wav\n")
    with pytest.raises(UserError, match=reason):
        read("table", "--root", tmp_path / "t.csv")


@pytest.mark.parametrize("skip", [[], ["--skip-bad"]])
def test_the_file_on_disk_is_taken_under_the_name_of_the_table(tmp_path, skip):
    tiny.table(tmp_path, [{"image": f"{NFD}.png", "audio": f"{NFD}.wav"}])
    (tmp_path / "t.csv").write_text(f"image,audio\n{NFC}.png,{NFC}.wav\n", encoding="utf-8")
    (item,) = load_corpus("table", "--root", tmp_path / "t.csv", *skip).items
    assert (item.image_id, item.picture) == (f"{NFC}.png", tmp_path / f"{NFD}.png")
    assert (item.captions[0].utterance, item.captions[0].audio) == (f"{NFC}.wav", tmp_path / f"{NFD}.wav")


def test_every_corpus_finds_names_in_another_form(tmp_path):
    root = tiny.flickr8k(tmp_path)
    for path in (*root.glob("Flickr8k_text/*"), root / "flickr_audio/wav2capt.txt", root / "flickr_audio/wav2spk.txt"):
        path.write_text(path.read_text().replace("_ab", f"_{NFC}"))
    for path in (*root.glob("*/wavs/*.wav"), *root.glob("Flicker8k_Dataset/*")):
        path.rename(path.with_name(path.name.replace("_ab", f"_{NFD}")))
    assert all(item.picture.is_file() and item.captions[0].audio.is_file() for item in read("flickr8k", "--root", root))
