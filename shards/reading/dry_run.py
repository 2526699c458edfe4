"""The dry run: who would read what, how far a pass goes, how much of the speech would be padding. Reads no shard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.length_groups import padded_length
from shards.manifest import Manifest
from shards.reading.order import Order, Source, rank_slice

BATCHES = 200  # looked at, at most
_MICROS = 5000  # micro-batches of them, about; to group one by length takes a fifth of a millisecond
_LINES = 16  # for the readers
_NAMES = 8  # shards named a line
_FEWEST = 8  # pictures a shard that are still worth a file
_IDEAL_BYTES = 200e6  # of a shard: long reads, and still many shards


@dataclass(frozen=True)
class Part:
    """One data set's split as a run uses it; bytes and hours are of one pass over it."""

    name: str
    share: float  # of each batch
    shards: int
    pictures: int
    captions: int
    hours: float
    read: int  # bytes of its pictures, each with one recording
    stored: int  # bytes of its shards
    window: int  # pictures shuffled together
    steps: float  # that a window lasts


@dataclass(frozen=True)
class Plan:
    """What a run would do; see `plan`."""

    parts: tuple[Part, ...]
    batch_size: int
    micros: int
    world_size: int
    workers: int
    nodes: int
    groups: int
    steps_per_epoch: float
    read_per_node: int  # bytes of pictures and recordings a pass
    stored_per_node: int  # bytes of the shards that hold them, which a node's cache would take
    padding: float  # share of the padded speech that is padding
    padding_grouped: float  # the same where a micro-batch is encoded in groups of like length, as the encoder does it
    batches: int  # that the padding was computed from
    seconds: float  # at which captions are cut
    steps: int  # whose readers are listed: about one window
    readers: dict[tuple[int, int], tuple[str, ...]]  # (rank, worker) to the shards it reads in those steps

    def text(self) -> str:
        """The plan for people."""
        lines = [line for part in self.parts for line in self._part(part)]
        pairs = self.batch_size // (self.micros * self.world_size)
        lines += [
            f"steps a pass: {self.steps_per_epoch:,.2f} of {self.batch_size:,} pairs "
            f"({_count(self.world_size, 'rank')} x {_count(self.micros, 'micro-batch')} x {pairs:,})",
            f"a pass, for each of {_count(self.nodes, 'node')}: reads {bytes_text(self.read_per_node)}; "
            f"a cache of whole shards takes {bytes_text(self.stored_per_node)}",
            f"padding: {self.padding:.1%} of the speech in a micro-batch, {self.padding_grouped:.1%} in "
            f"{_count(self.groups, 'group')} by length (over {_count(self.batches, 'batch')}, "
            f"captions cut at {self.seconds:g} s)",
            f"the first {_count(self.steps, 'step')} (one window) read:",
        ]
        return "\n".join(lines + self._readers())

    def _part(self, part: Part) -> list[str]:
        mixed = f", {part.share:.1%} of each batch" if len(self.parts) > 1 else ""
        return [
            f"{part.name}{mixed}: {part.pictures:,} pictures, {part.captions:,} captions, {part.hours:,.2f} h, "
            f"{_count(part.shards, 'shard')} of {bytes_text(part.stored / part.shards)} on average",
            f"  shuffled together: {part.window:,} pictures, {part.window / part.pictures:.1%} of a pass, "
            f"{part.steps:,.1f} steps",
        ]

    def _readers(self) -> list[str]:
        """One line for all readers of the same shards; where that is too many lines, one for those that share some."""
        alike: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for reader, shards in self.readers.items():
            alike.setdefault(shards, []).append(reader)
        if len(alike) <= _LINES:
            return [f"  {self._who(readers)}: {_named(shards)}" for shards, readers in alike.items()]
        lines = []
        for group, readers in self._neighbours():
            counts = [len(self.readers[reader]) for reader in readers]
            each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
            lines.append(f"  {self._who(readers)}: {each} each of {_named(sorted(group))}")
        rest = len(lines) - _LINES
        return [*lines[:_LINES], f"  and {rest} more such groups"] if rest > 0 else lines

    def _neighbours(self) -> list[tuple[set[str], list[tuple[int, int]]]]:
        """Readers that have shards in common, directly or through others, with all that they read: those of a lane."""
        groups: list[tuple[set[str], list[tuple[int, int]]]] = []
        for reader, shards in self.readers.items():
            near = [group for group in groups if not group[0].isdisjoint(shards)]
            groups = [group for group in groups if group[0].isdisjoint(shards)]
            together = sorted(r for _, readers in near for r in readers)
            groups.append((set(shards).union(*(names for names, _ in near)), [*together, reader]))
        return groups

    def _who(self, readers: Sequence[tuple[int, int]]) -> str:
        if len(readers) == len(self.readers) > 1:
            return "every rank" if self.workers <= 1 else "every worker of every rank"
        ranks = sorted({rank for rank, _ in readers})
        if len(readers) < len(ranks) * max(1, self.workers):
            names = [f"rank {rank} worker {worker}" for rank, worker in readers]
        elif len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
            names = [f"ranks {ranks[0]} to {ranks[-1]}"]
        else:
            names = [f"rank {rank}" for rank in ranks]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def plan(
    order: Order,
    manifests: Sequence[Manifest],
    world_size: int,
    workers: int,
    micros: int,
    groups: int,
    max_seconds: float = math.inf,
    nodes: int = 1,
) -> Plan:
    """Say what a run would do, from the manifests alone.

    Args:
        order: the global batches.
        manifests: the data sets in the order of `order.sources`.
        world_size: ranks.
        workers: loader processes a rank; micro-batch n is made by worker n mod `workers`.
        micros: micro-batches a step.
        groups: parts that the speech encoder takes a micro-batch in, by length.
        max_seconds: longer captions are cut.
        nodes: machines, with equally many ranks each.

    Raises:
        UserError: the batch does not divide by ranks, micro-batches and lanes.
    """
    places = {
        (micro, rank): rank_slice(order.batch_size, micro, micros, rank, world_size, order.shard_groups)
        for micro in range(micros)
        for rank in range(world_size)
    }
    total = sum(source.weight for source in order.sources)
    parts = [_part(order, s, m, s.weight / total) for s, m in zip(order.sources, manifests, strict=True)]
    batches = min(BATCHES, max(1, int(order.steps_per_epoch)), math.ceil(_MICROS / len(places)))
    padding, padding_grouped = _padding(order, manifests, list(places.values()), groups, max_seconds, batches)
    steps = min(BATCHES, math.ceil(max(part.steps for part in parts)))
    ranks = max(1, world_size // nodes)
    shard_group = order.batch_size // order.shard_groups
    served = len(np.unique(np.concatenate([at for (_, rank), at in places.items() if rank < ranks]) // shard_group))
    return Plan(
        parts=tuple(parts),
        batch_size=order.batch_size,
        micros=micros,
        world_size=world_size,
        workers=workers,
        nodes=nodes,
        groups=groups,
        steps_per_epoch=order.steps_per_epoch,
        read_per_node=sum(part.read for part in parts) * ranks // world_size,
        stored_per_node=sum(part.stored for part in parts) * served // order.shard_groups,
        padding=padding,
        padding_grouped=padding_grouped,
        batches=batches,
        seconds=max_seconds,
        steps=steps,
        readers=_readers(order, manifests, places, steps, micros, workers),
    )


def advise(manifest: Manifest, ranks: int, workers: int, window: int = 16) -> list[str]:
    """Say whether the shards of the largest split suit so many ranks and loader workers, and what would."""
    counts = [len(manifest.rows(split)) for split in manifest.splits]
    if not any(counts):
        return []
    split, pictures = manifest.splits[int(np.argmax(counts))], max(counts)
    mine = [manifest.shards[n] for n in np.unique(manifest.shard[manifest.rows(split)])]
    stored, readers = sum(shard.bytes for shard in mine), ranks * workers
    # Two shards for each reader, four windows a pass, and then shards that are read in long stretches.
    wanted = max(2 * readers, 4 * window, round(stored / _IDEAL_BYTES))
    fitting = max(_FEWEST, pictures // wanted)
    lines = [
        f"{split}: {_count(len(mine), 'shard')} of {bytes_text(stored / len(mine))}, "
        f"{pictures / len(mine):,.0f} pictures each; "
        f"a window of {window} shuffles {min(1.0, window / len(mine)):.0%} of a pass together",
        f"for {_count(ranks, 'rank')} x {_count(workers, 'worker')}: lanes up to {min(len(mine), ranks)}; "
        f"{_for_readers(len(mine), readers)}",
    ]
    better = math.ceil(pictures / fitting)
    if not wanted / 2 <= len(mine) <= 4 * wanted and better != len(mine):
        lines.append(
            f"better: make_shards --samples-per-shard {fitting}, "
            f"{_count(better, 'shard')} of {bytes_text(stored / pictures * fitting)}"
        )
    return lines


def _for_readers(shards: int, readers: int) -> str:
    if shards >= readers:
        return "stock webdataset has a shard for each worker too"
    return f"stock webdataset would leave {readers - shards} of {readers} workers without a shard"


def _part(order: Order, source: Source, m: Manifest, share: float) -> Part:
    first, last = int(source.start.min()), int((source.start + source.count).max())
    rows = slice(int(m.first_caption[first]), int(m.first_caption[last]))
    counts = np.diff(m.first_caption[first : last + 1])
    # A pass takes one caption of each picture: on average one of its recordings.
    audio = float((m.audio_bytes[rows] / np.repeat(counts, counts)).sum())
    together = min(order.shuffle_shards, len(source.count) // order.shard_groups)
    window = together * (last - first) / len(source.count)
    return Part(
        name=source.name,
        share=share,
        shards=len(source.count),
        pictures=last - first,
        captions=rows.stop - rows.start,
        hours=float(m.duration[rows].sum(dtype=np.float64)) / 3600,
        read=int(m.image_bytes[first:last].sum() + audio),
        stored=sum(m.shards[int(m.shard[start])].bytes for start in source.start),
        window=round(window),
        steps=window * order.shard_groups / (share * order.batch_size),
    )


def _padding(
    order: Order,
    manifests: Sequence[Manifest],
    places: Sequence[np.ndarray],
    groups: int,
    max_seconds: float,
    batches: int,
) -> tuple[float, float]:
    """Shares of the padded speech that are padding, over batches spread over a pass: as it comes, and in groups."""
    duration = np.concatenate([m.duration for m in manifests])
    taken = np.stack(places)
    real = plain = grouped = 0.0
    for step in np.linspace(0, max(0.0, order.steps_per_epoch - 1), batches).astype(int).tolist():
        seconds = np.minimum(duration[order.batch(step).captions], max_seconds).astype(np.float64)[taken]
        real += seconds.sum()
        plain += seconds.max(axis=1).sum() * seconds.shape[1]
        grouped += sum(padded_length(micro, groups) for micro in seconds)
    return (1 - real / plain, 1 - real / grouped) if plain else (0.0, 0.0)


def _readers(
    order: Order,
    manifests: Sequence[Manifest],
    places: dict[tuple[int, int], np.ndarray],
    steps: int,
    micros: int,
    workers: int,
) -> dict[tuple[int, int], tuple[str, ...]]:
    start = np.concatenate([source.start + source.first_sample for source in order.sources])
    names = [
        _shard_name(m, first, len(manifests) > 1)
        for source, m in zip(order.sources, manifests, strict=True)
        for first in source.start.tolist()
    ]
    read: dict[tuple[int, int], set[int]] = {}
    for step in range(steps):
        shards = np.searchsorted(start, order.batch(step).samples, side="right") - 1
        for (micro, rank), mine in places.items():
            worker = (step * micros + micro) % max(1, workers)
            read.setdefault((rank, worker), set()).update(shards[mine].tolist())
    return {reader: tuple(names[n] for n in sorted(read[reader])) for reader in sorted(read)}


def _shard_name(m: Manifest, sample: int, with_folder: bool) -> str:
    name = m.shards[int(m.shard[sample])].name
    return f"{m.folder.name}/{name}" if with_folder else name


def _named(shards: Sequence[str]) -> str:
    rest = f" and {len(shards) - _NAMES} more" if len(shards) > _NAMES else ""
    return f"{_count(len(shards), 'shard')}: {', '.join(shards[:_NAMES])}{rest}"


def bytes_text(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{'' if number == 1 else plural}"
