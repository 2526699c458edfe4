"""Places Audio Captions (Harwath et al., 2016; the splits of 2020): spoken captions of pictures of Places205.

    ROOT/
        train_2020.json, dev_seen_2020.json, dev_unseen_2020.json, test_seen_2020.json, test_unseen_2020.json
        (or train.json and val.json of the first release); here or in ROOT/metadata
            {"image_base_path": ..., "audio_base_path": ..., "data": [{"uttid": ..., "speaker": ..., "asr_text": ...,
             "wav": "wavs/1/UTTID.wav", "image": "a/abbey/x.jpg"}, ...]}
        wavs/
        images/                 of Places205

Splits are named after their files: train, dev_seen, dev_unseen, test_seen, test_unseen; val is called dev. The base
paths in the files, those of the authors' machine, are used if they exist here; `--audio` and `--images` override them.
"""

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, as_object, file_name, optional_text
from shards.corpora.text_files import read_json_records
from shards.errors import UserError

logger = logging.getLogger(__name__)

_HINT = "--root is the folder with train_2020.json and the other splits, or with metadata/train.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with train_2020.json and the other splits")
    parser.add_argument("--images", type=Path, metavar="DIR", help="base folder of the pictures (default: ROOT/images)")
    parser.add_argument("--audio", type=Path, metavar="DIR", help="base folder of the audio files (default: ROOT)")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures in the order of the files; the captions of a picture in a split form one sample.

    Raises:
        UserError: A file is missing or malformed.
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
            # Seen and unseen speakers may have described the same picture, which is then one sample per split.
            name = picture if picture not in seen else f"{picture}@{split}"
            items.append(Item(name, split, photos / picture, tuple(spoken), where=spoken[0].where))
        seen.update(captions)
    shared = sum("@" in item.image_id for item in items)
    if shared:
        logger.warning("places: %s pictures are in more than one split", f"{shared:,}")
    return items


def splits_sharing_pictures(items: Sequence[Item]) -> set[str]:
    """Return the splits that may share pictures: those of seen and of unseen speakers."""
    return {item.split for item in items} - {"train"}


def _split_files(root: Path) -> dict[str, Path]:
    """Return the file of each split, train first."""
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
    """Return the usable captions of a file by picture."""
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
        caption = Caption(utterance, base / audio, text, speaker, f"{path.name} data[{number}]")
        captions.setdefault(picture, []).append(caption)
    return captions
