"""Other loaders on the same pictures and captions, each used as documented unless its function states otherwise.

Each function returns an iterator of batches with the `images`, `waveforms`, `lengths` and `ids` of
`shards.reading.dataset.Batch`. All use this project's codecs (`decode_picture`, `decode_audio`) and padding.
"""

import io
import json
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CAPTIONS, PER_SHARD

from shards.corpora.item import Item
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture, read_picture
from shards.reading.dataset import Batch
from shards.reading.reader import Reader

SHUFFLE_BUFFER = 1000  # samples
PREFETCH = 4  # batches per worker, as in `shards.reading.dataset`


def webdataset_docs(urls: list[str], size: int, batch: int, workers: int, epochs: int) -> Iterator[Batch]:
    """Load with webdataset as documented: `decode` decodes all fields of a sample, a function selects from them."""
    import webdataset as wds
    from PIL import Image

    def audio(name: str, data: bytes) -> np.ndarray | None:  # webdataset's default, torchaudio, is slower
        return decode_audio(data) if name.endswith("flac") else None

    def pair(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
        image = sample["jpg"]
        short = min(image.size)
        wide, high = size * image.width // short, size * image.height // short  # as in `decode_picture`
        left, top = (wide - size) // 2, (high - size) // 2
        scale_x, scale_y = image.width / wide, image.height / high
        box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
        square = image.resize((size, size), Image.Resampling.BICUBIC, box)
        wave = sample[f"{random.randrange(CAPTIONS)}.flac"]
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), wave, int(sample["__key__"])

    data = wds.WebDataset(urls, shardshuffle=100).shuffle(SHUFFLE_BUFFER).decode("pil", audio).map(pair)
    data = data.batched(batch, collation_fn=_collate).repeat(epochs)
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))


def webdataset_best(
    urls: list[str], size: int, batch: int, workers: int, epochs: int = 1, skip: int = 0
) -> Iterator[Batch]:
    """Load with webdataset at its fastest: only the picture and the selected caption of a sample are decoded.

    Args:
        urls: Shards, at least one per worker.
        size: Side of the pictures in pixels.
        batch: Pairs per batch.
        workers: Number of worker processes.
        epochs: Number of times that the shards are read.
        skip: Samples to skip at the start; they are read and shuffled, to keep the order, but not decoded.
    """
    import webdataset as wds

    def pair(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
        caption = decode_audio(sample[f"{random.randrange(CAPTIONS)}.flac"])
        return decode_picture(sample["jpg"], size), caption, int(sample["__key__"])

    data = wds.WebDataset(urls, shardshuffle=len(urls), select_files=_is_media).shuffle(SHUFFLE_BUFFER)
    data = data.slice(skip // workers, None).map(pair).batched(batch, collation_fn=_collate).repeat(epochs)
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH))


def _is_media(name: str) -> bool:
    return not name.endswith(".json")


def mosaicml_streaming(
    folder: Path, manifest: Manifest, size: int, batch: int, workers: int, epochs: int
) -> Iterator[Batch]:
    """Load with mosaicml-streaming, from a folder in its own format with the same encoded bytes.

    Raises:
        ImportError: The package is not installed.
    """
    _stub_torchvision()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    captions = [f"caption{k}" for k in range(CAPTIONS)]
    if not (folder / "index.json").exists():
        columns = {"id": "int", "picture": "bytes", **dict.fromkeys(captions, "bytes")}
        reader = Reader(manifest)
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for n in range(len(manifest.key)):
                audio = [reader.audio(row) for row in manifest.captions(n)]
                writer.write({"id": n, "picture": reader.picture(n), **dict(zip(captions, audio, strict=True))})

    class Pairs(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray, int]:
            sample = super().__getitem__(index)
            caption = decode_audio(sample[captions[random.randrange(CAPTIONS)]])
            return decode_picture(sample["picture"], size), caption, sample["id"]

    clean_stale_shared_memory()
    total = epochs * len(manifest.key)
    data = Pairs(local=str(folder), shuffle=True, batch_size=batch, epoch_size=total, num_canonical_nodes=1)
    return iter(DataLoader(data, batch, num_workers=workers, collate_fn=_collate, prefetch_factor=PREFETCH))


def _stub_torchvision() -> None:
    # mosaicml-streaming imports torchvision for datasets that are not used here; if it is not installed, stub modules
    # replace it. transformers, which mosaicml-streaming also imports, checks for torchvision, so it is imported first.
    try:
        import torchvision  # noqa: F401
    except ImportError:
        import transformers.feature_extraction_utils  # noqa: F401

        contents: dict[str, dict[str, Any]] = {"": {}, ".datasets": {"VisionDataset": object}, ".transforms": {}}
        contents[".transforms.functional"] = {"to_tensor": None}
        for name, content in contents.items():
            stub = types.ModuleType(f"torchvision{name}")
            vars(stub).update(content)
            sys.modules.setdefault(stub.__name__, stub)


