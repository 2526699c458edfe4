"""Descriptions of samples that a corpus passes to the writer: pictures with spoken captions, read later."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.stored import StoredFile

# A file, or a picklable function that draws the picture; it is called in a writer process.
PictureSource = Path | StoredFile | Callable[[], Image.Image]
# A file, or a picklable function that returns float32 samples [channels, n] in [-1, 1] and their sampling rate in Hz.
AudioSource = Path | StoredFile | Callable[[], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Caption:
    """One spoken caption."""

    utterance: str  # unique within the corpus
    audio: AudioSource
    text: str | None = None
    speaker: str | None = None
    where: str = field(default="", compare=False)  # in the corpus it is listed, for messages
    language: str | None = field(default=None, metadata={"later": True})  # code, as in `en`


@dataclass(frozen=True)
class Item:
    """One picture with all its spoken captions: a sample of the shards."""

    image_id: str  # unique within the corpus; the sample's key is derived from it
    split: str
    picture: PictureSource
    captions: tuple[Caption, ...]
    twin: str | None = None  # image id of the picture of which this one is the minimal pair
    where: str = field(default="", compare=False)  # in the corpus it is listed, for messages


def check_items(items: Sequence[Item]) -> None:
    """Validate a corpus before anything is written.

    Raises:
        UserError: The corpus is empty, an image id is repeated, a picture has no captions or an unknown twin, or a
            string or file name cannot be stored.
    """
    if not items:
        raise UserError("the corpus has no samples: nothing to write")
    for item in items:
        _check_strings(item)
    counts = Counter(item.image_id for item in items)
    image_id, times = counts.most_common(1)[0]
    if times > 1:
        raise UserError(f"image id {image_id} occurs {times} times: it has to be unique across splits")
    for item in items:
        if not item.captions:
            raise UserError(f"picture {item.image_id} has no captions")
        if item.twin is not None and item.twin not in counts:
            raise UserError(f"picture {item.image_id} is the twin of {item.twin}, which is not in the corpus")


def _check_strings(item: Item) -> None:
    """Check that the strings of a sample can be stored and that its file names are valid."""
    strings = [("image id", item.image_id), ("split", item.split)]
    optional: list[tuple[str, str | None]] = [("twin", item.twin)]
    for one in item.captions:
        strings.append(("utterance", one.utterance))
        optional += [("text", one.text), ("speaker", one.speaker), ("language", one.language)]
    strings += [(name, value) for name, value in optional if value is not None]
    for name, value in strings:
        if not _is_text(value):
            raise UserError(f"picture {item.image_id!r}: its {name} {value!r} is not valid text: correct the corpus")
    for source in (item.picture, *(one.audio for one in item.captions)):
        if isinstance(source, Path) and not _is_text(str(source), "surrogateescape"):  # file names may be any bytes
            raise UserError(f"picture {item.image_id!r}: {str(source)!r} is not a valid file name")


def _is_text(value: object, errors: str = "strict") -> bool:
    try:
        return isinstance(value, str) and b"\0" not in value.encode(errors=errors)
    except UnicodeEncodeError:  # a lone surrogate
        return False
