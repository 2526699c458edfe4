"""A small intact folder of shards, and ways to damage it, with or without correct checksums."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from shards import files, manifest
from shards.corpora.item import Caption, Item
from shards.media.audio import SAMPLE_RATE
from shards.writing.writer import Format, write_shards
from tests.shards.media.noise import drawn, spoken

SPLITS = {"train": 7, "dev": 2, "test": 2}
PREFIX = {"train": "t", "dev": "d", "test": "e"}
SHARD = "train-000001.tar"  # holds t3, t4, t5


def silent() -> tuple[np.ndarray, int]:
    return np.zeros((1, 3000), np.float32), SAMPLE_RATE


def item(name: str, split: str, seed: int, text: str = "it is {}", **how: Any) -> Item:
    captions = tuple(Caption(f"{name}-{k}", partial(spoken, 7 * seed + k), text.format(k), "v") for k in range(2))
    return Item(name, split, partial(drawn, seed), captions, **how)


def corpus() -> list[Item]:
    names = [(f"{PREFIX[split]}{n}", split) for split, count in SPLITS.items() for n in range(count)]
    return [item(name, split, seed, twin="t0" if name == "t1" else None) for seed, (name, split) in enumerate(names)]


def write(folder: Path, items: Sequence[Item] | None = None, **how: Any) -> Path:
    arguments = {"corpus": "noise"}
    write_shards(items or corpus(), folder, "noise", Format(samples_per_shard=3, **how), arguments)
    return folder


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change bytes of a file in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def header(data: bytearray, offset: int, **fields: bytes) -> None:
    """Set name, size or type in the header of the member whose data is at `offset`, and its checksum."""
    start = offset - 512
    for name, value in fields.items():
        at, length = {"name": (0, 100), "size": (124, 12), "type": (156, 1)}[name]
        data[start + at : start + at + length] = value.ljust(length, b"\0")
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


def sign(folder: Path) -> None:
    """Write the shards' sizes and checksums into the manifest, as they are now."""
    head = json.loads((folder / manifest.MANIFEST).read_bytes())
    for shard in head["shards"]:
        shard["bytes"] = (folder / shard["name"]).stat().st_size
        shard["sha256"] = files.file_sha256(folder / shard["name"])
    manifest.sign(head)
    (folder / manifest.MANIFEST).write_bytes(manifest.encoded(head))


def older(folder: Path) -> None:
    """Make the manifest one of before it had checksums of the report and of itself."""
    head = json.loads((folder / manifest.MANIFEST).read_bytes())
    del head["report"], head["sha256"]
    (folder / manifest.MANIFEST).write_bytes(manifest.encoded(head))


def resave(folder: Path, **columns: Any) -> None:
    """Write the index anew with other columns."""
    m = manifest.load(folder)
    every = {name: columns.get(name, getattr(m, name)) for name in manifest.COLUMNS}
    manifest.save(folder, m.corpus, m.shards, m.splits, every, m.arguments, m.report)


def replace(folder: Path, key: str, part: int, data: bytes, **columns: Any) -> None:
    """Put other data in place of a member (0 the JSON, 1 the picture, then audio files); the rest is adapted."""
    m = manifest.load(folder)
    s = m.key.tolist().index(key.encode())
    shard = int(m.shard[s])
    path = folder / m.shards[shard].name
    offsets = [m.meta_offset, m.image_offset, m.audio_offset]
    row = int(m.first_caption[s]) + part - 2 if part > 1 else s
    kind = min(part, 2)
    wanted = int(offsets[kind][row])
    moved, out = {}, io.BytesIO()
    with tarfile.open(path) as tar, tarfile.TarFile("", "w", out, format=tarfile.USTAR_FORMAT) as new:
        for info in tar.getmembers():
            stored = data if info.offset_data == wanted else tar.extractfile(info).read()
            info.size = len(stored)
            moved[info.offset_data] = (out.tell() + 512, len(stored))
            new.addfile(info, io.BytesIO(stored))
    path.write_bytes(out.getvalue())
    fresh = {}
    owners = {"meta": m.shard, "image": m.shard, "audio": np.repeat(m.shard, np.diff(m.first_caption))}
    for name, owner in owners.items():
        pairs = np.stack([getattr(m, f"{name}_offset"), getattr(m, f"{name}_bytes")], axis=1)
        pairs[owner == shard] = [moved[offset] for offset in pairs[owner == shard, 0].tolist()]
        fresh[f"{name}_offset"], fresh[f"{name}_bytes"] = pairs.T
    infos = list(m.shards)
    infos[shard] = manifest.ShardInfo(
        **asdict(infos[shard]) | {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
    )
    every = {name: columns.get(name, fresh.get(name, getattr(m, name))) for name in manifest.COLUMNS}
    manifest.save(folder, m.corpus, infos, m.splits, every, m.arguments, m.report)


def member(folder: Path, key: str, part: int) -> bytes:
    m = manifest.load(folder)
    s = m.key.tolist().index(key.encode())
    row = int(m.first_caption[s]) + part - 2 if part > 1 else s
    name = ("meta", "image", "audio")[min(part, 2)]
    offset, size = int(getattr(m, f"{name}_offset")[row]), int(getattr(m, f"{name}_bytes")[row])
    return (folder / m.shards[int(m.shard[s])].name).read_bytes()[offset : offset + size]


def bomb(jpeg: bytes, side: int = 30_000) -> bytes:
    """A small JPEG whose header claims `side` x `side` pixels."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + side.to_bytes(2, "big") * 2 + jpeg[at + 4 :]


def recording(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1, amplitude: float = 0.0) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, format="FLAC", subtype="PCM_16") as file:
        for start in range(0, round(seconds * rate), 10 * rate):
            count = min(10 * rate, round(seconds * rate) - start)
            file.write(np.full((count, channels), amplitude, np.float32))
    return buffer.getvalue()


def _turn_one_bit(path: Path, chance: random.Random) -> None:
    edit(path, lambda data: data.__setitem__(at := chance.randrange(len(data)), data[at] ^ 1 << chance.randrange(8)))


def _truncate(path: Path, chance: random.Random) -> None:
    edit(path, lambda data: data.__delitem__(slice(chance.randrange(len(data)), None)))


def _cut_out(path: Path, chance: random.Random) -> None:
    start = chance.randrange(path.stat().st_size)
    edit(path, lambda data: data.__delitem__(slice(start, start + chance.randrange(1, 600))))


def _insert(path: Path, chance: random.Random) -> None:
    start = chance.randrange(path.stat().st_size + 1)
    edit(path, lambda data: data.__setitem__(slice(start, start), chance.randbytes(chance.randrange(1, 600))))


def _overwrite(path: Path, chance: random.Random) -> None:
    """Put random bytes, of which not all can be those that are there, in place of a stretch."""
    start = chance.randrange(path.stat().st_size - 16)
    edit(path, lambda data: data.__setitem__(slice(start, start + 16), chance.randbytes(16)))


def _make_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_dangling(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


# What may become of any file: each is called with its path and the source of chance.
DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit turned": _turn_one_bit,
    "truncated": _truncate,
    "cut out": _cut_out,
    "inserted": _insert,
    "overwritten": _overwrite,
    "lost": lambda path, chance: path.unlink(),
    "emptied": lambda path, chance: path.write_bytes(b""),
    "a folder": _make_folder,
    "a pipe": _make_pipe,
    "a dangling link": _make_dangling,
}
