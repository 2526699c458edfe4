"""Synthetic data of the benchmarks: noise with the decoding cost of photographs and speech, created once and cached.

FOLDER/
    shards/     written by make_shards; also read by webdataset
    epoch/      as many pictures as in a real corpus: symbolic links to the same shards, repeated
    originals/  pictures of 640 x 480 and WAV recordings, input of the benchmark that writes shards
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shards import manifest
from shards.corpora.item import Caption, Item
from shards.media.audio import SAMPLE_RATE, encode_audio
from shards.writing.writer import Format, write_shards

CAPTIONS = 5  # per picture
EPOCH = 113_000  # pictures in SpokenCOCO's training split
PER_SHARD = 64


def make_picture(seed: int, width: int, height: int) -> Image.Image:
    """Make a picture with roughly the detail of a photograph: multi-scale noise, weaker at finer scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side, strength in ((2, 60.0), (5, 45.0), (12, 25.0), (30, 14.0), (80, 11.0), (200, 8.0), (width, 6.0)):
        grid = rng.normal(0.0, strength, (max(2, side * height // width), side, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane)
    return Image.fromarray(np.clip(total + 120.0, 0, 255).astype(np.uint8))


def make_speech(seed: int) -> tuple[np.ndarray, int]:
    """Make 1.5 to 8 s of noise with the spectrum and syllable rate of speech.

    Returns:
        Waveform, float32 [1, n], and the sample rate.
    """
    rng = np.random.default_rng(seed)
    n = 1600 * int(np.clip(rng.normal(40.0, 10.0), 15, 80))  # a length for which the FFTs below are fast
    frequency = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    shape = 1 / (1 + (frequency / 500.0) ** 2) + 0.003
    noise = np.fft.irfft(np.fft.rfft(rng.normal(size=n)) * shape, n)
    knots = np.arange(0, n + SAMPLE_RATE, SAMPLE_RATE // 8)
    loudness = np.interp(np.arange(n), knots, rng.uniform(0.0, 1.0, len(knots)) ** 2)
    wave = 0.1 * loudness * noise / noise.std() + rng.normal(0.0, 3e-4, n)
    return wave.clip(-1, 1).astype(np.float32)[None], SAMPLE_RATE


def make_shards(folder: Path, pictures: int, jobs: int) -> Path:
    """Write the shards unless they exist."""
    if not (folder / manifest.MANIFEST).exists():
        items = [
            Item(
                f"{n:06d}", "train", partial(make_picture, n, 341, 256), tuple(_caption(n, k) for k in range(CAPTIONS))
            )
            for n in range(pictures)
        ]
        write_shards(items, folder, "benchmark", Format(samples_per_shard=PER_SHARD), {}, jobs)
    return folder


def _caption(picture: int, number: int) -> Caption:
    return Caption(f"{picture:06d}_{number}", partial(make_speech, CAPTIONS * picture + number))


def make_epoch(folder: Path, shards: Path) -> Path:
    """Link the shards repeatedly until there are at least `EPOCH` pictures, and write a manifest of all links."""
    made = manifest.load(shards)
    times, count = -(-EPOCH // len(made.key)), len(made.shards)
    if (folder / manifest.MANIFEST).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    infos = []
    for n in range(times * count):
        old = made.shards[n % count]
        infos.append(manifest.ShardInfo(f"train-{n:06d}.tar", old.bytes, old.sha256, old.samples))
        (folder / infos[-1].name).symlink_to((shards / old.name).resolve())
    columns = {name: np.concatenate([getattr(made, name)] * times) for name in manifest.COLUMNS}
    columns["shard"] = np.concatenate([made.shard + r * count for r in range(times)])
    columns["key"] = columns["image_id"] = np.array([f"{n:09d}".encode() for n in range(times * len(made.key))])
    starts = [made.first_caption[:-1] + r * len(made.duration) for r in range(times)]
    columns["first_caption"] = np.append(np.concatenate(starts), times * len(made.duration))
    manifest.save(folder, "benchmark", infos, made.splits, columns, {})
    return folder


def make_originals(folder: Path, pictures: int, times: int) -> list[Item]:
    """Write the source files of a corpus unless they exist, and return their items `times` times with distinct ids."""
    folder.mkdir(exist_ok=True)
    items = []
    for n in range(pictures):
        picture = folder / f"{n:06d}.jpg"
        recordings = [folder / f"{n:06d}_{k}.wav" for k in range(CAPTIONS)]
        if not picture.exists():
            for k, recording in enumerate(recordings):
                recording.write_bytes(encode_audio(make_speech(CAPTIONS * n + k)[0][0], "wav"))
            make_picture(n, 640, 480).save(picture, quality=92)
        captions = tuple(Caption(path.stem, path) for path in recordings)
        items += [Item(f"{r}-{n:06d}", "train", picture, captions) for r in range(times)]
    return items
