"""The stream of batches: bytes at known offsets of the shards, decoded in worker processes.

    order.batch(t) -> this rank's places -> read -> decode, replace what is broken -> pad -> Batch

A worker makes whole micro-batches; the stream yields them in order whatever the number of workers. What it yields is a
function of the order and the rank's places alone: a run that goes on elsewhere gets the bytes it would have got here.
"""

import atexit
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from shards.errors import TransientError, UserError
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import MAX_STORED_PIXELS as MAX_PIXELS
from shards.media.picture import Resize, decode_picture
from shards.reading.bad_samples import BadSample, BadSampleCounter, UnreadableSampleError, distinct
from shards.reading.order import Order, Selection, rank_slice
from shards.reading.reader import Reader
from shards.reading.shared_buffers import Layout, SharedBatch, SharedBuffers, bytes_of

AHEAD = 4  # batches that a worker makes before they are asked for
_POLL = 2.0  # seconds between looks at whether the workers live
_TENSORS = ("images", "waveforms", "lengths", "ids")


@dataclass
class Batch:
    """Speech-image pairs of one rank.

    Attributes:
        images: uint8 [B, 3, S, S].
        waveforms: float32 [B, T], 16 kHz, zero-padded.
        lengths: int64 [B], samples of each waveform.
        ids: int64 [B], sample numbers: the identity of the picture.
        host_lengths: `lengths` as numbers, known without asking the device.
        faults: Samples that could not be read and have others in their rows, in the order of rows.
        notices: Lines for the user.
    """

    images: torch.Tensor
    waveforms: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    host_lengths: tuple[int, ...] | None = None
    bad_samples: list[BadSample] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """Move to a device without waiting for the copy."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def pin_memory(self) -> "Batch":
        """Pin, so that copies to the device overlap with compute; DataLoader calls this."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


# What a worker sends: a batch, what ends the stream, or faults that are too many to go on making the batch.
Loaded = Batch | SharedBatch | UserError | list[BadSample]


