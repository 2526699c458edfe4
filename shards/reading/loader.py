"""Batches from worker processes, in order whatever the number of workers.

A worker makes complete micro-batches. The batches are a function of the order and of this rank's indices alone, so that
a restart with another number of ranks or workers reads the same bytes.
"""

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader

from shards.augment.settings import Augment
from shards.errors import TransientError, UserError
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import Resize
from shards.reading.bad_samples import BadSample, BadSampleCounter
from shards.reading.dataset import Batch, Loaded, MicroBatches
from shards.reading.order import Order, rank_slice
from shards.reading.reader import Reader
from shards.reading.shared_buffers import Layout, SharedBatch, SharedBuffers, bytes_of
from shards.reading.torch_workers import stop_workers, worker_processes

logger = logging.getLogger(__name__)

PREFETCHED = 4  # batches that each worker makes in advance
_POLL = 2.0  # seconds between checks that the workers are alive


def load_batches(
    reader: Reader,
    order: Order,
    steps: range,
    *,
    image_size: int,
    max_seconds: float,
    accumulation: int,
    rank: int,
    world_size: int,
    workers: int,
    pin: bool = False,
    resize: Resize = "crop",
    augment: Augment | None = None,
    timeout: float = 600.0,
    max_bad_samples: int = 1000,
    max_bad_samples_in_a_row: int = 50,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the given steps, in order.

    Args:
        reader: The data sets that the order numbers.
        order: The global batches.
        steps: Global steps to read; a resumed run passes the steps that remain.
        image_size: Side of the decoded pictures in pixels.
        max_seconds: Longer utterances are cropped at random, the same in every repetition of the run.
        accumulation: Micro-batches per step.
        rank: This rank.
        world_size: Number of ranks.
        workers: Worker processes; 0 decodes in this process.
        pin: Pin the batches' memory.
        resize: How pictures become squares (see `decode_picture`).
        augment: Augmentation, a function of the order's seed and of the position in it; None: none.
        timeout: Seconds to wait for a batch of the worker processes.
        max_bad_samples: Largest number of unreadable samples; they are replaced in every epoch.
        max_bad_samples_in_a_row: Largest number of unreadable samples in a row.

    Raises:
        UserError: A shard is missing or differs in size from the manifest, or too many samples cannot be read.
        TransientError: A worker was killed or hangs, or a disk or network does not respond.
    """
    max_samples, limits = int(max_seconds * SAMPLE_RATE), (max_bad_samples, max_bad_samples_in_a_row)
    rows = order.batch_size // (accumulation * world_size)
    largest: Layout = [(torch.uint8, (rows, 3, image_size, image_size)), (torch.float32, (rows, max_samples))]
    # Two slots more than are prefetched: one is being consumed and one filled. Pinning copies a batch anyway.
    buffers = tuple(SharedBuffers(PREFETCHED + 2, bytes_of(largest)) for _ in range(0 if pin else workers))
    how = (resize, augment or Augment())
    dataset = MicroBatches(
        reader, order, image_size, max_samples, accumulation, rank, world_size, *limits, buffers, *how
    )
    numbers = range(steps.start * accumulation, steps.stop * accumulation)
    if warning := _small_cache_warning(dataset):
        logger.warning("%s", warning)
    counter, logged = BadSampleCounter(*limits), set[str]()
    for loaded in _batches(dataset, numbers, workers, pin, timeout):
        yield _checked(loaded, counter, logged)


def _checked(loaded: Batch | UserError | list[BadSample], counter: BadSampleCounter, logged: set[str]) -> Batch:
    """Return a batch after counting its bad samples and logging its new warnings; raise an error."""
    if isinstance(loaded, UserError):
        raise loaded
    if isinstance(loaded, list):
        counter.add(loaded, loaded[-1].row + 1)
        raise AssertionError("a micro-batch was given up although its bad samples are within the limits")
    for line in loaded.warnings:
        if line not in logged:
            logged.add(line)
            logger.warning("%s", line)
    counter.add(loaded.bad_samples, len(loaded.ids))
    return loaded


def _batches(
    dataset: MicroBatches, numbers: range, workers: int, pin: bool, timeout: float
) -> Iterator[Batch | UserError | list[BadSample]]:
    # DataLoader's SIGCHLD handler raises the death of a worker at an arbitrary point of the program; here it is
    # detected while waiting for a batch.
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    iterator = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin,
            timeout=_POLL if workers else 0,
            prefetch_factor=PREFETCHED if workers else None,
            worker_init_fn=_init_worker,
            multiprocessing_context="fork" if workers else None,  # the shared buffers are inherited
        )
    )
    if main:
        signal.signal(signal.SIGCHLD, before)
    processes = worker_processes(iterator)
    # An uncaught exception keeps this generator alive until the interpreter exits, where multiprocessing waits for
    # workers, which ignore its SIGTERM. The handler registered here runs before.
    stop_once = cache(partial(stop_workers, iterator, processes))
    atexit.register(stop_once)
    try:
        for _ in numbers:
            loaded = _next(iterator, processes, timeout)
            yield loaded.open(dataset.buffers) if isinstance(loaded, SharedBatch) else loaded
    finally:
        stop_once()
        atexit.unregister(stop_once)


def _next(iterator: Iterator[Loaded], workers: list[BaseProcess], timeout: float) -> Loaded:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return next(iterator)
        except Exception as error:
            dead = [worker for worker in workers if worker.exitcode is not None]
            if dead:
                raise _worker_death_error(dead[0]) from None
            # DataLoader's own timeout is `_POLL`, after which `next` can be called again for the same batch.
            if not (isinstance(error, RuntimeError) and "timed out" in str(error)):
                raise
            if time.monotonic() > deadline:
                pids = ", ".join(str(worker.pid) for worker in workers)
                raise TransientError(
                    f"no batch came from the loader's workers (pid {pids}) in {timeout:g} s: a disk or network does "
                    "not respond, or there are too few workers; check these, or raise --data.timeout"
                ) from None


def _worker_death_error(worker: BaseProcess) -> UserError:
    code = worker.exitcode or 0
    if code >= 0:
        return UserError(f"loader worker (pid {worker.pid}) ended with exit code {code}; see its output")
    name = signal.Signals(-code).name
    causes = {
        "SIGKILL": "most likely the memory ran out; take fewer with --data.workers",
        "SIGBUS": "most likely shared memory (/dev/shm) ran out; make it larger, or take fewer with --data.workers",
    }
    return TransientError(
        f"loader worker (pid {worker.pid}) was killed by {name}: {causes.get(name, 'see the log of the machine')}"
    )


def _small_cache_warning(dataset: MicroBatches) -> str | None:
    """Warn if the cache cannot hold two shuffle blocks of every source and shard group that this rank reads."""
    reader, order = dataset.reader, dataset.order
    indices = rank_slice(
        order.batch_size, 0, dataset.accumulation, dataset.rank, dataset.world_size, order.shard_groups
    )
    shard_groups = len(np.unique(indices // (order.batch_size // order.shard_groups)))
    shards = order.shuffle_shards * shard_groups * len(order.sources)
    need = 2 * shards * reader.largest_shard
    if not reader.cached or reader.cache is None or reader.cache.bound >= need:
        return None
    return (
        f"--data.cache_gb {reader.cache.bound / 1e9:g} is less than two shuffle blocks of {shards} shards, "
        f"{need / 1e9:.3g} GB: shards will be downloaded repeatedly; raise it, or lower --data.shuffle_shards"
    )


def _init_worker(_: int) -> None:
    """Ignore the signals that make the trainer save a checkpoint, and exit when the trainer does, even if killed."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    # SIGKILL, as the worker may be blocked in a write that no process will read.
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
