"""What a corpus hands to the writer: pictures with their spoken captions, as light descriptions to be read later."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import UserError

# A file, or a picklable function that draws the picture: it is called in a writer process.
PictureSource = Path | Callable[[], Image.Image]
# A file, or a picklable function that gives float32 samples [channels, n] in [-1, 1] and their rate in Hz.
AudioSource = Path | Callable[[], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Caption:
    """One spoken caption."""

    utterance: str  # unique within the corpus
    audio: AudioSource
    text: str | None = None
    speaker: str | None = None
    place: str = field(default="", compare=False)  # where the corpus names it, for messages


@dataclass(frozen=True)
class Item:
    """One picture with all its spoken captions: a sample of the shards."""

    image_id: str  # unique within the corpus; the sample's key is derived from it
    split: str
    picture: PictureSource
    captions: tuple[Caption, ...]
    twin: str | None = None  # image id of the picture that this one is the swapped twin of
    place: str = field(default="", compare=False)  # where the corpus names it, for messages


def check_items(items: Sequence[Item]) -> None:
    """Look at a whole corpus before any of it is written.

    Raises:
        UserError: It is empty, an id comes twice, a picture has no captions or an unknown twin, or a word, or the name
            of a file, is none that can be stored.
    """
    if not items:
        raise UserError("the corpus has no samples: nothing to write")
    for item in items:
        _check_words(item)
    counts = Counter(item.image_id for item in items)
    image_id, times = counts.most_common(1)[0]
    if times > 1:
        raise UserError(f"image id {image_id} comes {times} times: an id names one picture, in one split")
    for item in items:
        if not item.captions:
            raise UserError(f"picture {item.image_id} has no captions")
        if item.twin is not None and item.twin not in counts:
            raise UserError(f"picture {item.image_id} is the twin of {item.twin}, which is not in the corpus")


def _check_words(item: Item) -> None:
    """See that what the corpus says of a sample can be stored, and that its files have names that files can have."""
    words = [("image id", item.image_id), ("split", item.split)]
    unsaid: list[tuple[str, str | None]] = [("twin", item.twin)]
    for one in item.captions:
        words.append(("utterance", one.utterance))
        unsaid += [("text", one.text), ("speaker", one.speaker)]
    words += [(name, value) for name, value in unsaid if value is not None]
    for name, value in words:
        if not _is_text(value):
            raise UserError(f"picture {item.image_id!r}: its {name} {value!r} is no text: mend the corpus's files")
    for source in (item.picture, *(one.audio for one in item.captions)):
        if isinstance(source, Path) and not _is_text(str(source), "surrogateescape"):  # names may be of any bytes
            raise UserError(f"picture {item.image_id!r}: no file can have the name {str(source)!r}")


def _is_text(value: object, errors: str = "strict") -> bool:
    try:
        return isinstance(value, str) and b"\0" not in value.encode(errors=errors)
    except UnicodeEncodeError:  # half of a letter that JSON writes in two
        return False
