"""The Flickr8k Audio Caption Corpus (Harwath and Glass, 2015).

The official splits, train, dev and test, have 6,000, 1,000 and 1,000 pictures with five spoken captions each.

    ROOT/
        flickr_audio/           of flickr_audio.tar.gz
            wavs/X_0.wav ...    five audio files a picture
            wav2capt.txt        X_0.wav X.jpg #0
            wav2spk.txt         X_0.wav 83
        Flicker8k_Dataset/X.jpg of Flickr8k_Dataset.zip (spelled this way)
        Flickr8k_text/          of Flickr8k_text.zip; its files may also be in ROOT
            Flickr8k.token.txt  X.jpg#0<TAB>the caption; or Kaggle's captions.txt: image,caption
            Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt
"""

import argparse
import csv
import io
import logging
import re
from collections.abc import Collection
from pathlib import Path

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecords
from shards.corpora.text_files import read_text
from shards.errors import UserError

logger = logging.getLogger(__name__)

_HINT = "--root is the folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text, as the downloads unpack"
# The original has a tab before the text; editors may have replaced it by spaces.
_TOKEN = re.compile(r"(\S+)#([0-9]+)(?:\s+(.*))?")
_KAGGLE = ("image", "caption")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures of the official splits that have audio, in the order of the split lists.

    Raises:
        UserError: A file is missing, or none of its entries matches the other files.
    """
    root = options.root
    audio = existing(root, "flickr_audio", hint=_HINT)
    photos = existing(root, "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_Dataset", hint=_HINT)
    captions = _captions(audio, _text_file(root, "Flickr8k.token.txt", "captions.txt"), bad)
    items, without_audio = [], 0
    for split in ("train", "dev", "test"):
        path = _text_file(root, f"Flickr_8k.{split}Images.txt")
        listed = [(number, name) for number, line in _lines(path) for name in line.split()]
        with_audio = [
            Item(Path(name).stem, split, photos / name, tuple(captions[name]), where=f"{path.name} line {number}")
            for number, name in listed
            if name in captions
        ]
        if not with_audio:
            _warn_empty(split, path, [name for _, name in listed], captions)
        items += with_audio
        without_audio += len(listed) - len(with_audio)
    if without_audio:
        logger.warning("flickr8k: %s pictures of the official splits have no audio file", f"{without_audio:,}")
    return items


def _text_file(root: Path, *names: str) -> Path:
    return existing(root, *(f"{folder}{name}" for name in names for folder in ("Flickr8k_text/", "")), hint=_HINT)


def _warn_empty(split: str, path: Path, names: list[str], with_audio: Collection[str]) -> None:
    """Warn that a split is empty, as happens with a subset of the corpus.

    Raises:
        UserError: The list has entries, but none looks like the name of a picture with audio.
    """
    endings = {Path(name).suffix for name in with_audio}
    if names and with_audio and not any(Path(name).suffix in endings for name in names):
        raise UserError(
            f"split {split} would be empty: {path} lists {names[0]!r} and so on, which are not pictures: expected one "
            f"file name per line, as in wav2capt.txt, for instance {next(iter(with_audio))}"
        )
    reason = f"none of the {len(names):,} pictures in {path} has audio" if names else f"{path} lists no pictures"
    logger.warning("flickr8k: split %s is empty: %s", split, reason)


def _captions(audio: Path, text_path: Path, bad: BadRecords) -> dict[str, list[Caption]]:
    """Return the spoken captions of each picture, ordered by caption number."""
    texts = read_texts(text_path, bad)
    speakers = _speakers(existing(audio, "wav2spk.txt", hint=_HINT), bad)
    path = existing(audio, "wav2capt.txt", hint=_HINT)
    rows = sorted(_rows(path, 3, bad), key=lambda row: row[1][1:])
    captions: dict[str, list[Caption]] = {}
    for line, (wav, name, number) in rows:
        picture = picture_name(name)
        text = texts.get((picture, number.removeprefix("#")))
        caption = Caption(Path(wav).stem, audio / "wavs" / wav, text, speakers.get(wav), f"{path.name} line {line}")
        captions.setdefault(picture, []).append(caption)
    bad.raise_if_any()  # first, so that the error names the bad line and not its consequences
    everything = [caption for spoken in captions.values() for caption in spoken]
    _warn_missing("text", sum(not one.text for one in everything), len(everything), text_path, bad)
    _warn_missing("speaker", sum(not one.speaker for one in everything), len(everything), audio / "wav2spk.txt", bad)
    return captions


def _warn_missing(field: str, missing: int, total: int, path: Path, bad: BadRecords) -> None:
    """Warn about captions without text or without speaker.

    Raises:
        UserError: All captions lack the field, so the file does not match the audio, and nothing is to be skipped.
    """
    if not missing:
        return
    message = f"{missing:,} of {total:,} captions have no {field} in {path}"
    if missing == total and not bad.skip:
        raise UserError(f"{message}: give the file of the same release, or continue without it by --skip-bad")
    logger.warning("flickr8k: %s", message)


def _speakers(path: Path, bad: BadRecords) -> dict[str, str]:
    speakers: dict[str, str] = {}
    for line, (wav, speaker) in _rows(path, 2, bad):
        if speakers.setdefault(wav, speaker) != speaker:
            bad.add(f"{path} line {line}", f"{wav} is of speaker {speaker}, in an earlier line of {speakers[wav]}")
    return speakers


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def _rows(path: Path, fields: int, bad: BadRecords) -> list[tuple[int, list[str]]]:
    """Return the fields of each line, with the line's number."""
    rows = [(number, line.split()) for number, line in _lines(path)]
    for number, row in rows:
        if len(row) != fields:
            bad.add(f"{path} line {number}", f"expected {fields} fields, got {' '.join(row)!r}")
    return [row for row in rows if len(row[1]) == fields]


