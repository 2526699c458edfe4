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
import sys
from pathlib import Path
from typing import Any

from shards.corpora import add_root, checked, existing, read_json
from shards.corpora.item import Caption, Item
from shards.errors import UserError

_HINT = "--root is the folder that SpokenCOCO.tar.gz unpacks to"
_KARPATHY = {"train": "train", "restval": "train", "val": "dev", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with SpokenCOCO_train.json, SpokenCOCO_val.json and wavs")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder with COCO's train2014 and val2014 (default: ROOT)"
    )
    parser.add_argument(
        "--karpathy", type=Path, metavar="JSON", help="dataset_coco.json, to regroup by Karpathy's split"
    )


def read(options: argparse.Namespace) -> list[Item]:
    """The pictures in the order of the two files: splits train and dev, or train, dev and test with `--karpathy`.

    Raises:
        UserError: a file is missing or not as it should be.
    """
    photos = options.images or options.root
    split_of = _karpathy(options.karpathy) if options.karpathy else None
    items, left = [], 0
    for part, shipped in (("train", "train"), ("val", "dev")):
        path = existing(options.root, f"SpokenCOCO_{part}.json", hint=_HINT)
        try:
            for record in read_json(path)["data"]:
                split = split_of.get(coco_id(record["image"])) if split_of is not None else shipped
                if split is None:
                    left += 1
                else:
                    items.append(_item(record, split, photos, options.root))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a SpokenCOCO file ({error!r}): {_HINT}") from None
    if left:
        print(f"spokencoco: {left:,} pictures are in no part of {options.karpathy} and left out", file=sys.stderr)
    return checked(items, options)


def coco_id(picture: str) -> int:
    """COCO's number of a picture, the last digits of its file name."""
    return int(Path(picture).stem.rsplit("_", 1)[-1])


def _karpathy(path: Path) -> dict[int, str]:
    try:
        return {entry["cocoid"]: _KARPATHY[entry["split"]] for entry in read_json(path)["images"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not Karpathy's dataset_coco.json ({error!r}): see --karpathy") from None


def _item(record: dict[str, Any], split: str, photos: Path, root: Path) -> Item:
    captions = (
        Caption(one["uttid"], root / one["wav"], one.get("text"), one.get("speaker")) for one in record["captions"]
    )
    return Item(Path(record["image"]).stem, split, photos / record["image"], tuple(captions))
