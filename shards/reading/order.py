"""The order of samples: which picture and which of its captions is at each place of a run, as a pure function.

    source    the shards of a split     0 1 2 3 4 5 6 7
    lane      its part of them          0 2 4 6     1 3 5 7             dealt once, in balance
    pass      shuffled in windows       c a d b | h f e g     ...       every picture once
    run       pass 0, pass 1, ...       a batch draws on it what the weight of its source comes to

    batch t   sources x and y, 3 : 1    x x y x x x y x   x x y x x x y x       in two lanes
    rank r    takes what `rank_slice` names

Nothing here knows how many ranks or workers there are, so global batch t is the same on any cluster, and how far each
source is at step t is arithmetic, so beginning there costs the same as beginning at 0. `shards.reading.epochs` has the
shuffle.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest
from shards.reading.epochs import Passes, Share, Source


class Selection(NamedTuple):
    """A global batch or a part of one.

    Attributes:
        samples: int64 [n], sample numbers over all data sets; none comes twice in a global batch.
        captions: int64 [n], caption rows over all data sets.
        positions: int64 [n], `step * batch_size + place`: unique in the run, to seed what is random about a sample.
    """

    samples: np.ndarray
    captions: np.ndarray
    positions: np.ndarray

    def part(self, index: Any) -> "Selection":
        """Select places by a slice, a mask or an array of their numbers."""
        return Selection(*(column[index] for column in self))


class Order:
    """The global batches of a run.

    In each lane, every pass of a source holds each of its pictures exactly once, and K passes in a row use each of a
    picture's K captions exactly once. No global batch holds a picture twice, even where a pass ends within it.
    """

    def __init__(
        self, sources: Sequence[Source], batch_size: int, seed: int = 0, shuffle_shards: int = 16, shard_groups: int = 1
    ) -> None:
        """Describe the order; nothing is shuffled yet.

        Args:
            sources: What is mixed; no two have a sample number in common.
            batch_size: Pairs in a global batch.
            seed: Seed of the run.
            window: Shards shuffled together.
            lanes: Parts of a batch that read disjoint shards: lane l fills places l * B / L to (l + 1) * B / L.

        Raises:
            UserError: The lanes do not divide the batch or are more than the shards of a source; a weight is not a
                positive number or comes to less than one place in a lane's batch; or a lane has fewer pictures of a
                source than two batches draw.
        """
        if batch_size % shard_groups:
            raise UserError(
                f"a batch of {batch_size} does not divide into {shard_groups} lanes: set --training.batch_size to "
                f"{math.ceil(batch_size / shard_groups) * shard_groups} or --data.shard_groups to {math.gcd(batch_size, shard_groups)}"
            )
        self.sources, self.batch_size, self.seed = tuple(sources), batch_size, seed
        self.shuffle_shards, self.shard_groups = shuffle_shards, shard_groups
        self._places = batch_size // shard_groups  # of a lane in a batch
        self._shares = _shares(self.sources, self._places)
        self._runs = [
            [
                Passes(part, share, seed, shuffle_shards, (k, shard_group))
                for shard_group, part in enumerate(_deal(source, shard_groups))
            ]
            for k, (source, share) in enumerate(zip(self.sources, self._shares, strict=True))
        ]
        for runs in self._runs:
            self._check(min(runs, key=lambda run: run.pictures))

    @property
    def pictures(self) -> int:
        """Pictures of all sources."""
        return sum(run.pictures for runs in self._runs for run in runs)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that draw as many pictures as there are; the sources of a mixture each pass at their own pace."""
        return self.pictures / self.batch_size

    def batch(self, step: int) -> Selection:
        """Return global batch number `step`, at a cost that depends neither on `step` nor on the number of samples."""
        samples, captions = np.empty((2, self.shard_groups, self._places), np.int64)
        seats = self._seats(step)
        for k, runs in enumerate(self._runs):
            for shard_group, run in enumerate(runs):
                samples[shard_group, seats == k], captions[shard_group, seats == k] = run.draw(step)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return Selection(samples.ravel(), captions.ravel(), positions)

    def replacement(self, step: int, place: int, attempt: int) -> tuple[int, int]:
        """Name a picture to put in a place of a batch whose own cannot be read, and its caption.

        Line up the pictures of the place's source and lane that are not in the batch, as they follow it in its pass
        (where a pass ends within the batch, the new one) and then from the beginning of that pass. Of the n places that
        the batch gives to that source and lane, number i takes picture i at the first attempt, n + i at the second, and
        so on, round and round. While the line is long enough for n pictures an attempt, which it is at least once, all
        places and attempts take different pictures: ranks that replace different places never choose the same one.

        Args:
            step: Number of the global batch.
            place: Place in it, from 0.
            attempt: From 1.

        Returns:
            Sample number and caption row. The picture keeps its own place in the pass as well.
        """
        shard_group, seat = divmod(place, self._places)
        seats = self._seats(step)
        k = int(seats[seat])
        number = int(np.count_nonzero(seats[:seat] == k))
        return self._runs[k][shard_group].spare(step, number, attempt)

    def _seats(self, step: int) -> np.ndarray:
        """The source at each place of a lane, int64 [places]: every source spread evenly, so any part is a mixture."""
        drawn = [share.drawn(step + 1) - share.drawn(step) for share in self._shares]
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in drawn if n])
        return np.repeat(np.arange(len(drawn)), drawn)[np.argsort(spread, kind="stable")]

    def _check(self, run: Passes) -> None:
        """See that the smallest lane of a source is large enough and gets a place."""
        name = run.source.name if self.shard_groups == 1 else f"lane {run.stream[1]} of {run.source.name}"
        if run.share.mean < 1:
            raise UserError(
                f"{name} has {float(run.share.mean):.2g} places in a batch: give it more weight or set "
                f"--training.batch_size to {math.ceil(self._places / run.share.mean) * self.shard_groups} or more"
            )
        if run.pictures < 2 * run.share.most:
            more = "give it more pictures" if len(self.sources) == 1 else "give it more pictures or less weight"
            size = self._largest()
            mend = f"set --training.batch_size to {size} or less" if size else more
            raise UserError(
                f"a batch of {self.batch_size} needs at least {2 * run.share.most} pictures, {name} has "
                f"{run.pictures}: {mend}"
            )

    def _largest(self) -> int:
        """The largest smaller batch that the pictures suffice for; 0: there is none."""
        pictures = [min(run.pictures for run in runs) for runs in self._runs]
        for places in range(self._places - 1, 0, -1):
            shares = zip(_shares(self.sources, places), pictures, strict=True)
            if all(share.mean >= 1 and 2 * share.most <= n for share, n in shares):
                return places * self.shard_groups
        return 0


