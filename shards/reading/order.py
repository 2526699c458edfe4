"""The order of samples: the pictures and captions of each global batch, as a pure function of the step.

    source        shards of a split                0 1 2 3 4 5 6 7
    shard group   balanced part of the shards      0 2 4 6     1 3 5 7
    epoch         shuffled in shuffle blocks       c a d b | h f e g     ...       every picture once
    stream        epoch 0, epoch 1, ...            each batch draws in proportion to the weight of the source

    batch t       sources x and y, 3 : 1           x x y x x x y x   x x y x x x y x       two shard groups
    rank r        the indices that `rank_slice` returns

The order does not depend on the number of ranks or workers, so global batch t is the same on any cluster. The position
of each source at step t is computed in constant time, so that resuming there costs the same as starting at 0. The
shuffle is in `shards.reading.epochs`.
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
from shards.reading.epochs import EpochStream, Share, Source


class Selection(NamedTuple):
    """A global batch or a part of one."""

    samples: np.ndarray  # int64 [n], sample numbers over all data sets, distinct within a global batch
    captions: np.ndarray  # int64 [n], caption rows over all data sets
    positions: np.ndarray  # int64 [n], `step * batch_size + index`: unique in the run, used to seed random crops

    def part(self, index: Any) -> "Selection":
        """Select by a slice, a mask or an array of indices."""
        return Selection(*(column[index] for column in self))


class Order:
    """The global batches of a run.

    In each shard group, every epoch of a source contains each of its pictures exactly once, and K consecutive epochs
    use each of a picture's K captions exactly once. No global batch contains a picture twice, even where an epoch ends.
    """

    def __init__(
        self, sources: Sequence[Source], batch_size: int, seed: int = 0, shuffle_shards: int = 16, shard_groups: int = 1
    ) -> None:
        """Describe the order; nothing is shuffled yet.

        Args:
            sources: Sources of the mixture, with disjoint sample numbers.
            batch_size: Pairs in a global batch.
            seed: Seed of the run.
            shuffle_shards: Shards in a shuffle block.
            shard_groups: Number of disjoint shard groups G: group g has indices g * B / G to (g + 1) * B / G.

        Raises:
            UserError: The shard groups do not divide the batch or outnumber the shards of a source; a weight is not a
                positive number or gives less than one pair of a shard group's part of the batch; or a shard group has
                fewer pictures of a source than two batches draw.
        """
        if batch_size % shard_groups:
            raise UserError(
                f"a batch of {batch_size} does not divide into {shard_groups} shard groups: set --training.batch_size "
                f"to {math.ceil(batch_size / shard_groups) * shard_groups} or --data.shard_groups to "
                f"{math.gcd(batch_size, shard_groups)}"
            )
        self.sources, self.batch_size, self.seed = tuple(sources), batch_size, seed
        self.shuffle_shards, self.shard_groups = shuffle_shards, shard_groups
        self._group_size = batch_size // shard_groups  # pairs
        self._shares = _shares(self.sources, self._group_size)
        self._streams = [
            [
                EpochStream(part, share, seed, shuffle_shards, (k, shard_group))
                for shard_group, part in enumerate(_assign_shards(source, shard_groups))
            ]
            for k, (source, share) in enumerate(zip(self.sources, self._shares, strict=True))
        ]
        for streams in self._streams:
            self._check(min(streams, key=lambda stream: stream.pictures))

    @property
    def pictures(self) -> int:
        """Number of pictures of all sources."""
        return sum(stream.pictures for streams in self._streams for stream in streams)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that draw as many pictures as there are; in a mixture, the epochs of sources differ in length."""
        return self.pictures / self.batch_size

    def batch(self, step: int) -> Selection:
        """Return global batch number `step`, at a cost that depends neither on `step` nor on the number of samples."""
        samples, captions = np.empty((2, self.shard_groups, self._group_size), np.int64)
        layout = self._source_layout(step)
        for k, streams in enumerate(self._streams):
            for shard_group, stream in enumerate(streams):
                samples[shard_group, layout == k], captions[shard_group, layout == k] = stream.draw(step)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return Selection(samples.ravel(), captions.ravel(), positions)

    def replacement(self, step: int, index: int, attempt: int) -> tuple[int, int]:
        """Return the picture and caption that replace an unreadable picture of a batch.

        The candidates are the pictures of the same source and shard group that are not in the batch, in the order in
        which they follow it in its epoch (if an epoch ends within the batch, the new one), continued at the beginning
        of that epoch. Of the n pairs of this source and shard group in the batch, pair i takes candidate i at the
        first attempt, n + i at the second, and so on, cyclically. As long as there are n candidates per attempt (at
        least for the first), all pairs and attempts take different pictures: ranks that replace pictures at
        different indices never choose the same one.

        Returns:
            Sample number and caption row. The picture also keeps its regular position in the epoch.
        """
        shard_group, local_index = divmod(index, self._group_size)
        layout = self._source_layout(step)
        k = int(layout[local_index])
        number = int(np.count_nonzero(layout[:local_index] == k))
        return self._streams[k][shard_group].replacement(step, number, attempt)

    def _source_layout(self, step: int) -> np.ndarray:
        """Return the source of each pair of a shard group, int64 [pairs]; evenly spread, so any part is a mixture."""
        drawn = [share.drawn_before(step + 1) - share.drawn_before(step) for share in self._shares]
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in drawn if n])
        return np.repeat(np.arange(len(drawn)), drawn)[np.argsort(spread, kind="stable")]

    def _check(self, stream: EpochStream) -> None:
        """Raise an error if the smallest shard group of a source has too few pictures or pairs."""
        group = "" if self.shard_groups == 1 else f"shard group {stream.stream_id[1]} of "
        name = f"{group}{stream.source.name}"
        if stream.share.mean < 1:
            raise UserError(
                f"{name} has {float(stream.share.mean):.2g} places in a batch: give it more weight or set "
                f"--training.batch_size to {math.ceil(self._group_size / stream.share.mean) * self.shard_groups} or "
                "more"
            )
        if stream.pictures < 2 * stream.share.maximum:
            more = "give it more pictures" if len(self.sources) == 1 else "give it more pictures or less weight"
            size = self._largest_batch_size()
            fix = f"set --training.batch_size to {size} or less" if size else more
            raise UserError(
                f"a batch of {self.batch_size} needs at least {2 * stream.share.maximum} pictures, {name} has "
                f"{stream.pictures}: {fix}"
            )

    def _largest_batch_size(self) -> int:
        """Return the largest smaller batch size for which there are enough pictures; 0: there is none."""
        pictures = [min(stream.pictures for stream in streams) for streams in self._streams]
        for size in range(self._group_size - 1, 0, -1):
            shares = zip(_shares(self.sources, size), pictures, strict=True)
            if all(share.mean >= 1 and 2 * share.maximum <= n for share, n in shares):
                return size * self.shard_groups
        return 0


