"""Epochs of one source in one shard group; `shards.reading.order` draws global batches from them.

    shards of the group              0 2 4 6 8
    shuffled, in shuffle blocks      4 0 | 8 2 | 6                complete shards: reads stay within a block
    samples shuffled in each block   c a d b | h e g f | k i      every picture exactly once

A batch may contain the end of an epoch and the beginning of the next. Pictures that it already contains are moved
behind it:

    ... e g f k i | i c f a b ...   becomes   ... e g f k i | c a b i f ...
            [ a batch ]                               [ a batch ]

Each shuffle block has an independent random stream, so that reading at any step shuffles only the blocks that are read.

Pictures and captions are named by their numbers in the order of the manifest: a picture by its sample number, a caption
by its caption row, which counts the captions of all pictures. In a mixture both continue from one data set to the next.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

CACHED_SHUFFLES = 8  # shuffled epochs and blocks that are kept


@dataclass(frozen=True, eq=False)
class Source:
    """One split of one data set, or the part of it in one shard group."""

    start: np.ndarray  # int64 [shards], first sample number of each shard
    count: np.ndarray  # int64 [shards], samples of each shard
    first_caption: np.ndarray  # int64 [S + 1], first caption row of every sample of the data set
    first_sample: int = 0  # offset of sample numbers, as the data sets of a mixture are numbered consecutively
    first_row: int = 0  # offset of caption rows
    weight: float = 1.0  # number of pictures drawn, relative to the other sources
    name: str = "training"  # name in error messages


@dataclass(frozen=True)
class Share:
    """Number of pairs that one source has in a shard group's part of each batch, exact for any number of steps.

    The sources divide the interval from 0 to the number of pairs; this one has the part from `low` to `high`. Rounding
    the ends down, rather than the lengths, fills every batch, and the number of pictures drawn before step `s` differs
    from `s * mean` by less than one.
    """

    low: Fraction
    high: Fraction

    @property
    def mean(self) -> Fraction:
        """Mean number of pictures drawn per step."""
        return self.high - self.low

    @property
    def maximum(self) -> int:
        """Largest number of pictures drawn in a step."""
        return math.ceil(self.high) - math.floor(self.low)

    def drawn_before(self, step: int) -> int:
        """Return the number of pictures drawn before a step."""
        return math.floor(step * self.high) - math.floor(step * self.low)

    def step_at(self, position: int) -> int:
        """Return the step that draws picture `position` of the run; the mean must be at least one."""
        return bisect_right(range(position + 1), position, key=self.drawn_before) - 1


class EpochStream:
    """The endless sequence of epochs of one source in one shard group.

    Each epoch contains every picture exactly once, and K consecutive epochs use each of a picture's K captions exactly
    once. No step draws a picture twice if `share.mean >= 1` and `pictures >= 2 * share.maximum`.
    """

    def __init__(
        self, source: Source, share: Share, seed: int, shuffle_shards: int, stream_id: tuple[int, int]
    ) -> None:
        """Describe the sequence; nothing is shuffled yet.

        Args:
            source: The shards of the shard group.
            share: Number of pictures that each step draws.
            seed: Seed of the run.
            shuffle_shards: Shards in a shuffle block.
            stream_id: Numbers of the source and of the shard group; each pair has an independent random stream.
        """
        self.source, self.share, self.seed, self.stream_id = source, share, seed % 2**64, stream_id
        self.shuffle_shards = shuffle_shards
        self.pictures = int(source.count.sum())
        self._shuffles: dict[tuple[int, int], Any] = {}

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample numbers and caption rows that a step draws, each int64 [n]."""
        epochs, positions = np.divmod(
            np.arange(self.share.drawn_before(step), self.share.drawn_before(step + 1)), self.pictures
        )
        samples = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = self._samples(int(epoch), positions[epochs == epoch])
        return samples, self._captions(samples, epochs)

    def replacement(self, step: int, number: int, attempt: int) -> tuple[int, int]:
        """Return sample number and caption row that replace picture `number` of a step; see `Order.replacement`."""
        first, end = self.share.drawn_before(step), self.share.drawn_before(step + 1)
        epoch, last = divmod(end - 1, self.pictures)
        candidate = ((attempt - 1) * (end - first) + number) % (self.pictures - (end - first))
        # Among the pictures that follow, at most those of this step are skipped.
        following = self._samples(epoch, (last + 1 + np.arange(candidate + end - first)) % self.pictures)
        sample = following[~np.isin(following, self.draw(step)[0])][candidate : candidate + 1]
        return int(sample[0]), int(self._captions(sample, np.array([epoch]))[0])

    def _captions(self, samples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the caption rows of samples in their epochs: each epoch uses a picture's next caption."""
        rows, local = self.source.first_caption, samples - self.source.first_sample
        first, count = rows[local], rows[local + 1] - rows[local]
        return self.source.first_row + first + (_hash(samples, self.seed) + epochs) % count

    def _samples(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the sample numbers at positions of an epoch, int64 [n].

        The first batch of an epoch may begin with the last `tail` pictures of the previous epoch; these are moved
        behind it. Only the first `share.maximum` positions change: the end of an epoch does not depend on its start.
        """
        samples = self._shuffled(epoch, positions)
        early = positions < self.share.maximum
        if epoch and early.any():
            begin = epoch * self.pictures
            tail = begin - self.share.drawn_before(self.share.step_at(begin))
            first = self._shuffled(epoch, np.arange(self.share.maximum))
            repeated = np.isin(first, self._shuffled(epoch - 1, np.arange(self.pictures - tail, self.pictures)))
            samples[early] = np.concatenate([first[~repeated], first[repeated]])[positions[early]]
        return samples

    def _shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the sample numbers at positions of an epoch before any are moved, int64 [n]."""
        _, edges = self._cached(epoch, 0, self._shuffle_shards)
        samples, blocks = np.empty(len(positions), np.int64), np.searchsorted(edges, positions, side="right")
        for block in np.unique(blocks):
            here = blocks == block
            samples[here] = self._cached(epoch, int(block), self._shuffle_block)[positions[here] - edges[block - 1]]
        return samples

    def _shuffle_shards(self, epoch: int, _: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled shards of an epoch, and where each shuffle block and the next epoch begin."""
        shards = self._permutation(epoch, 0, len(self.source.count))
        sizes = np.add.reduceat(self.source.count[shards], np.arange(0, len(shards), self.shuffle_shards))
        return shards, np.concatenate([[0], np.cumsum(sizes)])

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Return the shuffled sample numbers of an epoch's shuffle block; blocks are numbered from 1."""
        shards, _ = self._cached(epoch, 0, self._shuffle_shards)
        chosen = shards[(block - 1) * self.shuffle_shards : block * self.shuffle_shards]
        starts, counts = self.source.start[chosen] + self.source.first_sample, self.source.count[chosen]
        samples = np.concatenate([np.arange(n) + start for start, n in zip(starts, counts, strict=True)])
        return samples[self._permutation(epoch, block, len(samples))]

    def _cached(self, epoch: int, block: int, shuffle: Callable[[int, int], Any]) -> Any:
        """Return `shuffle(epoch, block)` from a least-recently-used cache of `CACHED_SHUFFLES` entries."""
        shuffled = self._shuffles.pop((epoch, block), None)
        self._shuffles[epoch, block] = shuffle(epoch, block) if shuffled is None else shuffled
        if len(self._shuffles) > CACHED_SHUFFLES:
            del self._shuffles[next(iter(self._shuffles))]
        return self._shuffles[epoch, block]

    def _permutation(self, epoch: int, block: int, n: int) -> np.ndarray:
        """Return a permutation of the numbers below n; sorting raw words is reproducible in every NumPy version."""
        # Philox increments the lowest word of the counter; the other words give each permutation its own stream.
        counter = np.array([0, 1 + self.stream_id[0], self.stream_id[1], block], np.uint64)
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=counter).random_raw(n)
        return np.argsort(words, kind="stable")


def _hash(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers (finalizer of SplitMix64), so that neighboring pictures do not start with the same caption."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)
