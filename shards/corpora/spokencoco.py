"""SpokenCOCO (Hsu et al., ACL 2021), as shipped or regrouped by Karpathy's split of COCO.

    ROOT/
        SpokenCOCO_train.json, SpokenCOCO_val.json
            {"data": [{"image": "val2014/COCO_val2014_000000325114.jpg", "captions": [{"text": ..., "speaker": ...,
             "uttid": ..., "wav": "wavs/val/0/UTTID.wav"}, ...]}, ...]}
        wavs/
        train2014/, val2014/    COCO's photos, here or in the folder --images

The two files follow COCO's train2014 and val2014. Published results are on Karpathy's split, which `--karpathy
dataset_coco.json` gives: train (with restval) 113,287 pictures, dev 5,000, test 5,000.
"""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

from shards.corpora import add_root, existing
from shards.corpora.item import Caption, Item
from shards.corpora.records import (
    BadRecord,
    BadRecords,
    as_object,
    file_name,
    integer,
    optional_text,
    records_of,
    required_text,
)
from shards.corpora.text_files import read_json_records

logger = logging.getLogger(__name__)

_HINT = "--root is the folder that SpokenCOCO.tar.gz unpacks to"
_KARPATHY = {"train": "train", "restval": "train", "val": "dev", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with SpokenCOCO_train.json, SpokenCOCO_val.json and wavs")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder with COCO's train2014 and val2014 (default: ROOT)"
    )
    parser.add_argument("--karpathy", type=Path, metavar="JSON", help="dataset_coco.json, to use Karpathy's split")


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures in the order of the two files: train and dev, or train, dev and test with `--karpathy`.

    Raises:
        UserError: A file is missing or malformed.
    """
    split_of = _karpathy(options.karpathy, bad) if options.karpathy else None
    items, unlisted = [], 0
    for part, shipped in (("train", "train"), ("val", "dev")):
        path = existing(options.root, f"SpokenCOCO_{part}.json", hint=_HINT)
        reader = _Reader(path, options.root, options.images or options.root, bad)
        _, records = read_json_records(path, "data", "a SpokenCOCO file", _HINT)
        for number, record in enumerate(records):
            try:
                split = split_of.get(coco_id(as_object(record))) if split_of is not None else shipped
                if split is None:
                    unlisted += 1
                elif item := reader.item(as_object(record), number, split):
                    items.append(item)
            except BadRecord as reason:
                reader.add_bad(record, number, reason)
    if unlisted:
        logger.warning(
            "spokencoco: %s pictures are in no part of %s and are left out", f"{unlisted:,}", options.karpathy
        )
    return items


def coco_id(record: dict[str, Any]) -> int:
    """Return COCO's id of a picture, the last digits of its file name.

    Raises:
        BadRecord: The record names no picture, or one without an id.
    """
    picture = file_name(record, "image")
    digits = Path(picture).stem.rsplit("_", 1)[-1]
    if not re.fullmatch(r"[0-9]{1,18}", digits):
        raise BadRecord(f"image is {picture!r}, expected a name that ends in COCO's id, as in x_000000325114.jpg")
    return int(digits)


def _karpathy(path: Path, bad: BadRecords) -> dict[int, str]:
    """Return the split of every picture of COCO by its id."""
    _, entries = read_json_records(path, "images", "Karpathy's dataset_coco.json", "see --karpathy")
    splits: dict[int, str] = {}
    for number, value in enumerate(entries):
        try:
            entry = as_object(value)
            cocoid, split = integer(entry, "cocoid"), required_text(entry, "split")
            if split not in _KARPATHY:
                raise BadRecord(f"split is {split!r}, expected {', '.join(_KARPATHY)}")
            if splits.setdefault(cocoid, _KARPATHY[split]) != _KARPATHY[split]:
                raise BadRecord(f"picture {cocoid} is in {split}, in an earlier entry in {splits[cocoid]}")
        except BadRecord as reason:
            bad.add(f"{path} images[{number}]", reason, what="picture", captions=0)
    return splits


class _Reader:
    """Converts the records of one file to items."""

    def __init__(self, path: Path, root: Path, photos: Path, bad: BadRecords) -> None:
        self.path, self.root, self.photos, self.bad = path, root, photos, bad

    def item(self, record: dict[str, Any], number: int, split: str) -> Item | None:
        """Return the picture of a record with its usable captions; None if there are none.

        Raises:
            BadRecord: The record itself cannot be used.
        """
        picture, spoken = file_name(record, "image"), records_of(record, "captions")
        where = f"{self.path.name} data[{number}]"
        captions = []
        for n, one in enumerate(spoken):
            try:
                captions.append(self._caption(as_object(one), f"{where}.captions[{n}]"))
            except BadRecord as error:
                self.bad.add(f"{self.path} data[{number}].captions[{n}]", error, split=split)
        image_id = Path(picture).stem
        if captions:
            return Item(image_id, split, self.photos / picture, tuple(captions), where=where)
        if self.bad.skip:  # otherwise the bad captions end the run
            reason = "no caption is left"
            self.bad.add(f"{self.path} data[{number}]", reason, what="picture", name=image_id, split=split, captions=0)
        return None

    def add_bad(self, record: Any, number: int, reason: BadRecord) -> None:
        """Add a record that cannot be used."""
        spoken = record.get("captions") if isinstance(record, dict) else None
        lost = len(spoken) if isinstance(spoken, list) else 0
        self.bad.add(f"{self.path} data[{number}]", reason, what="picture", captions=lost)

    def _caption(self, record: dict[str, Any], where: str) -> Caption:
        utterance, audio = required_text(record, "uttid"), self.root / file_name(record, "wav")
        return Caption(utterance, audio, optional_text(record, "text"), optional_text(record, "speaker"), where)
