"""Your own data: tars that stock `webdataset` writes, with other names for the members by option.

    data/train-000000.tar               also folders of tars, 'data/*.tar', data/train-{000..009}.tar and URLs
        KEY.jpg                         the picture
        KEY.wav                         its caption; several: KEY.0.wav, KEY.1.wav, ...
        KEY.txt                         text of the caption (KEY.0.txt, ..., or a line for each caption)
        KEY.json                        optional, like its keys: {"image_id": ..., "split": ..., "text": ...,
                                        "speaker": ..., "language": ...}, or {"captions": [{"text": ...}, ...]}

Samples with one image id are joined to a picture with several captions. The split is the JSON's, or that of the tar:
`--split dev=val-*.tar`, else a word in its name or its folder (train, dev, val, test, ...), else train. Nothing in a
tar is extracted or run. A tar at a URL is read twice: once to list it, once member by member.
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shards.corpora.item import Caption, Item
from shards.corpora.records import BadRecord, BadRecords, as_object, optional_text, text_or_integer
from shards.errors import UserError
from shards.manifest import SPLIT
from shards.remote import is_url
from shards.tars.members import MAX_SOURCE, TarMember
from shards.tars.samples import (
    DEFAULT_SPLIT,
    StockSample,
    StockTar,
    add_layout,
    describe_ignored,
    find_tars,
    layout_of,
    parse_object,
    read_tars,
    split_of,
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    parser.add_argument(
        "--root", type=_location, nargs="+", required=True, metavar="TARS", help="tars, folders, patterns or URLs"
    )
    add_layout(parser)
    for key, what in (
        ("text", "text of a caption"),
        ("speaker", "speaker"),
        ("language", "language, as in en"),
        ("image-id", "id of the picture; samples with the same are joined"),
        ("split", "split"),
    ):
        name = key.replace("-", "_")
        parser.add_argument(
            f"--{key}-key", default=name, metavar="KEY", help=f"key in the JSON: {what} (default: {name})"
        )


def _location(text: str) -> str:
    return text if is_url(text) or text.startswith("pipe:") else os.path.abspath(text)


def read(options: argparse.Namespace, bad: BadRecords) -> list[Item]:
    """Return the pictures in the order of the tars; a picture in two splits is an item of each.

    Raises:
        UserError: A tar is missing, or none has a sample.
    """
    locations = find_tars(options.root)
    tars = list(read_tars(locations, layout_of(options), getattr(options, "jobs", 1)))
    repeated = _has_repeated_keys(tars)
    reader = _SampleReader(options, bad)
    for tar in tars:
        stem = tar.location.rpartition("/")[2].removesuffix(".tar")
        reader.add_tar(tar, f"{stem}/" if repeated else "")
    ignored = describe_ignored(tars)
    if not reader.items and not bad.dropped:
        layout = ", ".join(f"--{name} {';'.join(getattr(options, name))}" for name in ("image", "audio"))
        raise UserError(f"no sample in {len(tars)} tars with {layout}: members end in {ignored or 'nothing'}")
    if ignored:
        logger.info("webdataset: ignored members that end in %s", ignored)
    if reader.unnamed:
        more = f" and {len(reader.unnamed) - 1} more" if len(reader.unnamed) > 1 else ""
        logger.warning(
            "webdataset: no split in the name of %s%s: all is %s (--split NAME=PATTERN)",
            *(reader.unnamed[0], more, DEFAULT_SPLIT),
        )
    return reader.joined()


def _has_repeated_keys(tars: Iterable[StockTar]) -> bool:
    """Whether keys begin anew in each tar, so that they name samples only together with the tar."""
    counts = Counter(sample.key for tar in tars for sample in tar.samples)
    return bool(counts) and counts.most_common(1)[0][1] > 1


@dataclass
class _Picture:
    member: TarMember
    captions: list[Caption]
    where: str


class _SampleReader:
    """Makes items of samples."""

    def __init__(self, options: argparse.Namespace, bad: BadRecords) -> None:
        self.options, self.bad = options, bad
        self.items: dict[tuple[str, str], _Picture] = {}  # by image id and split
        self.unnamed: list[str] = []  # tars with samples in the default split, as nothing says another

    def add_tar(self, tar: StockTar, prefix: str) -> None:
        """Add the samples of a tar; `prefix` makes its keys unique."""
        split, unnamed = split_of(tar.location, self.options.split), False
        for sample in tar.samples:
            where = f"{tar.location}: {sample.key}"
            try:
                record = sample.record()
                own = optional_text(record, self.options.split_key)
                name = own if own is not None and not self.options.split else split
                if name is None and self.options.split:
                    raise BadRecord("no --split pattern matches its tar")
                unnamed |= name is None
                self._add(sample, record, name or DEFAULT_SPLIT, f"{prefix}{sample.key}", where)
            except (BadRecord, ValueError) as error:
                self.bad.add(where, error, what="picture", split=split or "-", captions=len(sample.audio))
        for key, reason in tar.problems:
            self.bad.add(f"{tar.location}: {key}" if key else tar.location, reason, what="picture", split=split or "-")
        if unnamed:
            self.unnamed.append(tar.location)

    def joined(self) -> list[Item]:
        """Return the items, in the order of their first samples."""
        return [
            Item(image_id, split, one.member, tuple(one.captions), where=one.where)
            for (image_id, split), one in self.items.items()
        ]

    def _add(self, sample: StockSample, record: dict[str, Any], split: str, name: str, where: str) -> None:
        if not SPLIT.fullmatch(split):
            raise BadRecord(f"split is {split!r}, expected a name of letters, digits, _ and - only")
        if len(sample.pictures) != 1:
            names = ", ".join(member.name for member in sample.pictures)
            raise BadRecord(f"has several pictures: {names}: choose one by --image" if names else "has no picture")
        if not sample.audio:
            raise BadRecord("has no audio")
        for member in (sample.pictures[0], *sample.audio.values()):
            if member.size > MAX_SOURCE:
                raise BadRecord(f"{member.name} has {member.size:,} bytes, the limit is {MAX_SOURCE:,}")
        image_id = text_or_integer(record, self.options.image_id_key) or name
        captions = self._captions(sample, record, name, where)
        picture = self.items.setdefault((image_id, split), _Picture(sample.pictures[0], [], where))
        if picture.member.size != sample.pictures[0].size:
            raise BadRecord(f"its picture differs from the one at {picture.where}, and both have image id {image_id}")
        picture.captions += captions

    def _captions(self, sample: StockSample, record: dict[str, Any], name: str, where: str) -> list[Caption]:
        details = _details(record, len(sample.audio), self.options.text_key)
        lines = _lines(sample)
        captions = []
        for number, (part, member) in enumerate(sample.audio.items()):
            own = details[number]
            if part and part in sample.json:
                own = own | parse_object(sample.json[part])
            text = optional_text(own, self.options.text_key)
            speaker = text_or_integer(own, self.options.speaker_key)
            utterance = optional_text(own, "utterance") or (f"{name}.{part}" if part else name)
            language = optional_text(own, self.options.language_key)
            captions.append(Caption(utterance, member, lines[number] or text, speaker, where, language))
        return captions


def _details(record: dict[str, Any], count: int, text_key: str) -> list[dict[str, Any]]:
    """Return what the JSON of a sample says of each caption."""
    common = {name: value for name, value in record.items() if name not in ("captions", "utterance")}
    several = record.get("captions", common.get(text_key))
    if not isinstance(several, list):
        if count > 1 and isinstance(common.get(text_key), str):
            raise BadRecord(f"{text_key} is one text for {count} captions, expected a list")
        return [common] * count
    if len(several) != count:
        raise BadRecord(f"its JSON describes {len(several)} captions, and it has {count} audio files")
    common.pop(text_key, None)
    return [common | ({text_key: one} if isinstance(one, str | None) else as_object(one)) for one in several]


def _lines(sample: StockSample) -> list[str | None]:
    """Return the text of each caption in members of text; of a single one for several captions, a line each."""
    if None in sample.texts.values():
        raise BadRecord("its text is longer than 1 MiB")
    texts = {part: (data or b"").decode("utf-8-sig").strip() for part, data in sample.texts.items()}
    lines: list[str | None] = [texts.get(part) or None for part in sample.audio]
    if "" in texts and "" not in sample.audio:
        each = texts[""].splitlines() if len(sample.audio) > 1 else [texts[""]]
        if len(each) != len(sample.audio):
            raise BadRecord(f"its text has {len(each)} lines for {len(sample.audio)} captions")
        lines = [line or one.strip() or None for line, one in zip(lines, each, strict=True)]
    return lines
