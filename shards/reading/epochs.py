"""The pictures of one source in one lane, pass after pass; `shards.reading.order` makes global batches of them.

    shards of the lane           0 2 4 6 8
    shuffled, cut into windows   4 0 | 8 2 | 6                whole shards: reads stay within a window
    samples of each, shuffled    c a d b | h e g f | k i      every picture exactly once

A batch may hold the end of a pass and the beginning of the next. What it already holds moves behind it:

    ... e g f k i | i c f a b ...   becomes   ... e g f k i | c a b i f ...
            [ a batch ]                               [ a batch ]

Every window has random numbers of its own, so reading anywhere in a run shuffles only the windows that are read.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

RECENT = 8  # shuffled passes and windows that are kept


@dataclass(frozen=True, eq=False)
class Source:
    """One split of one data set, or the part of it that a lane reads.

    Attributes:
        start: int64 [shards], first sample number of each shard.
        count: int64 [shards], samples of each.
        first_caption: int64 [S + 1], first caption row of every sample of the data set.
        first_sample: Added to sample numbers: the data sets of a mixture are numbered end to end.
        first_row: Added to caption rows.
        weight: Pictures drawn from here, relative to the other sources.
        name: What an error calls it.
    """

    start: np.ndarray
    count: np.ndarray
    first_caption: np.ndarray
    first_sample: int = 0
    first_row: int = 0
    weight: float = 1.0
    name: str = "training"


@dataclass(frozen=True)
class Share:
    """How many places of a lane's batches one source fills, exact however long the run is.

    The sources lie end to end on a line as long as a batch has places; this one has the part from `low` to `high`.
    Rounding the ends down, rather than the lengths, fills every batch and keeps what is drawn before any step less than
    one picture away from the source's weight.
    """

    low: Fraction
    high: Fraction

    @property
    def mean(self) -> Fraction:
        """Pictures that a batch draws in the mean."""
        return self.high - self.low

    @property
    def most(self) -> int:
        """Pictures that no batch draws more of."""
        return math.ceil(self.high) - math.floor(self.low)

    def drawn(self, step: int) -> int:
        """Pictures drawn before a step."""
        return math.floor(step * self.high) - math.floor(step * self.low)

    def step_at(self, position: int) -> int:
        """The step that draws picture `position` of the run, where the mean is one or more."""
        return bisect_right(range(position + 1), position, key=self.drawn) - 1


class Passes:
    """The endless run of a lane's pictures of one source.

    Every pass holds every picture exactly once, and K passes in a row use each of a picture's K captions exactly once.
    No step draws a picture twice, given `share.mean >= 1` and two steps' pictures: `pictures >= 2 * share.most`.
    """

    def __init__(self, source: Source, share: Share, seed: int, window: int, stream: tuple[int, int]) -> None:
        """Describe the run; nothing is shuffled yet.

        Args:
            source: The lane's shards.
            share: What each step draws.
            seed: Seed of the run.
            window: Shards shuffled together.
            stream: Number of the source and of the lane: each pair has its own random numbers.
        """
        self.source, self.share, self.seed, self.window, self.stream = source, share, seed % 2**64, window, stream
        self.pictures = int(source.count.sum())
        self._recent: dict[tuple[int, int], Any] = {}

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and caption rows that a step draws, each int64 [n]."""
        epochs, places = np.divmod(np.arange(self.share.drawn(step), self.share.drawn(step + 1)), self.pictures)
        samples = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = self._pass(int(epoch), places[epochs == epoch])
        return samples, self._captions(samples, epochs)

    def spare(self, step: int, number: int, attempt: int) -> tuple[int, int]:
        """Sample number and caption row in the stead of picture `number` of a step: see `Order.replacement`."""
        first, end = self.share.drawn(step), self.share.drawn(step + 1)
        epoch, last = divmod(end - 1, self.pictures)
        wanted = ((attempt - 1) * (end - first) + number) % (self.pictures - (end - first))
        # Fewer pictures than a step draws are passed over on the way.
        following = self._pass(epoch, (last + 1 + np.arange(wanted + end - first)) % self.pictures)
        sample = following[~np.isin(following, self.draw(step)[0])][wanted : wanted + 1]
        return int(sample[0]), int(self._captions(sample, np.array([epoch]))[0])

    def _captions(self, samples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Caption rows of samples in their passes: the next one of a picture in every pass."""
        rows, local = self.source.first_caption, samples - self.source.first_sample
        first, count = rows[local], rows[local + 1] - rows[local]
        return self.source.first_row + first + (_scramble(samples, self.seed) + epochs) % count

    def _pass(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample numbers at places of a pass, int64 [n].

        The first batch of a pass may begin with the last `tail` pictures of the pass before: those move behind it. Only
        the first `most` places change, so the end of a pass, which lies behind them, is known without its beginning.
        """
        samples = self._shuffled(epoch, places)
        early = places < self.share.most
        if epoch and early.any():
            begin = epoch * self.pictures
            tail = begin - self.share.drawn(self.share.step_at(begin))
            first = self._shuffled(epoch, np.arange(self.share.most))
            held = np.isin(first, self._shuffled(epoch - 1, np.arange(self.pictures - tail, self.pictures)))
            samples[early] = np.concatenate([first[~held], first[held]])[places[early]]
        return samples

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample numbers at places of a pass before any are moved, int64 [n]."""
        _, edges = self._kept(epoch, 0, self._shuffle_shards)
        samples, windows = np.empty(len(places), np.int64), np.searchsorted(edges, places, side="right")
        for window in np.unique(windows):
            here = windows == window
            samples[here] = self._kept(epoch, int(window), self._shuffle_window)[places[here] - edges[window - 1]]
        return samples

    def _shuffle_shards(self, epoch: int, _: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass in their order, and the first place of each window and of the next pass."""
        shards = self._permutation(epoch, 0, len(self.source.count))
        sizes = np.add.reduceat(self.source.count[shards], np.arange(0, len(shards), self.window))
        return shards, np.concatenate([[0], np.cumsum(sizes)])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """The sample numbers of a window of a pass, from 1, in their order."""
        shards, _ = self._kept(epoch, 0, self._shuffle_shards)
        chosen = shards[(window - 1) * self.window : window * self.window]
        starts, counts = self.source.start[chosen] + self.source.first_sample, self.source.count[chosen]
        samples = np.concatenate([np.arange(n) + start for start, n in zip(starts, counts, strict=True)])
        return samples[self._permutation(epoch, window, len(samples))]

    def _kept(self, epoch: int, window: int, shuffle: Callable[[int, int], Any]) -> Any:
        """What `shuffle` makes, kept until `RECENT` others were used after it."""
        made = self._recent.pop((epoch, window), None)
        self._recent[epoch, window] = shuffle(epoch, window) if made is None else made
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return self._recent[epoch, window]

    def _permutation(self, epoch: int, window: int, n: int) -> np.ndarray:
        """Shuffle the numbers below n for a window of a pass; sorting raw words is the same in every NumPy."""
        # Counting begins in the lowest word: the words above keep all permutations of a run apart.
        counter = np.array([0, 1 + self.stream[0], self.stream[1], window], np.uint64)
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=counter).random_raw(n)
        return np.argsort(words, kind="stable")


def _scramble(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers (the finaliser of splitmix64), so that neighbouring pictures do not start with the same caption."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)
