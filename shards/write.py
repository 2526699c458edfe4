"""Write a corpus as shards: planned first, then made in parallel, a tar a task, same bytes whatever the workers."""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from shards import manifest
from shards.audio import SAMPLE_RATE, Codec, encode_audio, mix_down, read_audio, resample
from shards.corpora.item import AudioSource, Item, PictureSource
from shards.errors import UserError
from shards.folder import claimed
from shards.picture import read_picture
from shards.pool import Progress, run_tasks
from shards.report import Counts, Dropped, Report

_FIRST_SPLITS = ("train", "dev", "test")
_KEY_LENGTH = 80  # a member's name has 100 bytes in a ustar header


@dataclass(frozen=True)
class Format:
    """How samples are stored."""

    samples_per_shard: int = 500
    short_side: int = 256  # pixels; larger pictures are shrunk
    quality: int = 90  # of the JPEG
    codec: Codec = "flac"
    max_seconds: float = 30.0  # longer audio is bad input
    skip_bad: bool = False  # drop what cannot be read rather than end the run


def write_shards(
    items: Sequence[Item],
    folder: Path,
    corpus: str,
    form: Format,
    arguments: Mapping[str, Any],
    jobs: int = 1,
    progress: Progress = lambda done: None,
) -> Report:
    """Write all samples, then the index, the report and, last, the manifest.

    Args:
        items: the corpus; its order within a split is the order of the shards.
        folder: empty, new, or left unfinished by an earlier run; emptied again if this run fails.
        corpus: name kept in the manifest.
        form: how samples are stored.
        arguments: JSON values kept in the manifest.
        jobs: processes.
        progress: told how many pictures were done since the last call.

    Raises:
        UserError: bad input (unless `form.skip_bad`), clashing ids, nothing to write, or a folder in use.
    """
    plans = _plan(items, folder, form)
    with claimed(folder):
        written = dict(run_tasks(_write_shard, plans, jobs, progress))
        shards = [written[name] for name in plans if written[name].samples]
        report = _report([written[name] for name in plans])
        if not shards:
            raise UserError(f"no sample is left to write: {report.dropped[0].reason}")
        report.save(folder)
        splits = list(dict.fromkeys(shard.split for shard in shards))
        infos = [_info(shard) for shard in shards]
        manifest.save(folder, corpus, infos, splits, _columns(shards, splits), arguments)
    return report


@dataclass(frozen=True)
class _Plan:
    """One shard to write."""

    path: Path
    split: str
    items: tuple[tuple[str, Item], ...]  # with their keys
    form: Format


def _plan(items: Sequence[Item], folder: Path, form: Format) -> dict[str, _Plan]:
    """Deal the items to shards, split by split."""
    _check_ids(items)
    splits: dict[str, list[tuple[str, Item]]] = {}
    for item in items:
        splits.setdefault(item.split, []).append((sample_key(item.image_id), item))
    plans = {}
    for split in sorted(splits, key=lambda name: (*(name != first for first in _FIRST_SPLITS), name)):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise UserError(f"split {split!r}: a split's name has letters, digits, _ and - only")
        rows = splits[split]
        for number, start in enumerate(range(0, len(rows), form.samples_per_shard)):
            name = f"{split}-{number:06d}.tar"
            plans[name] = _Plan(folder / name, split, tuple(rows[start : start + form.samples_per_shard]), form)
    return plans


def _check_ids(items: Sequence[Item]) -> None:
    if not items:
        raise UserError("the corpus has no samples: nothing to write")
    counts = Counter(item.image_id for item in items)
    image_id, times = counts.most_common(1)[0]
    if times > 1:
        raise UserError(f"image id {image_id} comes {times} times: an id names one picture, in one split")
    for item in items:
        if not item.captions:
            raise UserError(f"picture {item.image_id} has no captions")
        if item.twin is not None and item.twin not in counts:
            raise UserError(f"picture {item.image_id} is the twin of {item.twin}, which is not in the corpus")


