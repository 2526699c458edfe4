"""The stream of batches: bytes at known offsets of the shards, decoded in worker processes.

    order.batch(t) -> sample and caption numbers -> pread from the tar -> decode -> pad -> Batch

A worker makes whole batches; the stream yields them in order whatever the number of workers.
"""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shards.audio import SAMPLE_RATE, decode_audio
from shards.errors import UserError
from shards.manifest import Manifest
from shards.order import Order, part_of
from shards.picture import decode_picture


@dataclass
class Batch:
    """Speech-image pairs of one rank.

    Attributes:
        images: uint8 [B, 3, S, S].
        waveforms: float32 [B, T], 16 kHz, zero-padded.
        lengths: int64 [B], samples of each waveform.
        ids: int64 [B], sample numbers: the identity of the picture.
    """

    images: torch.Tensor
    waveforms: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move to a device without waiting for the copy."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> "Batch":
        """Pin, so that copies to the device overlap with compute; DataLoader calls this."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


class Reader:
    """Indexed reads from local shards: one `pread` a member, no tar parsing."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: dict[int, int] = {}
        self._shard_of_caption: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "_files": {}, "_shard_of_caption": None}

    def picture(self, sample: int) -> bytes:
        """Read the JPEG of a sample."""
        m = self.manifest
        return self._read(int(m.shard[sample]), int(m.image_offset[sample]), int(m.image_bytes[sample]))

    def audio(self, caption: int) -> bytes:
        """Read the encoded audio of a caption row."""
        m = self.manifest
        if self._shard_of_caption is None:
            self._shard_of_caption = np.repeat(m.shard, np.diff(m.first_caption))
        shard = int(self._shard_of_caption[caption])
        return self._read(shard, int(m.audio_offset[caption]), int(m.audio_bytes[caption]))

    def meta(self, sample: int) -> dict[str, Any]:
        """Read the JSON of a sample: image id, split, captions."""
        m = self.manifest
        return json.loads(self._read(int(m.shard[sample]), int(m.meta_offset[sample]), int(m.meta_bytes[sample])))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._open(shard), size, offset)
        if len(data) != size:
            name = self.manifest.folder / self.manifest.shards[shard].name
            raise UserError(f"{name} is shorter than its manifest says: make the shards again")
        return data

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            path = self.manifest.folder / self.manifest.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"cannot open shard {path}: {error.strerror}; make the shards again") from error
        return self._files[shard]


@dataclass(frozen=True)
class MicroBatches(Dataset[Batch | UserError]):
    """The micro-batches of one rank, by number: `step * micros + micro`."""

    reader: Reader
    order: Order
    image_size: int
    max_samples: int  # longer captions are cropped at random
    micros: int
    rank: int
    world_size: int

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._load(number)
        except UserError as error:  # travels as a value: DataLoader would wrap it in its own traceback
            return error

    def _load(self, number: int) -> Batch:
        step, micro = divmod(number, self.micros)
        part = part_of(self.order.batch_size, micro, self.micros, self.rank, self.world_size)
        samples, captions, positions = (column[part] for column in self.order.batch(step))
        images = [decode_picture(self.reader.picture(int(s)), self.image_size) for s in samples]
        waves = [self._waveform(int(c), int(p)) for c, p in zip(captions, positions, strict=True)]
        return collate(images, waves, samples)

    def _waveform(self, caption: int, position: int) -> np.ndarray:
        wave = decode_audio(self.reader.audio(caption))
        spare = len(wave) - self.max_samples
        if spare <= 0:
            return wave
        start = int(np.random.Generator(np.random.Philox(key=[self.order.seed, position])).integers(spare + 1))
        return wave[start : start + self.max_samples]


def collate(images: list[np.ndarray], waves: list[np.ndarray], samples: np.ndarray) -> Batch:
    """Stack pictures [3, S, S] and pad waveforms [n] into a `Batch`."""
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = torch.zeros(len(waves), int(lengths.max()))
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    return Batch(torch.from_numpy(np.stack(images)), padded, lengths, torch.from_numpy(np.ascontiguousarray(samples)))


def open_stream(
    manifest: Manifest,
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
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the given steps, in order.

    Args:
        manifest: The shards.
        order: The global batches.
        steps: Global steps to serve; a resumed run passes the steps that remain.
        image_size: Side of the decoded pictures in pixels.
        max_seconds: Longest speech; the rest is cropped at random, the same on every repetition of the run.
        micros: Micro-batches a step.
        rank: This rank.
        world_size: Number of ranks.
        workers: Worker processes; 0 decodes in this process.
        pin: Pin the batches' memory.

    Raises:
        UserError: A shard is missing, short, or holds a sample that cannot be decoded.
    """
    dataset = MicroBatches(
        Reader(manifest), order, image_size, int(max_seconds * SAMPLE_RATE), micros, rank, world_size
    )
    numbers = range(steps.start * micros, steps.stop * micros)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _ignore_signals(_: int) -> None:
    """A worker must outlive the signals that ask the trainer to save; it ends with its parent."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
