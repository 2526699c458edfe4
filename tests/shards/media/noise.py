"""Small data sets of noise: pictures with spoken captions, another for every number."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.manifest import Manifest, load
from shards.media.audio import SAMPLE_RATE
from shards.writing.writer import Format, write_shards


def drawn(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def spoken(seed: int) -> tuple[np.ndarray, int]:
    chance = np.random.default_rng(seed)
    return chance.uniform(-0.5, 0.5, (1, chance.integers(2000, 8000))).astype(np.float32), SAMPLE_RATE


def noise(folder: Path, pictures: int = 26, captions: int = 3, samples_per_shard: int = 5, first: int = 0) -> Manifest:
    """Write a split "train" of pictures p0, p1, ..., each another for every `first`."""
    items = [
        Item(
            f"p{n}",
            "train",
            partial(drawn, first + n),
            tuple(Caption(f"p{n}-{k}", partial(spoken, 7 * (first + n) + k), f"text {n} {k}") for k in range(captions)),
        )
        for n in range(pictures)
    ]
    write_shards(items, folder, "noise", Format(samples_per_shard=samples_per_shard), {})
    return load(folder)


def spoil(manifest: Manifest, sample: int, what: str = "image") -> None:
    """Overwrite a picture, or the audio of all captions, with something that cannot be decoded; sizes stay."""
    shard = manifest.folder / manifest.shards[int(manifest.shard[sample])].name
    rows = [sample] if what == "image" else list(manifest.captions(sample))
    with shard.open("r+b") as file:
        for row in rows:
            file.seek(int(getattr(manifest, f"{what}_offset")[row]))
            file.write(b"x" * int(getattr(manifest, f"{what}_bytes")[row]))
