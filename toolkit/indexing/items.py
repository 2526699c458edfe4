"""Sources of items to embed: images or audio files in a folder, files of a list, or the samples of shards."""

import csv
import json
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.manifest import Manifest, load
from shards.media.audio import decode_audio
from shards.media.picture import decode_picture
from shards.reading.reader import Reader

if TYPE_CHECKING:
    from toolkit.model.processor import SpeechImageProcessor

logger = logging.getLogger(__name__)

Modality = Literal["image", "audio"]
ENDINGS: dict[Modality, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"),
}
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


class Item(NamedTuple):
    """An image or an audio file."""

    name: str  # unique in its source: the path relative to the folder, or the key in the shards
    size: int  # size in bytes
    version: str  # changes with the content: the modification time in ns, or checksum and offset in the shard


class ItemSource(Protocol):
    """Items and the decoding of them; `load` is called from several threads."""

    modality: Modality
    unlisted: list[str]  # folders that could not be listed, with a separator at the end

    def describe(self) -> dict[str, str]:
        """Return the values from which `open_source` opens it again; "place" is the location."""

    def items(self) -> list[Item]:
        """List the items; names are unique."""

    def load(self, item: Item, processor: "SpeechImageProcessor") -> Tensor:
        """Decode an item: uint8 [3, S, S] or float32 [n]; raises `UserError` if it cannot be."""

    def content(self, name: str) -> Path | bytes:
        """Return the file of an item, or its bytes; raises `UserError` if it cannot be read."""

    def path(self, name: str) -> str:
        """Return where an item is, for the user."""

    def is_current(self, item: Item) -> bool:
        """Whether an item is unchanged since it was listed."""


class FileSource:
    """Files under a root, or of a list; hidden files and folders are left out.

    Args:
        root: Folder that names are relative to.
        modality: Which files are listed.
        names: The files; None: all below the root whose names end like an image or an audio file.
    """

    def __init__(self, root: str, modality: Modality, names: Sequence[str] | None = None) -> None:
        self.root, self.modality, self.names = root, modality, names
        self.unlisted: list[str] = []

    def describe(self) -> dict[str, str]:
        """Return the kind, and of a folder its location."""
        return {"kind": "files"} if self.names is not None else {"kind": "folder", "place": self.root}

    def items(self) -> list[Item]:
        """List the files; files that cannot be examined are named and left out."""
        if self.names is None:
            return self._walk()
        items = []
        for name in dict.fromkeys(self.names):
            try:
                items.append(_file_item(name, os.stat(self.path(name))))
            except (OSError, ValueError) as error:
                logger.warning("%s", printable(f"{name}: {getattr(error, 'strerror', None) or error}: left out"))
        return items

    def load(self, item: Item, processor: "SpeechImageProcessor") -> Tensor:
        """Decode a file."""
        return self.decode(item.name, processor)

    def decode(self, name: str, processor: "SpeechImageProcessor") -> Tensor:
        """Decode a file by its name; see `load`."""
        path = self.content(name)
        if self.modality == "image":
            return processor(images=[path])["images"][0]
        return processor(speech=[path])["waveforms"][0]

    def content(self, name: str) -> Path:
        """Return the path of a file."""
        return Path(self.path(name))

    def path(self, name: str) -> str:
        """Return the path of a file, for the user."""
        return os.path.join(self.root, name)

    def is_current(self, item: Item) -> bool:
        """Whether size and modification time are unchanged."""
        try:
            return _file_item(item.name, os.stat(self.path(item.name))) == item
        except OSError:
            return False

    def _walk(self) -> list[Item]:
        """List the folder and its subfolders, each once: links are followed, and loops of links end."""
        items: list[Item] = []
        self.unlisted = []
        visited, stack = set(), [""]
        while stack:
            prefix = stack.pop()
            folder = os.path.join(self.root, prefix)
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                if not prefix:
                    raise UserError(f"{folder} cannot be listed: {error.strerror}") from None
                logger.warning("%s", printable(f"{folder} cannot be listed: {error.strerror}"))
                self.unlisted.append(prefix)
                continue
            for entry in entries:
                self._add_entry(entry, prefix, stack, items)
        return sorted(items)

    def _add_entry(self, entry: "os.DirEntry[str]", prefix: str, stack: list[str], items: list[Item]) -> None:
        wanted = entry.name.lower().endswith(ENDINGS[self.modality])
        if entry.name.startswith(".") or not (wanted or entry.is_symlink() or entry.is_dir(follow_symlinks=False)):
            return
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError as error:
            if wanted:
                logger.warning("%s", printable(f"{name}: {error.strerror}: left out"))
            return
        if stat.S_ISDIR(status.st_mode):
            stack.append(name + "/")
        elif wanted and stat.S_ISREG(status.st_mode):
            items.append(_file_item(name, status))


