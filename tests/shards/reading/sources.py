"""Sources of small data sets."""

import numpy as np

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