@dataclass(frozen=True)
class MicroBatches(Dataset[Loaded]):
    """The micro-batches of one rank, by number: `step * micros + micro`."""

    reader: Reader
    order: Order
    image_size: int
    max_samples: int  # longer captions are cropped at random
    micros: int
    rank: int
    world_size: int
    max_bad_samples: int
    max_bad_samples_in_a_row: int
    slots: tuple[SharedBuffers, ...] = ()  # of each worker
    resize: Resize = "crop"

    def __getitem__(self, number: int) -> Loaded:
        try:
            return self._load(*divmod(number, self.micros))
        except UserError as error:  # travels as a value: DataLoader would wrap it in its own traceback
            return error

    def _load(self, step: int, micro: int) -> Batch | SharedBatch | list[BadSample]:
        size, shard_groups = self.order.batch_size, self.order.shard_groups
        places = rank_slice(size, micro, self.micros, self.rank, self.world_size, shard_groups)
        chosen = self.order.batch(step).part(places)
        _prefetch(self.reader, self.order, step, places)
        images, waves, ids = [], [], []
        bad_samples: list[BadSample] = []
        for row, (place, position) in enumerate(zip(places.tolist(), chosen.positions.tolist(), strict=True)):
            pair = self._pair(chosen, step, place, position, row, bad_samples)
            if pair is None:
                return bad_samples
            image, wave, sample = pair
            images.append(image)
            waves.append(wave)
            ids.append(sample)
        return self._packed(images, waves, ids, bad_samples)

    def _packed(
        self, images: list[np.ndarray], waves: list[np.ndarray], ids: list[int], bad_samples: list[BadSample]
    ) -> Batch | SharedBatch:
        """Make the batch, in a worker on one of its slots if there is one free."""
        worker, wanted = get_worker_info(), layout(images, waves)
        extra = partial(replace, bad_samples=bad_samples, notices=self.reader.notices())
        slots = self.slots[worker.id] if worker and self.slots else None
        slot = slots.take(bytes_of(wanted)) if slots else None
        if worker is None or slots is None or slot is None:
            return extra(collate(images, waves, ids))
        batch = extra(collate(images, waves, ids, slots.tensors(slot, wanted)))
        nothing = torch.empty(0)
        return SharedBatch(worker.id, slot, wanted, replace(batch, images=nothing, waveforms=nothing))

    def _pair(
        self, chosen: Selection, step: int, place: int, position: int, row: int, bad_samples: list[BadSample]
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Picture [3, S, S], waveform [n] and sample number of a row: the first of its candidates that can be read.

        What cannot be read is added to `faults`; with too many of them there is no answer.
        """
        sample, caption = int(chosen.samples[row]), int(chosen.captions[row])
        for attempt in range(1, self.max_bad_samples_in_a_row + 2):
            try:
                return (*self._decoded(sample, caption, position), sample)
            except UnreadableSampleError as error:
                key, shard = self.reader.describe(sample)
                bad_samples.append(BadSample(key, shard, " ".join(str(error).split()), step, row))
            if len(distinct(bad_samples)) > self.max_bad_samples:
                break
            sample, caption = self.order.replacement(step, place, attempt)
        return None

    def _decoded(self, sample: int, caption: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        picture, audio = self.reader.picture(sample), self.reader.audio(caption)
        try:
            image = decode_picture(picture, self.image_size, MAX_PIXELS, self.resize)
            return image, self._crop(decode_audio(audio), position)
        except UserError as error:  # of the sample, while those of reading are of the shard
            raise UnreadableSampleError(str(error)) from None

    def _crop(self, wave: np.ndarray, position: int) -> np.ndarray:
        spare = len(wave) - self.max_samples
        if spare <= 0:
            return wave
        start = int(np.random.Generator(np.random.Philox(key=[self.order.seed, position])).integers(spare + 1))
        return wave[start : start + self.max_samples]


def layout(images: list[np.ndarray], waves: list[np.ndarray]) -> Layout:
    """Types and shapes of a batch's pictures and waveforms."""
    longest = max(len(wave) for wave in waves)
    return [(torch.uint8, (len(images), *images[0].shape)), (torch.float32, (len(waves), longest))]


def collate(
    images: list[np.ndarray], waves: list[np.ndarray], samples: list[int], memory: list[torch.Tensor] | None = None
) -> Batch:
    """Stack pictures [3, S, S] and pad waveforms [n] into a `Batch`.

    Args:
        images: uint8.
        waves: float32.
        samples: their numbers.
        memory: tensors of this `layout` to write into; None: new ones, which in a worker are shared with who takes the
            batch, so that it need not be copied to be sent.
    """
    make = torch.empty if get_worker_info() is None else _shared
    pictures, padded = memory or [make(shape, dtype=dtype) for dtype, shape in layout(images, waves)]
    np.stack(images, out=pictures.numpy())
    for row, wave in zip(padded.numpy(), waves, strict=True):
        row[: len(wave)], row[len(wave) :] = wave, 0
    lengths = tuple(len(wave) for wave in waves)
    return Batch(pictures, padded, torch.tensor(lengths), torch.tensor(samples), lengths)


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def open_stream(
    reader: Reader,
    order: Order,
    steps: range,
    *,
    image_size: int,
    max_seconds: float,
    micros: int,
    rank: int,
    world_size: int,
    workers: int,
    pin: bool = False,
    resize: Resize = "crop",
    timeout: float = 600.0,
    max_bad_samples: int = 1000,
    max_bad_samples_in_a_row: int = 50,
    report: Callable[[str], object] = print,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the given steps, in order.

    Args:
        reader: The data sets that the order numbers.
        order: The global batches.
        steps: Global steps to serve; a resumed run passes the steps that remain.
        image_size: Side of the decoded pictures in pixels.
        max_seconds: Longest speech; the rest is cropped at random, the same on every repetition of the run.
        micros: Micro-batches a step.
        rank: This rank.
        world_size: Number of ranks.
        workers: Worker processes; 0 decodes in this process.
        pin: Pin the batches' memory.
        resize: How pictures become squares (see `decode_picture`).
        timeout: Seconds that a batch may take from worker processes.
        max_faults: Samples that may be bad: they cannot be read and are replaced, in every pass.
        max_faults_in_a_row: Times in a row that a sample may be replaced, with none between that can be read.
        report: Takes a line for the user.

    Raises:
        UserError: A shard is missing or has not the manifest's size, or too many samples cannot be read.
        TransientError: A worker was killed or hangs, or a disk or network does not answer.
    """
    max_samples, limits = int(max_seconds * SAMPLE_RATE), (max_bad_samples, max_bad_samples_in_a_row)
    rows = order.batch_size // (micros * world_size)
    largest: Layout = [(torch.uint8, (rows, 3, image_size, image_size)), (torch.float32, (rows, max_samples))]
    # Two more than are under way: one that is worked on and one that waits to be. Pinning copies a batch anyway.
    slots = tuple(SharedBuffers(AHEAD + 2, bytes_of(largest)) for _ in range(0 if pin else workers))
    dataset = MicroBatches(reader, order, image_size, max_samples, micros, rank, world_size, *limits, slots, resize)
    numbers = range(steps.start * micros, steps.stop * micros)
    counter = BadSampleCounter(max_bad_samples, max_bad_samples_in_a_row, report)
    told: set[str] = set()
    if warning := _small_cache(dataset):
        report(warning)
    for batch in _batches(dataset, numbers, workers, pin, timeout):
        if isinstance(batch, UserError):
            raise batch
        if isinstance(batch, list):
            counter.add(batch, batch[-1].row + 1)
            raise AssertionError("faults that are too many are not too many")
        for notice in batch.notices:
            if notice not in told:
                told.add(notice)
                report(notice)
        counter.add(batch.bad_samples, len(batch.ids))
        yield batch


def _batches(
    dataset: MicroBatches, numbers: range, workers: int, pin: bool, timeout: float
) -> Iterator[Batch | UserError | list[BadSample]]:
    # DataLoader's handler of SIGCHLD would raise the death of a worker in the middle of whatever runs at that moment;
    # here it is noticed where a batch is waited for.
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    iterator: Any = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin,
            timeout=_POLL if workers else 0,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=_begin_worker,
            multiprocessing_context="fork" if workers else None,  # the slots are inherited
        )
    )
    if main:
        signal.signal(signal.SIGCHLD, before)
    processes: list[BaseProcess] = list(getattr(iterator, "_workers", []))
    # An exception that nobody catches keeps the stream alive until the interpreter ends. multiprocessing would then
    # wait for workers that are deaf to its SIGTERM, so they end before it; and a generator's end is later still.
    end_once = cache(partial(_end, iterator, processes))
    atexit.register(end_once)
    try:
        for _ in numbers:
            loaded = _next(iterator, processes, timeout)
            yield loaded.open(dataset.slots) if isinstance(loaded, SharedBatch) else loaded
    finally:
        end_once()
        atexit.unregister(end_once)


def _next(iterator: Iterator[Loaded], workers: list[BaseProcess], timeout: float) -> Loaded:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return next(iterator)
        except Exception as error:
            dead = [worker for worker in workers if worker.exitcode is not None]
            if dead:
                raise _worker_death_error(dead[0]) from None
            # DataLoader's own limit is `_POLL`, after which it can be asked again for the same batch.
            if not (isinstance(error, RuntimeError) and "timed out" in str(error)):
                raise
            if time.monotonic() > deadline:
                pids = ", ".join(str(worker.pid) for worker in workers)
                raise TransientError(
                    f"no batch came from the loader's workers (pid {pids}) in {timeout:g} s: a disk or network that "
                    "does not answer, or too few workers; look there, or raise --data.timeout"
                ) from None


def _worker_death_error(worker: BaseProcess) -> UserError:
    code = worker.exitcode or 0
    if code >= 0:
        return UserError(f"loader worker (pid {worker.pid}) ended with exit code {code}; its output says why")
    name = signal.Signals(-code).name
    causes = {
        "SIGKILL": "most likely the memory ran out; take fewer with --data.workers",
        "SIGBUS": "most likely shared memory (/dev/shm) ran out; make it larger, or take fewer with --data.workers",
    }
    return TransientError(
        f"loader worker (pid {worker.pid}) was killed by {name}: {causes.get(name, 'look at the log of the machine')}"
    )


def _end(iterator: Any, workers: list[BaseProcess]) -> None:
    """Stop the workers; one that works on, or is stuck, is killed: it holds nothing that anyone needs."""

    def kill() -> None:
        for worker in workers:
            worker.kill()

    if not workers:
        return
    if any(worker.exitcode is not None for worker in workers) and hasattr(iterator, "_pin_memory_thread"):
        # What a killed worker was writing stays half written, and the shutdown would wait for who reads it.
        iterator._shutdown = True
    else:
        killer = threading.Timer(3.0, kill)
        killer.start()
        getattr(iterator, "_shutdown_workers", kill)()
        killer.cancel()
    kill()
    for worker in workers:
        worker.join()


def _small_cache(dataset: MicroBatches) -> str | None:
    """Say so if the cache cannot hold the windows that this rank reads, of each source and lane, and the next ones."""
    reader, order = dataset.reader, dataset.order
    places = rank_slice(order.batch_size, 0, dataset.micros, dataset.rank, dataset.world_size, order.shard_groups)
    shard_groups = len(np.unique(places // (order.batch_size // order.shard_groups)))
    shards = order.shuffle_shards * shard_groups * len(order.sources)
    need = 2 * shards * reader.largest_shard
    if not reader.cached or reader.cache is None or reader.cache.bound >= need:
        return None
    return (
        f"--data.cache_gb {reader.cache.bound / 1e9:g} is less than two windows of {shards} shards, "
        f"{need / 1e9:.3g} GB: shards will be fetched again and again; raise it, or lower --data.shuffle_shards"
    )


def _prefetch(reader: Reader, order: Order, step: int, places: np.ndarray) -> None:
    """Have the shards fetched that the batch half a window later reads, if this is a worker and they are remote."""
    if not reader.cached or get_worker_info() is None:
        return
    shards = sum(len(source.count) for source in order.sources)
    steps_per_window = order.steps_per_epoch * order.shuffle_shards * order.shard_groups * len(order.sources) / shards
    later = order.batch(step + max(1, int(steps_per_window / 2))).part(places)
    with suppress(queue.Full):
        _fetcher(reader, os.getpid()).put_nowait(later.samples)


@cache
def _fetcher(reader: Reader, _: int) -> "queue.Queue[np.ndarray]":
    """Start a thread of this process that fetches the shards of what it is given."""
    wanted: queue.Queue[np.ndarray] = queue.Queue(maxsize=1)

    def fetch() -> None:
        while True:
            samples = wanted.get()
            with suppress(UserError):  # it will be met again where the shard is read
                reader.prefetch(samples)

    threading.Thread(target=fetch, daemon=True).start()
    return wanted


def _begin_worker(_: int) -> None:
    """A worker must outlive the signals that ask the trainer to save, and end with the trainer, however that ends."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # The worker may wait in a write that no one will read any more, so it is not asked to end.
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