def lhotse_shar(folder: Path, manifest: Manifest, size: int, batch: int, workers: int, epochs: int) -> Iterator[Batch]:
    """Load with lhotse's Shar: each cut has a picture and only one caption, since Shar reads whole tar files.

    Raises:
        ImportError: The package is not installed.
    """
    from lhotse import CutSet
    from lhotse.dataset import DynamicCutSampler
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper
    from torch.utils.data import DataLoader, Dataset

    if not (folder / "done").exists():
        _write_shar(folder, manifest)

    class Pairs(Dataset[Batch]):
        def __getitem__(self, cuts: Any) -> Batch:
            return _collate([_pair_of_cut(cut, size) for cut in cuts])

    fields = {name: sorted(map(str, folder.glob(f"{name}.*"))) for name in ("cuts", "recording", "picture")}
    cuts = CutSet.from_shar(fields=fields, split_for_dataloading=True, shuffle_shards=True)
    cuts = cuts.repeat(epochs, preserve_id=True)
    sampler = DynamicCutSampler(
        cuts, max_cuts=batch, shuffle=True, shuffle_buffer_size=SHUFFLE_BUFFER, rank=0, world_size=1, drop_last=False
    )
    data = IterableDatasetWrapper(Pairs(), sampler)
    return iter(DataLoader(data, None, num_workers=workers, prefetch_factor=PREFETCH))


def _pair_of_cut(cut: Any, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    picture = decode_picture(cut.load_picture().tobytes(), size)
    return picture, decode_audio(cut.recording.sources[0].source), int(cut.id)


def _write_shar(folder: Path, manifest: Manifest) -> None:
    from lhotse import MonoCut, Recording
    from lhotse.array import Array
    from lhotse.shar import SharWriter

    reader = Reader(manifest)
    folder.mkdir(exist_ok=True)
    with SharWriter(folder, {"recording": "flac", "picture": "numpy"}, shard_size=PER_SHARD) as writer:
        for n in range(len(manifest.key)):
            name = f"{n:06d}"
            stored = io.BytesIO()
            np.save(stored, np.frombuffer(reader.picture(n), np.uint8))
            count = int(manifest.image_bytes[n])
            picture = Array("memory_npy", "", stored.getvalue(), [count])
            recording = Recording.from_bytes(reader.audio(int(manifest.first_caption[n])), name)
            writer.write(MonoCut(name, 0.0, recording.duration, 0, recording=recording, custom={"picture": picture}))
    (folder / "done").touch()


class _ShuffledRows:
    """Iterable over rows of the manifest, reshuffled in each epoch."""

    def __init__(self, pictures: int, epochs: int) -> None:
        self.pictures, self.epochs = pictures, epochs

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.epochs):
            yield from random.sample(range(self.pictures), self.pictures)


class _PairDecoder:
    """Callable that reads and decodes a row's picture and one of its captions."""

    def __init__(self, manifest: Manifest, size: int) -> None:
        self.manifest, self.reader, self.size = manifest, Reader(manifest), size

    def __call__(self, row: int) -> tuple[np.ndarray, np.ndarray, int]:
        caption = random.choice(self.manifest.captions(row))
        return decode_picture(self.reader.picture(row), self.size), decode_audio(self.reader.audio(caption)), row


def spdl(manifest: Manifest, size: int, batch: int, workers: int, epochs: int) -> Iterator[Batch]:
    """Load with SPDL's thread pipeline around the same codecs, in one subprocess, as its guide recommends.

    Raises:
        ImportError: The package is not installed.
    """
    from spdl.pipeline import PipelineBuilder, run_pipeline_in_subprocess

    pipeline = PipelineBuilder().add_source(_ShuffledRows(len(manifest.key), epochs))
    pipeline = pipeline.pipe(_PairDecoder(manifest, size), concurrency=workers).aggregate(batch, drop_last=True)
    pipeline = pipeline.pipe(_collate).add_sink(PREFETCH)
    return iter(run_pipeline_in_subprocess(pipeline.get_config(), num_threads=workers + 1))


def webdataset_writer(items: list[Item], folder: Path, jobs: int) -> None:
    """Write items with webdataset's ShardWriter, fed by a process pool that converts them as make_shards does."""
    import multiprocessing

    import webdataset as wds

    folder.mkdir()
    with (
        multiprocessing.Pool(jobs) as pool,
        wds.ShardWriter(str(folder / "train-%06d.tar"), maxcount=PER_SHARD, verbose=0) as writer,
    ):
        for sample in pool.imap(_convert, items, chunksize=4):
            writer.write(sample)
        pool.close()
        pool.join()


def _convert(item: Item) -> dict[str, Any]:
    from shards.media.audio import encode_audio, read_audio

    waves = [read_audio(caption.audio, 30.0) for caption in item.captions]  # type: ignore[arg-type]
    caption_records = [
        {"utterance": c.utterance, "duration": len(w) / SAMPLE_RATE} for c, w in zip(item.captions, waves, strict=True)
    ]
    meta = {"image_id": item.image_id, "split": item.split, "captions": caption_records}
    audio = {f"{k}.flac": encode_audio(wave, "flac") for k, wave in enumerate(waves)}
    picture = read_picture(item.picture, 256, 90)  # type: ignore[arg-type]
    return {"__key__": item.image_id, "json": json.dumps(meta).encode(), "jpg": picture, **audio}


def _collate(pairs: list[tuple[np.ndarray, np.ndarray, int]]) -> Batch:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import default_collate

    images, waves, ids = zip(*pairs, strict=True)
    stacked = default_collate([torch.from_numpy(image) for image in images])  # in a worker: directly in shared memory
    padded = pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    return Batch(stacked, padded, torch.tensor([len(wave) for wave in waves]), torch.tensor(ids))