def source_of(manifest: Manifest, split: str, first_sample: int = 0, first_row: int = 0, weight: float = 1.0) -> Source:
    """Describe a split of a manifest; each shard contains samples of one split, in the order of numbers.

    Raises:
        UserError: There is no such split, or a picture of it has no caption.
    """
    if split not in manifest.splits:
        raise UserError(f"no split {split!r} in {manifest.location}: it has {', '.join(manifest.splits)}")
    number, first = manifest.splits.index(split), manifest.first_caption
    without_caption = np.flatnonzero(first[1:] == first[:-1])
    without_caption = without_caption[manifest.split[without_caption] == number]
    if len(without_caption):  # it would be paired with the next picture's caption
        key = manifest.key[without_caption[0]].decode(errors="backslashreplace")
        raise UserError(
            f"sample {key} of split {split} of {manifest.location} has no caption "
            f"({len(without_caption):,} such samples): make the shards again"
        )
    edges = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1, dtype=manifest.shard.dtype))
    nonempty = np.flatnonzero(np.diff(edges))
    shards = nonempty[manifest.split[edges[nonempty]] == number]
    name = f"split {split} of {manifest.location}"
    return Source(edges[shards], np.diff(edges)[shards], first, first_sample, first_row, weight, name)


def order_of(
    manifest: Manifest | Sequence[Manifest],
    split: str,
    batch_size: int,
    seed: int = 0,
    shuffle_shards: int = 16,
    shard_groups: int = 1,
    weights: Sequence[float] | None = None,
) -> Order:
    """Build the order of a split of one data set, or of several with weights (default: equal).

    Raises:
        UserError: There is no such split, or as for `Order`.
    """
    manifests = [manifest] if isinstance(manifest, Manifest) else list(manifest)
    sources, sample, row = [], 0, 0
    for one, weight in zip(manifests, weights or [1.0] * len(manifests), strict=True):
        sources.append(source_of(one, split, sample, row, weight))
        sample, row = sample + len(one.first_caption) - 1, row + int(one.first_caption[-1])
    return Order(sources, batch_size, seed, shuffle_shards, shard_groups)


def rank_slice(
    batch_size: int, micro: int, accumulation: int, rank: int, world_size: int, shard_groups: int = 1
) -> np.ndarray:
    """Return the indices in a global batch that `rank` takes in micro-batch `micro` of `accumulation`, int64 [n].

    A micro-batch has an equal part of every shard group, and ranks are contiguous in it. If the number of ranks divides
    the number of shard groups, each rank reads complete shard groups. With one shard group, micro-batches and ranks are
    contiguous in the batch.

    Raises:
        UserError: The batch cannot be divided evenly.
    """
    if batch_size % (shard_groups * accumulation) or batch_size % (accumulation * world_size):
        multiple = accumulation * math.lcm(shard_groups, world_size)
        raise UserError(
            f"--training.batch_size {batch_size} is not divisible by {accumulation} micro-batches x {shard_groups} "
            f"shard groups or x {world_size} ranks: set it to a multiple of {multiple}"
        )
    group_parts = np.arange(batch_size, dtype=np.int64).reshape(shard_groups, accumulation, -1)
    return group_parts[:, micro].reshape(world_size, -1)[rank]


def _shares(sources: Sequence[Source], size: int) -> list[Share]:
    """Divide the pairs of a shard group by weight."""
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise UserError(f"the weight of {source.name} is {source.weight}: set it to a positive number")
    ends = list(accumulate((Fraction(str(source.weight)) for source in sources), initial=Fraction(0)))
    return [Share(size * low / ends[-1], size * high / ends[-1]) for low, high in pairwise(ends)]


def _assign_shards(source: Source, shard_groups: int) -> list[Source]:
    """Assign shards to shard groups: the largest first, each to the group that has the fewest pictures."""
    if shard_groups > max(1, len(source.count)):
        raise UserError(
            f"{shard_groups} shard groups need as many shards, {source.name} has {len(source.count)}: "
            f"set --data.shard_groups to {len(source.count)} or less, or make smaller shards"
        )
    assigned: list[list[int]] = [[] for _ in range(shard_groups)]
    fill = [(0, shard_group) for shard_group in range(shard_groups)]
    for shard in np.argsort(-source.count, kind="stable").tolist():
        pictures, shard_group = fill[0]
        heapq.heapreplace(fill, (pictures + int(source.count[shard]), shard_group))
        assigned[shard_group].append(shard)
    return [replace(source, start=source.start[sorted(group)], count=source.count[sorted(group)]) for group in assigned]
