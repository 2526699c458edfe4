"""The Flickr8k Audio Caption Corpus (Harwath and Glass, 2015).

The official splits, train, dev and test, have 6,000, 1,000 and 1,000 pictures with five recordings each.

    ROOT/
        flickr_audio/           of flickr_audio.tar.gz
            wavs/X_0.wav ...    five recordings a picture
            wav2capt.txt        X_0.wav X.jpg #0
            wav2spk.txt         X_0.wav 83
        Flicker8k_Dataset/X.jpg of Flickr8k_Dataset.zip, which spells it so
        Flickr8k_text/          of Flickr8k_text.zip; its files may lie in ROOT as well
            Flickr8k.token.txt  X.jpg#0<TAB>the caption; or Kaggle's captions.txt: image,caption
            Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from shards.corpora import add_root, existing
from shards.corpora.flickr8k_texts import Texts, picture_name, read_texts
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecords
from shards.corpora.text_files import read_text
from shards.errors import UserError

_HINT = "--root is the folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text, as the downloads unpack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """The recorded pictures of the official splits, in the order of the split lists.

    Args:
        options: What `add_arguments` added.
        bad: Notes the lines that cannot be used.

    Raises:
        UserError: A file is missing, or nothing of one fits the others.
    """
    root = options.root
    audio = existing(root, "flickr_audio", hint=_HINT)
    photos = existing(root, "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_Dataset", hint=_HINT)
    captions = _captions(audio, read_texts(_text_file(root, "Flickr8k.token.txt", "captions.txt"), bad), bad)
    items, silent = [], 0
    for split in ("train", "dev", "test"):
        path = _text_file(root, f"Flickr_8k.{split}Images.txt")
        listed = [(number, name) for number, line in _lines(path) for name in line.split()]
        found = [
            Item(Path(name).stem, split, photos / name, tuple(captions[name]), place=f"{path.name} line {number}")
            for number, name in listed
            if name in captions
        ]
        if not found:
            _tell_empty(split, path, [name for _, name in listed], captions)
        items += found
        silent += len(listed) - len(found)
    if silent:
        print(f"flickr8k: {silent:,} pictures of the official splits have no recording", file=sys.stderr)
    return items


def _text_file(root: Path, *names: str) -> Path:
    return existing(root, *(f"{folder}{name}" for name in names for folder in ("Flickr8k_text/", "")), hint=_HINT)


def _tell_empty(split: str, path: Path, names: list[str], recorded: Collection[str]) -> None:
    """Say that a split holds nothing, as one of a part of the corpus may.

    Args:
        split: Name of the split.
        path: Its list.
        names: What is in the list.
        recorded: Pictures that have recordings.

    Raises:
        UserError: Its list names something, but no pictures in the form of the recorded ones.
    """
    endings = {Path(name).suffix for name in recorded}
    if names and recorded and not any(Path(name).suffix in endings for name in names):
        raise UserError(
            f"split {split} would be empty: {path} names no pictures but {names[0]!r} and so on: a line is the name "
            f"of a file as in wav2capt.txt, for instance {next(iter(recorded))}"
        )
    why = f"none of the {len(names):,} pictures in {path} has a recording" if names else f"{path} names no pictures"
    print(f"flickr8k: split {split} is empty: {why}", file=sys.stderr)


def _captions(audio: Path, texts: Texts, bad: BadRecords) -> dict[str, list[Caption]]:
    """Spoken captions by picture, in order of their numbers."""
    speakers = _speakers(existing(audio, "wav2spk.txt", hint=_HINT), bad)
    path = existing(audio, "wav2capt.txt", hint=_HINT)
    rows = sorted(_rows(path, 3, bad), key=lambda row: row[1][1:])
    captions: dict[str, list[Caption]] = {}
    for line, (wav, name, number) in rows:
        picture = picture_name(name)
        text = texts.captions.get((picture, number.removeprefix("#")))
        one = Caption(Path(wav).stem, audio / "wavs" / wav, text, speakers.get(wav), f"{path.name} line {line}")
        captions.setdefault(picture, []).append(one)
    bad.settle()  # first, since what follows from a bad line is not to be told in its place
    every = [one for spoken in captions.values() for one in spoken]
    _tell_lost("text", sum(not one.text for one in every), len(every), texts.path, bad)
    _tell_lost("speaker", sum(not one.speaker for one in every), len(every), audio / "wav2spk.txt", bad)
    return captions


def _tell_lost(what: str, lost: int, every: int, path: Path, bad: BadRecords) -> None:
    """Say how many captions have no text, or no speaker.

    Raises:
        UserError: None has, so that the file does not fit the recordings, and nothing is to be skipped.
    """
    if not lost:
        return
    line = f"{lost:,} of {every:,} captions have no {what} in {path}"
    if lost == every and not bad.skip:
        raise UserError(f"{line}: give the file of the same release, or go on without by --skip-bad")
    print(f"flickr8k: {line}", file=sys.stderr)


def _speakers(path: Path, bad: BadRecords) -> dict[str, str]:
    speakers: dict[str, str] = {}
    for line, (wav, speaker) in _rows(path, 2, bad):
        if speakers.setdefault(wav, speaker) != speaker:
            bad.add(f"{path} line {line}", f"{wav} is of speaker {speaker}, in an earlier line of {speakers[wav]}")
    return speakers


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def _rows(path: Path, fields: int, bad: BadRecords) -> list[tuple[int, list[str]]]:
    """The fields of the lines, with the lines' numbers."""
    rows = [(number, line.split()) for number, line in _lines(path)]
    for number, row in rows:
        if len(row) != fields:
            bad.add(f"{path} line {number}", f"expected {fields} fields, got {' '.join(row)!r}")
    return [row for row in rows if len(row[1]) == fields]
