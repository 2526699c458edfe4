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
from pathlib import Path
from typing import Any

from shards.corpora import add_root, checked, existing, read_json
from shards.corpora.item import Caption, Item
from shards.errors import UserError

_HINT = "--root is the folder with train_2020.json and its like, or with metadata/train.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    add_root(parser, "folder with train_2020.json and its like")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where pictures' paths start (default: ROOT/images)")
    parser.add_argument("--audio", type=Path, metavar="DIR", help="where recordings' paths start (default: ROOT)")


def read(options: argparse.Namespace) -> list[Item]:
    """The pictures in order of the files; captions of one picture in one split are one sample.

    Raises:
        UserError: a file is missing or not as it should be.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for split, path in _split_files(options.root).items():
        content = read_json(path)
        try:
            captions = _captions(content, _base(options.audio, content.get("audio_base_path"), options.root))
            photos = _base(options.images, content.get("image_base_path"), options.root / "images")
            for picture, spoken in captions.items():
                # Seen and unseen speakers may have described the same picture: each split has its own sample of it.
                name = picture if picture not in seen else f"{picture}@{split}"
                items.append(Item(name, split, photos / picture, tuple(spoken)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a Places Audio file ({error!r}): {_HINT}") from None
        seen.update(captions)
    shared = sum("@" in item.image_id for item in items)
    if shared:
        print(f"places: {shared:,} pictures are in more than one split", file=sys.stderr)
    return checked(items, options)


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


def _base(given: Path | None, written: str | None, default: Path) -> Path:
    if given is not None:
        return given
    return Path(written) if written and Path(written).is_absolute() and os.path.isdir(written) else default


def _captions(content: dict[str, Any], base: Path) -> dict[str, list[Caption]]:
    captions: dict[str, list[Caption]] = {}
    for row in content["data"]:
        utterance = row.get("uttid") or Path(row["wav"]).stem
        one = Caption(utterance, base / row["wav"], row.get("asr_text"), row.get("speaker"))
        captions.setdefault(row["image"], []).append(one)
    return captions
