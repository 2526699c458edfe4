import re

import pytest

from shards.corpora.item import Caption
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read, splits


def test_flickr8k(tmp_path):
    root = tiny.flickr8k(tmp_path, {"train": 3, "dev": 1, "test": 2})
    items = read("flickr8k", "--root", root)
    assert splits(items) == {"train": 3, "dev": 1, "test": 2}
    first = items[0]
    assert first.image_id == "1000_ab0"
    assert first.picture == root / "Flicker8k_Dataset/1000_ab0.jpg"
    assert first.captions == tuple(
        Caption(f"1000_ab0_{k}", root / f"flickr_audio/wavs/1000_ab0_{k}.wav", f"caption {k} of 1000_ab0 .", str(k + 7))
        for k in (0, 1)
    )


def test_flickr8k_in_other_folders(tmp_path):
    root = tiny.flickr8k(tmp_path)
    expected = [item.image_id for item in read("flickr8k", "--root", root)]
    (root / "Flicker8k_Dataset").rename(root / "Flickr8k_Dataset")
    for path in (root / "Flickr8k_text").iterdir():
        path.rename(root / path.name)
    assert [item.image_id for item in read("flickr8k", "--root", root)] == expected


def test_flickr8k_stray_names_and_unrecorded_pictures(tmp_path, caplog):
    root = tiny.flickr8k(tmp_path)
    for path in (root / "flickr_audio/wav2capt.txt", root / "Flickr8k_text/Flickr8k.token.txt"):
        path.write_text(path.read_text().replace("1000_ab0.jpg", "1000_ab0.jpg.1"))  # as in the real corpus
    splits_file = root / "Flickr8k_text/Flickr_8k.testImages.txt"
    splits_file.write_text(splits_file.read_text() + "9999_unheard.jpg\n")
    (root / "flickr_audio/wavs/readme.txt").write_text("no recording")
    items = read("flickr8k", "--root", root)
    assert splits(items) == {"train": 3, "dev": 1, "test": 1}
    assert items[0].captions[0].text == "caption 0 of 1000_ab0 ."
    assert "1 pictures of the official splits have no audio file" in caplog.text


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


TEXTS = "Flickr8k_text/Flickr8k.token.txt"


def as_kaggle(lines):
    """The token file as Kaggle's table, its lines in the order of the captions' numbers."""
    cells = [line.replace("#", "\t").split("\t") for line in lines]
    return "image,caption\n" + "".join(f'{name},"{text}, indeed"\n' for name, _, text in sorted(cells))


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        (lambda lines: "\n".join(line.replace("\t", "   ") for line in lines), ""),
        (lambda lines: "\r\n".join(lines) + "\r\n\r\n", ""),
        (as_kaggle, ", indeed"),
        (lambda lines: as_kaggle(lines).replace("image,caption", "Image, Caption"), ", indeed"),
    ],
    ids=["blanks for tabs", "CR LF", "Kaggle", "Kaggle by hand"],
)
@pytest.mark.parametrize("name", [TEXTS, "captions.txt"])
def test_other_forms_of_the_texts_are_read(tmp_path, caplog, form, ending, name):
    root = tiny.flickr8k(tmp_path, captions=3)
    lines = (root / TEXTS).read_text().splitlines()
    (root / TEXTS).unlink()
    (root / name).write_text(form(lines), newline="")
    for item in read("flickr8k", "--root", root):
        assert [one.text for one in item.captions] == [f"caption {k} of {item.image_id} .{ending}" for k in range(3)]
    assert ("in the order of its lines" in caplog.text) == bool(ending)


@pytest.mark.parametrize("name", [TEXTS, "flickr_audio/wav2spk.txt"])
def test_texts_or_speakers_that_are_lost_are_counted(tmp_path, caplog, name):
    root = tiny.flickr8k(tmp_path)
    lines = (root / name).read_text().splitlines()
    (root / name).write_text("\n".join(lines[:-3]))
    read("flickr8k", "--root", root)
    assert f"3 of 10 captions have no {'text' if name == TEXTS else 'speaker'} in {root / name}" in caplog.text


@pytest.mark.parametrize("name", [TEXTS, "flickr_audio/wav2spk.txt"])
def test_texts_or_speakers_that_are_all_lost_end_the_run(tmp_path, caplog, name):
    root = tiny.flickr8k(tmp_path)
    (root / name).write_text((root / name).read_text().replace("10", "77"))
    with pytest.raises(UserError, match=r"10 of 10 captions have no (text|speaker) in .*: give the file of the same"):
        read("flickr8k", "--root", root)
    read("flickr8k", "--root", root, "--skip-bad")
    assert "10 of 10 captions have no" in caplog.text


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        (TEXTS, "a caption", r"line 11: expected X\.jpg#0, a tab and the caption, got 'a caption'"),
        (TEXTS, "1000_ab0.jpg#0\tanother", r"line 11: caption #0 of 1000_ab0\.jpg has another text"),
        ("flickr_audio/wav2spk.txt", "1000_ab0_0.wav 99", "line 11: 1000_ab0_0.wav is of speaker 99, in an earlier"),
        ("flickr_audio/wav2capt.txt", "1000_ab0_0.wav", "line 11: expected 3 fields"),
        (
            "flickr_audio/wav2capt.txt",
            "1000_ab0_0.wav 1000_ab0.jpg #0",
            "line 11: the same picture and audio file as at",
        ),
        ("flickr_audio/wav2capt.txt", "1000_ab0_0.wav 1003_ab0.jpg #7", "1000_ab0_0.wav is in split train, and in"),
        ("Flickr8k_text/Flickr_8k.testImages.txt", "1000_ab0.jpg", "is in split train, and in split test: Flickr_8k"),
        ("Flickr8k_text/Flickr_8k.trainImages.txt", "1000_ab0.jpg", "image id 1000_ab0 is repeated"),
    ],
)
def test_lines_that_cannot_be_used_are_named_or_dropped(tmp_path, name, line, reason):
    root = tiny.flickr8k(tmp_path)
    with (root / name).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=reason) as caught:
        read("flickr8k", "--root", root)
    assert "--skip-bad drops" in str(caught.value)
    corpus = load_corpus("flickr8k", "--root", root, "--skip-bad")
    assert 4 <= len(corpus.items) <= 5
    assert len(corpus.dropped) >= 1


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "is empty: {} lists no pictures"),
        ("nobody.jpg\n" * 3, "is empty: none of the 3 pictures in {} has audio"),
        (
            "1000_ab0\nnobody\n",
            "would be empty: {} lists '1000_ab0' and so on, which are not pictures: expected one file name per line",
        ),
    ],
)
def test_an_empty_split_is_reported(tmp_path, caplog, split, names, message):
    root = tiny.flickr8k(tmp_path)
    path = root / f"Flickr8k_text/Flickr_8k.{split}Images.txt"
    path.write_text(names)
    message = f"split {split} {message.format(path)}"
    if "would be" in message:
        with pytest.raises(UserError, match=re.escape(message)):
            read("flickr8k", "--root", root)
    else:
        assert split not in splits(read("flickr8k", "--root", root))
        assert message in caplog.text