class ShardSource:
    """The images or the audio files of one split of shards.

    Args:
        location: Folder or URL of the shards.
        split: Name of the split.
        modality: Which members are listed.
        hash: Expected identity of the shards; None: any.

    Raises:
        UserError: There are no such shards.
    """

    def __init__(self, location: str, split: str, modality: Modality, hash: str | None = None) -> None:
        self.manifest: Manifest = load(location)
        if hash not in (None, self.manifest.hash):
            raise UserError(f"{location} holds other shards than those that were indexed: update the index")
        self.location, self.split, self.modality = location, split, modality
        self.unlisted: list[str] = []
        self.reader = Reader(self.manifest)
        self.numbers: dict[str, int] = {}  # name -> sample or caption row
        for sample in map(int, self.manifest.rows(split)):
            key = self.manifest.key[sample].decode(errors="surrogateescape")
            if modality == "image":
                self.numbers[key] = sample
            else:
                self.numbers |= {f"{key}.{n}": row for n, row in enumerate(self.manifest.captions(sample))}

    def describe(self) -> dict[str, str]:
        """Return kind, location, split and identity of the shards."""
        return {"kind": "shards", "place": self.location, "split": self.split, "hash": self.manifest.hash}

    def items(self) -> list[Item]:
        """List the members."""
        m = self.manifest
        offsets, sizes = (
            (m.image_offset, m.image_bytes) if self.modality == "image" else (m.audio_offset, m.audio_bytes)
        )
        items = []
        for name, number in self.numbers.items():
            sample = number if self.modality == "image" else self._sample(number)
            shard = m.shards[int(m.shard[sample])].sha256[:16]
            items.append(Item(name, int(sizes[number]), f"{shard}:{int(offsets[number])}"))
        return items

    def load(self, item: Item, processor: "SpeechImageProcessor") -> Tensor:
        """Decode a member as evaluation does."""
        content = self.content(item.name)
        if self.modality == "image":
            return torch.from_numpy(decode_picture(content, processor.image_size, resize=processor.resize))
        return torch.from_numpy(decode_audio(content)[: int(processor.max_seconds * processor.sampling_rate)])

    def content(self, name: str) -> bytes:
        """Return the bytes of a member."""
        number = self.numbers.get(name)
        if number is None:
            raise UserError(f"{self.path(name)}: no such sample")
        return self.reader.picture(number) if self.modality == "image" else self.reader.audio(number)

    def path(self, name: str) -> str:
        """Return the shards and the name in them."""
        return f"{self.location}:{name}"

    def is_current(self, item: Item) -> bool:
        """Whether there is such a sample; shards never change, and their identity has been checked."""
        return item.name in self.numbers

    def _sample(self, row: int) -> int:
        return int(np.searchsorted(self.manifest.first_caption, row, side="right")) - 1


def open_source(description: dict[str, str], modality: Modality) -> ItemSource:
    """Open a source from the result of its `describe`.

    Raises:
        UserError: The shards do not exist or have changed.
    """
    if description["kind"] == "shards":
        return ShardSource(description["place"], description["split"], modality, description["hash"])
    return FileSource(description.get("place", ""), modality)


def read_table(table: Path, modality: Modality) -> list[str]:
    """Read the column `image` or `audio` of a table (CSV or JSON lines); paths are relative to the table's folder.

    Raises:
        UserError: The table cannot be read, or has no such column.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Any]
            if table.suffix in TABLES[:2]:
                rows = list(csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{table} is not a table: {error}") from None
    if not rows:
        raise UserError(
            f"{table} has no rows: the table needs a column {modality}, named in the first line of a CSV file"
        )
    values = [row.get(modality) if isinstance(row, dict) else None for row in rows]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value:
            raise UserError(f"{table}: row {number} has no {modality}: the table needs a column of that name")
    return [str(value) for value in values]


def _file_item(name: str, status: os.stat_result) -> Item:
    return Item(name, status.st_size, str(status.st_mtime_ns))


def printable(text: str) -> str:
    """Escape line breaks, control characters and undecodable bytes of a name, for a message of one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