def source_of(manifest: Manifest, split: str, first_sample: int = 0, first_row: int = 0, weight: float = 1.0) -> Source:
    """Describe a split of a manifest, whose shards each hold samples of one split and are numbered in order of them.

    Raises:
        UserError: There is no such split, or a picture of it has no caption.
    """
    if split not in manifest.splits:
        raise UserError(f"no split {split!r} in {manifest.place}: it has {', '.join(manifest.splits)}")
    number, first = manifest.splits.index(split), manifest.first_caption
    silent = np.flatnonzero(first[1:] == first[:-1])
    silent = silent[manifest.split[silent] == number]
    if len(silent):  # it would be paired with the next picture's caption
        key = manifest.key[silent[0]].decode(errors="backslashreplace")
        raise UserError(
            f"sample {key} of split {split} of {manifest.place} has no caption ({len(silent):,} such samples): "
            "make the shards again"
        )
    edges = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1, dtype=manifest.shard.dtype))
    filled = np.flatnonzero(np.diff(edges))
    mine = filled[manifest.split[edges[filled]] == number]
    name = f"split {split} of {manifest.place}"
    return Source(edges[mine], np.diff(edges)[mine], first, first_sample, first_row, weight, name)


def order_of(
    manifest: Manifest | Sequence[Manifest],
    split: str,
    batch_size: int,
    seed: int = 0,
    shuffle_shards: int = 16,
    shard_groups: int = 1,
    weights: Sequence[float] | None = None,
) -> Order:
    """Build the order of a split of one data set, or of several with weights (default: the same for each).

    Raises:
        UserError: The split is unknown, or what `Order` says.
    """
    manifests = [manifest] if isinstance(manifest, Manifest) else list(manifest)
    sources, sample, row = [], 0, 0
    for one, weight in zip(manifests, weights or [1.0] * len(manifests), strict=True):
        sources.append(source_of(one, split, sample, row, weight))
        sample, row = sample + len(one.first_caption) - 1, row + int(one.first_caption[-1])
    return Order(sources, batch_size, seed, shuffle_shards, shard_groups)


def rank_slice(
    batch_size: int, micro: int, micros: int, rank: int, world_size: int, shard_groups: int = 1
) -> np.ndarray:
    """Return the places of a global batch that `rank` takes in micro-batch `micro` of `micros`, int64 [n].

    A micro-batch has an equal part of every lane and ranks are contiguous in it, so ranks that divide the lanes serve
    whole lanes. With one lane, micro-batches and ranks are contiguous in the batch.

    Raises:
        UserError: The batch does not divide so.
    """
    if batch_size % (shard_groups * micros) or batch_size % (micros * world_size):
        raise UserError(
            f"--training.batch_size {batch_size} does not divide by {micros} micro-batches x {shard_groups} lanes "
            f"or x {world_size} ranks: set it to a multiple of {micros * math.lcm(shard_groups, world_size)}"
        )
    lane_parts = np.arange(batch_size, dtype=np.int64).reshape(shard_groups, micros, -1)
    return lane_parts[:, micro].reshape(world_size, -1)[rank]


def _shares(sources: Sequence[Source], places: int) -> list[Share]:
    """Share a lane's places out by weight."""
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise UserError(f"the weight of {source.name} is {source.weight}: set it to a positive number")
    ends = list(accumulate((Fraction(str(source.weight)) for source in sources), initial=Fraction(0)))
    return [Share(places * low / ends[-1], places * high / ends[-1]) for low, high in pairwise(ends)]


def _deal(source: Source, shard_groups: int) -> list[Source]:
    """Deal the shards of a source to lanes: the largest first, each to the lane that has the fewest pictures."""
    if shard_groups > max(1, len(source.count)):
        raise UserError(
            f"{shard_groups} lanes need as many shards, {source.name} has {len(source.count)}: "
            f"set --data.shard_groups to {len(source.count)} or less, or make smaller shards"
        )
    dealt: list[list[int]] = [[] for _ in range(shard_groups)]
    fill = [(0, shard_group) for shard_group in range(shard_groups)]
    for shard in np.argsort(-source.count, kind="stable").tolist():
        pictures, shard_group = fill[0]
        heapq.heapreplace(fill, (pictures + int(source.count[shard]), shard_group))
        dealt[shard_group].append(shard)
    return [replace(source, start=source.start[sorted(own)], count=source.count[sorted(own)]) for own in dealt]
