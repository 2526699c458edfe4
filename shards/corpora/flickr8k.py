"""The Flickr8k Audio Caption Corpus (Harwath and Glass, 2015).

The official splits, train, dev and test, have 6,000, 1,000 and 1,000 pictures with five recordings each.

    ROOT/
        flickr_audio/           of flickr_audio.tar.gz
            wavs/X_0.wav ...    five recordings a picture
            wav2capt.txt        X_0.wav X.jpg #0
            wav2spk.txt         X_0.wav 83
        Flicker8k_Dataset/X.jpg of Flickr8k_Dataset.zip, which spells it so
        Flickr8k_text/          of Flickr8k_text.zip; its files may lie in ROOT as well
            Flickr8k.token.txt  X.jpg#0<TAB>the caption
            Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt
"""

import argparse
import re
import sys
from pathlib import Path

from shards.corpora import add_root, checked, existing, read_text
from shards.corpora.item import Caption, Item
from shards.errors import UserError

_HINT = "--root is the folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text, as the downloads unpack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with flickr_audio, Flicker8k_Dataset and Flickr8k_text")


def read(options: argparse.Namespace) -> list[Item]:
    """The recorded pictures of the official splits, in the order of the split lists.

    Raises:
        UserError: a file is missing or a line of one is not as it should be.
    """
    root = options.root
    audio = existing(root, "flickr_audio", hint=_HINT)
    photos = existing(root, "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_Dataset", hint=_HINT)
    captions = _captions(audio, _texts(_text_file(root, "Flickr8k.token.txt")))
    items, silent = [], 0
    for split in ("train", "dev", "test"):
        for picture in read_text(_text_file(root, f"Flickr_8k.{split}Images.txt")).split():
            if picture in captions:
                items.append(Item(Path(picture).stem, split, photos / picture, tuple(captions[picture])))
            else:
                silent += 1
    if silent:
        print(f"flickr8k: {silent:,} pictures of the official splits have no recording", file=sys.stderr)
    return checked(items, options)


def _text_file(root: Path, name: str) -> Path:
    return existing(root, f"Flickr8k_text/{name}", name, hint=_HINT)


def _picture_name(name: str) -> str:
    # One picture is called X.jpg.1 in the captions and X.jpg on disk.
    return re.sub(r"(\.jpg)\.\d+$", r"\1", name)


def _texts(path: Path) -> dict[tuple[str, str], str]:
    """Written captions by picture and number."""
    texts = {}
    for line in read_text(path).splitlines():
        name, _, text = line.partition("\t")
        picture, _, number = name.partition("#")
        texts[_picture_name(picture), number] = text.strip()
    return texts


def _captions(audio: Path, texts: dict[tuple[str, str], str]) -> dict[str, list[Caption]]:
    """Spoken captions by picture, in order of their numbers."""
    speakers = dict(_rows(existing(audio, "wav2spk.txt", hint=_HINT), 2))
    rows = sorted(_rows(existing(audio, "wav2capt.txt", hint=_HINT), 3), key=lambda row: (row[1], row[2]))
    captions: dict[str, list[Caption]] = {}
    for wav, name, number in rows:
        picture = _picture_name(name)
        text = texts.get((picture, number.removeprefix("#")))
        one = Caption(Path(wav).stem, audio / "wavs" / wav, text, speakers.get(wav))
        captions.setdefault(picture, []).append(one)
    return captions


def _rows(path: Path, fields: int) -> list[list[str]]:
    rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != fields:
            raise UserError(f"{path} line {number}: expected {fields} fields, got {' '.join(row)!r}")
    return rows