def picture_name(name: str) -> str:
    """Return a picture's file name; one picture is called X.jpg.1 in the captions and X.jpg on disk."""
    return re.sub(r"(\.jpg)\.\d+$", r"\1", name)


def read_texts(path: Path, bad: BadRecords) -> dict[tuple[str, str], str]:
    """Read the written captions: lines of "X.jpg#0<TAB>the caption", or Kaggle's table of image and caption.

    Returns:
        Texts by picture and caption number.

    Raises:
        UserError: The file cannot be read.
    """
    text = read_text(path)
    header = tuple(name.strip().lower() for name in text.partition("\n")[0].split(","))
    rows = _kaggle(path, text) if header == _KAGGLE else _tokens(path, text, bad)
    captions: dict[tuple[str, str], str] = {}
    for line, picture, number, caption in rows:
        if captions.setdefault((picture, number), caption) != caption:
            bad.add(f"{path} line {line}", f"caption #{number} of {picture} has another text in an earlier line")
    return captions


def _tokens(path: Path, text: str, bad: BadRecords) -> list[tuple[int, str, str, str]]:
    """Return line number, picture, caption number and text of every caption of a token file."""
    rows = []
    for line, content in enumerate(text.split("\n"), 1):
        if match := _TOKEN.fullmatch(content.strip()):
            rows.append((line, picture_name(match[1]), match[2], match[3] or ""))
        elif content.strip():
            bad.add(f"{path} line {line}", f"expected X.jpg#0, a tab and the caption, got {content.strip()[:60]!r}")
    return rows


def _kaggle(path: Path, text: str) -> list[tuple[int, str, str, str]]:
    """Return the same fields of Kaggle's table, numbering a picture's captions in the order of their lines."""
    rows, counts = [], dict[str, int]()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        next(reader)
        for row in filter(None, reader):
            if len(row) != len(_KAGGLE):
                raise UserError(
                    f"{path} line {reader.line_num}: expected an image and a caption, got {len(row)} fields"
                )
            picture = picture_name(row[0].strip())
            number = counts[picture] = counts.get(picture, -1) + 1
            rows.append((reader.line_num, picture, str(number), row[1].strip()))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}: is a quote not closed?") from None
    logger.warning("flickr8k: %s does not number the captions: they are numbered in the order of its lines", path)
    return rows
