"""What a corpus hands to the writer: pictures with their spoken captions, as light descriptions to be read later."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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


@dataclass(frozen=True)
class Item:
    """One picture with all its spoken captions: a sample of the shards."""

    image_id: str  # unique within the corpus; the sample's key is derived from it
    split: str
    picture: PictureSource
    captions: tuple[Caption, ...]
    twin: str | None = None  # image id of the picture that this one is the swapped twin of
