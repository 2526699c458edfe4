"""The dry run of reading: shards per reader, bytes and steps per epoch, and the share of padding. No shard is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.length_groups import padded_length
from shards.manifest import Manifest
from shards.reading.order import Order, Source, rank_slice

MAX_BATCHES = 200  # that are evaluated
_MAX_MICROS = 5000  # micro-batches of these; grouping one by length takes about 0.2 ms
_MAX_LINES = 16  # for the readers
_MAX_NAMES = 8  # shards named per line
_MIN_PICTURES = 8  # per shard
_IDEAL_BYTES = 200e6  # per shard: long reads, and still many shards


@dataclass(frozen=True)
class SourceSummary:
    """One source of the mixture; bytes and hours are those of one epoch."""

    name: str
    share: float  # of each batch
    shards: int
    pictures: int
    captions: int
    hours: float
    read: int  # bytes of its pictures, each with one audio file
    stored: int  # bytes of its shards
    shuffle_block: int  # pictures shuffled together
    steps: float  # steps per shuffle block


@dataclass(frozen=True)
class ReadingPlan:
    """What a run would read; see `plan_reading`."""

    sources: tuple[SourceSummary, ...]
    batch_size: int
    accumulation: int
    world_size: int
    workers: int
    nodes: int
    groups: int
    steps_per_epoch: float
    read_per_node: int  # bytes of pictures and audio files per epoch
    stored_per_node: int  # bytes of their shards: size of a node's cache
    padding: float  # as a share of the padded speech
    padding_grouped: float  # the same if a micro-batch is encoded in groups of similar length
    batches: int  # from which the padding was computed
    seconds: float  # longer utterances are cropped
    steps: int  # whose readers are listed: about one shuffle block
    readers: dict[tuple[int, int], tuple[str, ...]]  # (rank, worker) -> shards read in these steps

    def text(self) -> str:
        """Format the plan as text."""
        lines = [line for source in self.sources for line in self._source(source)]
        pairs = self.batch_size // (self.accumulation * self.world_size)
        lines += [
            f"steps per epoch: {self.steps_per_epoch:,.2f} of {self.batch_size:,} pairs "
            f"({_count(self.world_size, 'rank')} x {_count(self.accumulation, 'micro-batch')} x {pairs:,})",
            f"an epoch reads, on each of {_count(self.nodes, 'node')}: {bytes_text(self.read_per_node)}; "
            f"a cache of complete shards takes {bytes_text(self.stored_per_node)}",
            f"padding: {self.padding:.1%} of the speech in a micro-batch, {self.padding_grouped:.1%} in "
            f"{_count(self.groups, 'group')} by length (over {_count(self.batches, 'batch')}, "
            f"utterances cropped at {self.seconds:g} s)",
            f"the first {_count(self.steps, 'step')} (one shuffle block) read:",
        ]
        return "\n".join(lines + self._readers())

    def _source(self, source: SourceSummary) -> list[str]:
        share = f", {source.share:.1%} of each batch" if len(self.sources) > 1 else ""
        return [
            f"{source.name}{share}: {source.pictures:,} pictures, {source.captions:,} captions, {source.hours:,.2f} h, "
            f"{_count(source.shards, 'shard')} of {bytes_text(source.stored / source.shards)} on average",
            f"  shuffled together: {source.shuffle_block:,} pictures, "
            f"{source.shuffle_block / source.pictures:.1%} of an epoch, {source.steps:,.1f} steps",
        ]

    def _readers(self) -> list[str]:
        """Group readers of the same shards in one line; if there are too many lines, readers that share some shards."""
        readers_of: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for reader, shards in self.readers.items():
            readers_of.setdefault(shards, []).append(reader)
        if len(readers_of) <= _MAX_LINES:
            return [f"  {self._reader_names(readers)}: {_shard_list(shards)}" for shards, readers in readers_of.items()]
        lines = []
        for group, readers in self._reader_groups():
            counts = [len(self.readers[reader]) for reader in readers]
            each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
            lines.append(f"  {self._reader_names(readers)}: {each} each of {_shard_list(sorted(group))}")
        rest = len(lines) - _MAX_LINES
        return [*lines[:_MAX_LINES], f"  and {rest} more such groups"] if rest > 0 else lines

    def _reader_groups(self) -> list[tuple[set[str], list[tuple[int, int]]]]:
        """Return readers that share shards, directly or through others, with these shards: those of a shard group."""
        groups: list[tuple[set[str], list[tuple[int, int]]]] = []
        for reader, shards in self.readers.items():
            joined = [group for group in groups if not group[0].isdisjoint(shards)]
            groups = [group for group in groups if group[0].isdisjoint(shards)]
            members = sorted(r for _, readers in joined for r in readers)
            groups.append((set(shards).union(*(names for names, _ in joined)), [*members, reader]))
        return groups

    def _reader_names(self, readers: Sequence[tuple[int, int]]) -> str:
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


def plan_reading(
    order: Order,
    manifests: Sequence[Manifest],
    world_size: int,
    workers: int,
    accumulation: int,
    groups: int,
    max_seconds: float = math.inf,
    nodes: int = 1,
) -> ReadingPlan:
    """Plan what a run would read, from the manifests alone.

    Args:
        order: The global batches.
        manifests: The data sets in the order of `order.sources`.
        world_size: Number of ranks.
        workers: Loader processes per rank; micro-batch n is made by worker n mod `workers`.
        accumulation: Micro-batches per step.
        groups: Groups of similar length in which the speech encoder processes a micro-batch.
        max_seconds: Longer utterances are cropped.
        nodes: Number of nodes, with equally many ranks each.

    Raises:
        UserError: The batch does not divide by ranks, micro-batches and shard groups.
    """
    indices = {
        (micro, rank): rank_slice(order.batch_size, micro, accumulation, rank, world_size, order.shard_groups)
        for micro in range(accumulation)
        for rank in range(world_size)
    }
    total = sum(source.weight for source in order.sources)
    sources = [_summarize(order, s, m, s.weight / total) for s, m in zip(order.sources, manifests, strict=True)]
    batches = min(MAX_BATCHES, max(1, int(order.steps_per_epoch)), math.ceil(_MAX_MICROS / len(indices)))
    padding, padding_grouped = _padding(order, manifests, list(indices.values()), groups, max_seconds, batches)
    steps = min(MAX_BATCHES, math.ceil(max(source.steps for source in sources)))
    ranks = max(1, world_size // nodes)
    shard_group = order.batch_size // order.shard_groups
    groups_per_node = len(
        np.unique(np.concatenate([at for (_, rank), at in indices.items() if rank < ranks]) // shard_group)
    )
    return ReadingPlan(
        sources=tuple(sources),
        batch_size=order.batch_size,
        accumulation=accumulation,
        world_size=world_size,
        workers=workers,
        nodes=nodes,
        groups=groups,
        steps_per_epoch=order.steps_per_epoch,
        read_per_node=sum(source.read for source in sources) * ranks // world_size,
        stored_per_node=sum(source.stored for source in sources) * groups_per_node // order.shard_groups,
        padding=padding,
        padding_grouped=padding_grouped,
        batches=batches,
        seconds=max_seconds,
        steps=steps,
        readers=_readers(order, manifests, indices, steps, accumulation, workers),
    )


def advise(manifest: Manifest, ranks: int, workers: int, shuffle_shards: int = 16) -> list[str]:
    """Advise whether the shards of the largest split suit the number of ranks and loader workers, and what would."""
    counts = [len(manifest.rows(split)) for split in manifest.splits]
    if not any(counts):
        return []
    split, pictures = manifest.splits[int(np.argmax(counts))], max(counts)
    shards = [manifest.shards[n] for n in np.unique(manifest.shard[manifest.rows(split)])]
    stored, readers = sum(shard.bytes for shard in shards), ranks * workers
    # Two shards per reader, four shuffle blocks per epoch, and otherwise shards large enough for long reads.
    ideal = max(2 * readers, 4 * shuffle_shards, round(stored / _IDEAL_BYTES))
    per_shard = max(_MIN_PICTURES, pictures // ideal)
    lines = [
        f"{split}: {_count(len(shards), 'shard')} of {bytes_text(stored / len(shards))}, "
        f"{pictures / len(shards):,.0f} pictures each; "
        f"a shuffle block of {shuffle_shards} shards is {min(1.0, shuffle_shards / len(shards)):.0%} of an epoch",
        f"for {_count(ranks, 'rank')} x {_count(workers, 'worker')}: up to "
        f"{_count(min(len(shards), ranks), 'shard group')}; {_for_readers(len(shards), readers)}",
    ]
    better = math.ceil(pictures / per_shard)
    if not ideal / 2 <= len(shards) <= 4 * ideal and better != len(shards):
        lines.append(
            f"better: make_shards --samples-per-shard {per_shard}, "
            f"{_count(better, 'shard')} of {bytes_text(stored / pictures * per_shard)}"
        )
    return lines


def _for_readers(shards: int, readers: int) -> str:
    if shards >= readers:
        return "stock webdataset has a shard for each worker too"
    return f"stock webdataset would leave {readers - shards} of {readers} workers without a shard"


def _summarize(order: Order, source: Source, m: Manifest, share: float) -> SourceSummary:
    first, last = int(source.start.min()), int((source.start + source.count).max())
    rows = slice(int(m.first_caption[first]), int(m.first_caption[last]))
    counts = np.diff(m.first_caption[first : last + 1])
    # An epoch reads one of each picture's captions.
    audio = float((m.audio_bytes[rows] / np.repeat(counts, counts)).sum())
    shards = min(order.shuffle_shards, len(source.count) // order.shard_groups)
    shuffle_block = shards * (last - first) / len(source.count)
    return SourceSummary(
        name=source.name,
        share=share,
        shards=len(source.count),
        pictures=last - first,
        captions=rows.stop - rows.start,
        hours=float(m.duration[rows].sum(dtype=np.float64)) / 3600,
        read=int(m.image_bytes[first:last].sum() + audio),
        stored=sum(m.shards[int(m.shard[start])].bytes for start in source.start),
        shuffle_block=round(shuffle_block),
        steps=shuffle_block * order.shard_groups / (share * order.batch_size),
    )


def _padding(
    order: Order,
    manifests: Sequence[Manifest],
    indices: Sequence[np.ndarray],
    groups: int,
    max_seconds: float,
    batches: int,
) -> tuple[float, float]:
    """Return padding as a share of the padded speech, over batches spread over an epoch: ungrouped and in groups."""
    duration = np.concatenate([m.duration for m in manifests])
    rows = np.stack(indices)
    speech = ungrouped = grouped = 0.0
    for step in np.linspace(0, max(0.0, order.steps_per_epoch - 1), batches).astype(int).tolist():
        seconds = np.minimum(duration[order.batch(step).captions], max_seconds).astype(np.float64)[rows]
        speech += seconds.sum()
        ungrouped += seconds.max(axis=1).sum() * seconds.shape[1]
        grouped += sum(padded_length(micro, groups) for micro in seconds)
    return (1 - speech / ungrouped, 1 - speech / grouped) if ungrouped else (0.0, 0.0)


def _readers(
    order: Order,
    manifests: Sequence[Manifest],
    indices: dict[tuple[int, int], np.ndarray],
    steps: int,
    accumulation: int,
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
        for (micro, rank), own_indices in indices.items():
            worker = (step * accumulation + micro) % max(1, workers)
            read.setdefault((rank, worker), set()).update(shards[own_indices].tolist())
    return {reader: tuple(names[n] for n in sorted(read[reader])) for reader in sorted(read)}


def _shard_name(m: Manifest, sample: int, with_folder: bool) -> str:
    name = m.shards[int(m.shard[sample])].name
    return f"{m.folder.name}/{name}" if with_folder else name


def _shard_list(shards: Sequence[str]) -> str:
    rest = f" and {len(shards) - _MAX_NAMES} more" if len(shards) > _MAX_NAMES else ""
    return f"{_count(len(shards), 'shard')}: {', '.join(shards[:_MAX_NAMES])}{rest}"


def bytes_text(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"
