"""Sources of small data sets."""

from pathlib import Path

import numpy as np

from shards.manifest import CAPTION_COLUMNS, COLUMNS, Manifest, ShardInfo, save
from shards.reading.epochs import Source


def make_source(counts: list[int], captions: int = 1, sample: int = 0, row: int = 0, **other: float) -> Source:
    """A data set whose first three samples belong to another split; samples have 1 to `captions` captions, in turn."""
    edges = np.cumsum([3, *counts])
    first_caption = np.cumsum([0, *(1 + n % captions for n in range(int(edges[-1])))])
    return Source(edges[:-1], np.array(counts), first_caption, sample, row, **other)


def same_shards(pictures: int, per_shard: int, captions: int = 1) -> Source:
    return make_source([min(per_shard, pictures - n) for n in range(0, pictures, per_shard)], captions)


def mix(sources: list[tuple[list[int], int, float]]) -> list[Source]:
    """Data sets numbered end to end, from (pictures of each shard, most captions, weight)."""
    made: list[Source] = []
    sample = row = 0
    for counts, captions, weight in sources:
        made.append(make_source(counts, captions, sample, row, weight=weight))
        sample, row = sample + len(made[-1].first_caption) - 1, row + int(made[-1].first_caption[-1])
    return made


def saved(folder: Path, counts: dict[str, list[int]], captions: int | np.ndarray, **columns: np.ndarray) -> Manifest:
    """A manifest without shards of these splits: pictures in each shard, captions of each; other columns are 0."""
    folder.mkdir()
    splits, pictures = zip(*((name, n) for name, shards in counts.items() for n in shards), strict=True)
    first_caption = np.cumsum([0, *np.broadcast_to(captions, sum(pictures))])
    every = {name: np.zeros(first_caption[-1] if name in CAPTION_COLUMNS else sum(pictures)) for name in COLUMNS}
    every["shard"] = np.repeat(np.arange(len(pictures)), pictures)
    every["split"] = np.repeat([list(counts).index(name) for name in splits], pictures)
    every["first_caption"] = first_caption
    infos = [ShardInfo(f"{splits[n]}-{n:06d}.tar", 100_000 + n, "0" * 64, count) for n, count in enumerate(pictures)]
    return save(folder, "noise", infos, list(counts), every | columns, {})
