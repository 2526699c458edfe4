"""Places Audio Captions (Harwath et al., 2016; the splits of 2020): spoken captions of pictures of Places205.

    ROOT/
        train_2020.json, dev_seen_2020.json, dev_unseen_2020.json, test_seen_2020.json, test_unseen_2020.json
        (or train.json and val.json of the first release); here or in ROOT/metadata
            {"image_base_path": ..., "audio_base_path": ..., "data": [{"uttid": ..., "speaker": ..., "asr_text": ...,
             "wav": "wavs/1/UTTID.wav", "image": "a/abbey/x.jpg"}, ...]}
        wavs/
        images/                 of Places205

A split is named as its file: train, dev_seen, dev_unseen, test_seen, test_unseen; val is called dev. The base paths in
the files are those of the authors' machine: where they do not exist here, `--audio` and `--images` are taken.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, as_object, file_name, optional_text
from shards.corpora.text_files import read_json_records
from shards.errors import UserError

_HINT = "--root is the folder with train_2020.json and its like, or with metadata/train.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with train_2020.json and its like")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where pictures' paths start (default: ROOT/images)")
    parser.add_argument("--audio", type=Path, metavar="DIR", help="where recordings' paths start (default: ROOT)")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """The pictures in order of the files; captions of one picture in one split are one sample.

    Args:
        options: What `add_arguments` added.
        bad: Notes the records that cannot be used.

    Raises:
        UserError: A file is missing or not as it should be.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for split, path in _split_files(options.root).items():
        content, records = read_json_records(path, "data", "a Places Audio file", _HINT)
        photos = _base(options.images, content.get("image_base_path"), options.root / "images")
        captions = _captions(
            records, path, split, _base(options.audio, content.get("audio_base_path"), options.root), bad
        )
        for picture, spoken in captions.items():
            # Seen and unseen speakers may have described the same picture: each split has its own sample of it.
            name = picture if picture not in seen else f"{picture}@{split}"
            items.append(Item(name, split, photos / picture, tuple(spoken), place=spoken[0].place))
        seen.update(captions)
    shared = sum("@" in item.image_id for item in items)
    if shared:
        print(f"places: {shared:,} pictures are in more than one split", file=sys.stderr)
    return items


def share_pictures(items: Sequence[Item]) -> set[str]:
    """The splits that may have pictures in common: those of seen and of unseen speakers."""
    return {item.split for item in items} - {"train"}


def _split_files(root: Path) -> dict[str, Path]:
    """The files by split, train first."""
    existing(root, ".", hint=_HINT)
    files: dict[str, Path] = {}
    for folder in (root, root / "metadata"):
        for path in sorted(folder.glob("*.json")):
            match = re.fullmatch(r"(train|val|dev|test)(_seen|_unseen)?(_2020)?", path.stem)
            if match:
                split = match[1].replace("val", "dev") + (match[2] or "")
                files.setdefault(split, path)
    if "train" not in files:
        raise UserError(f"{root / 'train_2020.json'} is missing: {_HINT}")
    return {"train": files.pop("train"), **files}


def _base(given: Path | None, written: object, default: Path) -> Path:
    if given is not None:
        return given
    usable = isinstance(written, str) and Path(written).is_absolute() and os.path.isdir(written)
    return Path(str(written)) if usable else default


def _captions(records: list[Any], path: Path, split: str, base: Path, bad: BadRecords) -> dict[str, list[Caption]]:
    """The sound captions of a file by picture."""
    captions: dict[str, list[Caption]] = {}
    for number, value in enumerate(records):
        try:
            row = as_object(value)
            picture, audio = file_name(row, "image"), file_name(row, "wav")
            utterance = optional_text(row, "uttid") or Path(audio).stem
            text, speaker = optional_text(row, "asr_text"), optional_text(row, "speaker")
        except BadRecord as reason:
            bad.add(f"{path} data[{number}]", reason, split=split)
            continue
        one = Caption(utterance, base / audio, text, speaker, f"{path.name} data[{number}]")
        captions.setdefault(picture, []).append(one)
    return captions
