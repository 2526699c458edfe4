"""The micro-batches of one rank: bytes at known offsets of the shards, decoded, cropped and padded.

    order.batch(t) -> indices of this rank -> read -> decode, augment, replace bad samples -> pad -> Batch

`shards.reading.loader` runs this in worker processes.
"""

import math
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from shards.augment.image import augment_colors, draw_crop
from shards.augment.randomness import SampleRandomness
from shards.augment.settings import Augment
from shards.augment.speech import augment_speech
from shards.errors import UserError
from shards.media.audio import decode_audio
from shards.media.picture import MAX_STORED_PIXELS as MAX_PIXELS
from shards.media.picture import Resize, decode_picture
from shards.reading.babble import Babble
from shards.reading.bad_samples import BadSample, UnreadableSampleError, distinct
from shards.reading.order import Order, Selection, rank_slice
from shards.reading.reader import Reader
from shards.reading.shared_buffers import Layout, SharedBatch, SharedBuffers, bytes_of

_TENSORS = ("images", "waveforms", "lengths", "ids")


@dataclass
class Batch:
    """Speech-image pairs of one rank."""

    images: torch.Tensor  # uint8 [B, 3, S, S]
    waveforms: torch.Tensor  # float32 [B, T], 16 kHz, zero-padded
    lengths: torch.Tensor  # int64 [B], samples of each waveform
    ids: torch.Tensor  # int64 [B], sample numbers, by which the loss knows pairs of the same picture
    # `lengths` as integers on the host, read without synchronizing with the device.
    host_lengths: tuple[int, ...] | None = None
    # Samples that could not be read and were replaced, in the order of rows.
    bad_samples: list[BadSample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # lines for the user, logged by the process that iterates

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device asynchronously."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, so that copies to the device overlap with compute; called by DataLoader."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


# What a worker returns: a batch, an error that ends the iteration, or bad samples beyond the limits.
Loaded = Batch | SharedBatch | UserError | list[BadSample]


@dataclass(frozen=True)
class MicroBatches(Dataset[Loaded]):
    """The micro-batches of one rank, by number: `step * accumulation + micro`."""

    reader: Reader
    order: Order
    image_size: int
    max_samples: int  # longer waveforms are cropped at random
    accumulation: int
    rank: int
    world_size: int
    max_bad_samples: int
    max_bad_samples_in_a_row: int
    buffers: tuple[SharedBuffers, ...] = ()  # one for each worker
    resize: Resize = "crop"
    augment: Augment = field(default_factory=Augment)

    def __getitem__(self, number: int) -> Loaded:
        try:
            return self._load(*divmod(number, self.accumulation))
        except UserError as error:  # returned: DataLoader would wrap a raised one in its own traceback
            return error

    def _load(self, step: int, micro: int) -> Batch | SharedBatch | list[BadSample]:
        size, shard_groups = self.order.batch_size, self.order.shard_groups
        indices = rank_slice(size, micro, self.accumulation, self.rank, self.world_size, shard_groups)
        chosen = self.order.batch(step).part(indices)
        _prefetch_shards(self.reader, self.order, step, indices)
        images, waves, ids = [], [], []
        bad_samples: list[BadSample] = []
        for row, (index, position) in enumerate(zip(indices.tolist(), chosen.positions.tolist(), strict=True)):
            pair = self._load_pair(chosen, step, index, position, row, bad_samples)
            if pair is None:
                return bad_samples
            image, wave, sample = pair
            images.append(image)
            waves.append(wave)
            ids.append(sample)
        return self._make_batch(images, waves, ids, bad_samples)

    def _make_batch(
        self, images: list[np.ndarray], waves: list[np.ndarray], ids: list[int], bad_samples: list[BadSample]
    ) -> Batch | SharedBatch:
        """Collate the batch; a worker does so in one of its shared slots if one is free."""
        worker, layout = get_worker_info(), layout_of(images, waves)
        with_messages = partial(replace, bad_samples=bad_samples, warnings=self.reader.take_warnings())
        buffers = self.buffers[worker.id] if worker and self.buffers else None
        slot = buffers.take(bytes_of(layout)) if buffers else None
        if worker is None or buffers is None or slot is None:
            return with_messages(collate(images, waves, ids))
        batch = with_messages(collate(images, waves, ids, buffers.tensors(slot, layout)))
        empty = torch.empty(0)
        return SharedBatch(worker.id, slot, layout, replace(batch, images=empty, waveforms=empty))

    def _load_pair(
        self, chosen: Selection, step: int, index: int, position: int, row: int, bad_samples: list[BadSample]
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Return picture [3, S, S], waveform [n] and sample number of the first candidate of a row that can be read.

        Candidates that cannot be read are appended to `bad_samples`; None if those exceed the limits.
        """
        sample, caption = int(chosen.samples[row]), int(chosen.captions[row])
        for attempt in range(1, self.max_bad_samples_in_a_row + 2):
            try:
                return (*self._decode(sample, caption, position), sample)
            except UnreadableSampleError as error:
                key, shard = self.reader.describe(sample)
                bad_samples.append(BadSample(key, shard, " ".join(str(error).split()), step, row))
            if len(distinct(bad_samples)) > self.max_bad_samples:
                break
            sample, caption = self.order.replacement(step, index, attempt)
        return None

    def _decode(self, sample: int, caption: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        picture, audio = self.reader.picture(sample), self.reader.audio(caption)
        randomness = SampleRandomness(self.order.seed, position)
        try:
            region = draw_crop(self.augment.image, randomness, self.resize)
            image = decode_picture(picture, self.image_size, MAX_PIXELS, self.resize, region)
            wave = self._crop(decode_audio(audio), position)
        except UserError as error:  # the sample is bad; errors of reading concern its shard
            raise UnreadableSampleError(str(error)) from None
        voices = partial(self._babble.voices, position, sample)
        wave = self._crop(augment_speech(wave, self.augment.speech, randomness, voices), position)
        return augment_colors(image, self.augment.image, randomness), wave

    @cached_property
    def _babble(self) -> Babble:
        return Babble(self.reader, self.order, self.max_samples)

    def _crop(self, wave: np.ndarray, position: int) -> np.ndarray:
        excess = len(wave) - self.max_samples
        if excess <= 0:
            return wave
        start = int(np.random.Generator(np.random.Philox(key=[self.order.seed, position])).integers(excess + 1))
        return wave[start : start + self.max_samples]


def layout_of(images: list[np.ndarray], waves: list[np.ndarray]) -> Layout:
    """Return types and shapes of a batch's images and padded waveforms."""
    longest = max(len(wave) for wave in waves)
    return [(torch.uint8, (len(images), *images[0].shape)), (torch.float32, (len(waves), longest))]


def collate(
    images: list[np.ndarray], waves: list[np.ndarray], samples: list[int], memory: list[torch.Tensor] | None = None
) -> Batch:
    """Stack pictures [3, S, S] and pad waveforms [n] into a `Batch`.

    Args:
        images: Arrays of uint8.
        waves: Arrays of float32.
        samples: Sample numbers.
        memory: Tensors as described by `layout_of` to write into; None: new ones. A worker allocates these in shared
            memory, so that sending the batch does not copy it.
    """
    make = torch.empty if get_worker_info() is None else _shared
    pictures, padded = memory or [make(shape, dtype=dtype) for dtype, shape in layout_of(images, waves)]
    np.stack(images, out=pictures.numpy())
    for row, wave in zip(padded.numpy(), waves, strict=True):
        row[: len(wave)], row[len(wave) :] = wave, 0
    lengths = tuple(len(wave) for wave in waves)
    return Batch(pictures, padded, torch.tensor(lengths), torch.tensor(samples), lengths)


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _prefetch_shards(reader: Reader, order: Order, step: int, indices: np.ndarray) -> None:
    """Download, from a worker, the remote shards that the batch half a shuffle block later reads."""
    if not reader.cached or get_worker_info() is None:
        return
    shards = sum(len(source.count) for source in order.sources)
    steps_per_block = order.steps_per_epoch * order.shuffle_shards * order.shard_groups * len(order.sources) / shards
    later = order.batch(step + max(1, int(steps_per_block / 2))).part(indices)
    with suppress(queue.Full):
        _fetcher(reader, os.getpid()).put_nowait(later.samples)


@cache
def _fetcher(reader: Reader, _: int) -> "queue.Queue[np.ndarray]":
    """Start a thread of this process that downloads the shards of the samples put into the returned queue."""
    requests: queue.Queue[np.ndarray] = queue.Queue(maxsize=1)

    def fetch() -> None:
        while True:
            samples = requests.get()
            with suppress(UserError):  # it is raised where the shard is read
                reader.prefetch(samples)

    threading.Thread(target=fetch, daemon=True).start()
    return requests