def sample_key(image_id: str) -> str:
    """The image id as a tar member's name: letters, digits, _ and - only; a changed one gets a hash to stay unique."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)
    if key == image_id and 0 < len(key) <= _KEY_LENGTH:
        return key
    return f"{key[: _KEY_LENGTH - 13]}-{sha256(image_id.encode()).hexdigest()[:12]}"


@dataclass
class _Sample:
    """One written sample: where its members lie in the tar, as (offset, bytes)."""

    key: str
    image_id: str
    twin: str | None
    captions: list[dict[str, Any]]
    members: list[tuple[int, int]] = field(default_factory=list)  # JSON, picture, then the captions' audio


@dataclass
class _Shard:
    """One written shard."""

    path: Path
    split: str
    samples: list[_Sample] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


def _write_shard(plan: _Plan, progress: Progress) -> _Shard:
    shard = _Shard(plan.path, plan.split)
    try:
        with manifest.atomic(plan.path) as file, tarfile.TarFile("", "w", file, format=tarfile.USTAR_FORMAT) as tar:
            for key, item in plan.items:
                _write_sample(tar, file, key, item, plan.form, shard)
                progress(1)
        if not shard.samples:
            plan.path.unlink()
            return shard
        shard.bytes, shard.sha256 = plan.path.stat().st_size, manifest.file_sha256(plan.path)
    except OSError as error:
        raise UserError(f"cannot write {plan.path}: {error.strerror}") from None
    return shard


def _write_sample(tar: tarfile.TarFile, file: IO[bytes], key: str, item: Item, form: Format, shard: _Shard) -> None:
    try:
        picture = _picture(item.picture, form)
    except _BadFile as bad:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, str(bad), captions=len(item.captions)))
        return
    spoken = _spoken(item, form, shard.dropped)
    if not spoken:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, "no caption is left", captions=0))
        return
    captions = [caption for caption, _ in spoken]
    meta = {"image_id": item.image_id, "split": item.split, "captions": captions}
    if item.twin is not None:
        meta["twin"] = item.twin
    members = {"json": json.dumps(meta, ensure_ascii=False).encode(), "jpg": picture}
    members |= {f"{n}.{form.codec}": audio for n, (_, audio) in enumerate(spoken)}
    sample = _Sample(key, item.image_id, item.twin, captions)
    for ending, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size, info.mode = len(data), 0o644  # the rest stays at its defaults: no time, no owner
        sample.members.append((file.tell() + tarfile.BLOCKSIZE, len(data)))
        tar.addfile(info, io.BytesIO(data))
    shard.samples.append(sample)


class _BadFile(Exception):
    """A file that cannot be used and may be dropped."""


def _picture(source: PictureSource, form: Format) -> bytes:
    if not isinstance(source, Path):
        return read_picture(source(), form.short_side, form.quality)
    try:
        return read_picture(source, form.short_side, form.quality)
    except UserError as error:
        raise _droppable(error, form) from None


def _spoken(item: Item, form: Format, dropped: list[Dropped]) -> list[tuple[dict[str, Any], bytes]]:
    """Description and encoded audio of the usable captions."""
    spoken = []
    for one in item.captions:
        try:
            wave = _audio(one.audio, form)
        except _BadFile as bad:
            dropped.append(Dropped("caption", one.utterance, item.split, str(bad), captions=1))
            continue
        described = {
            "text": one.text,
            "speaker": one.speaker,
            "utterance": one.utterance,
            "duration": len(wave) / SAMPLE_RATE,
        }
        spoken.append((described, encode_audio(wave, form.codec)))
    return spoken


def _audio(source: AudioSource, form: Format) -> np.ndarray:
    if not isinstance(source, Path):
        samples, rate = source()
        return resample(mix_down(samples), rate)
    try:
        return read_audio(source, form.max_seconds)
    except UserError as error:
        raise _droppable(error, form) from None


def _droppable(error: UserError, form: Format) -> Exception:
    return _BadFile(str(error)) if form.skip_bad else error


def _info(shard: _Shard) -> manifest.ShardInfo:
    return manifest.ShardInfo(shard.path.name, shard.bytes, shard.sha256, len(shard.samples))


def _columns(shards: Sequence[_Shard], splits: Sequence[str]) -> dict[str, Any]:
    """The manifest's columns, sample by sample."""
    rows = [(number, shard.split, sample) for number, shard in enumerate(shards) for sample in shard.samples]
    samples = [sample for _, _, sample in rows]
    number_of = {sample.image_id: number for number, sample in enumerate(samples)}
    audio = [member for sample in samples for member in sample.members[2:]]
    return {
        "key": [sample.key.encode() for sample in samples],
        "image_id": [sample.image_id.encode() for sample in samples],
        "shard": [shard for shard, _, _ in rows],
        "split": [splits.index(split) for _, split, _ in rows],
        "meta_offset": [sample.members[0][0] for sample in samples],
        "meta_bytes": [sample.members[0][1] for sample in samples],
        "image_offset": [sample.members[1][0] for sample in samples],
        "image_bytes": [sample.members[1][1] for sample in samples],
        # The original of a twin may have been dropped.
        "twin": [number_of.get(sample.twin, -1) if sample.twin is not None else -1 for sample in samples],
        "first_caption": np.cumsum([0, *(len(sample.captions) for sample in samples)]),
        "audio_offset": [offset for offset, _ in audio],
        "audio_bytes": [size for _, size in audio],
        "duration": [caption["duration"] for sample in samples for caption in sample.captions],
    }


def _report(shards: Sequence[_Shard]) -> Report:
    report = Report(dropped=[one for shard in shards for one in shard.dropped])
    for shard in shards:
        counts = report.splits.setdefault(shard.split, Counts())
        for sample in shard.samples:
            counts.add(
                [caption["duration"] for caption in sample.captions],
                [caption["speaker"] for caption in sample.captions],
            )
        report.shards += bool(shard.samples)
        report.bytes += shard.bytes
    return report
