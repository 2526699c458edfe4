"""Check one shard: its bytes, its members against the index, and their contents."""

import io
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from shards.checking.duplicates import Digests, text
from shards.checking.finding import MAX_NAMED
from shards.checking.tar import Member, TarScan
from shards.errors import UserError
from shards.files import file_sha256
from shards.manifest import Manifest, ShardInfo
from shards.media.audio import CODECS, MAX_SECONDS, SAMPLE_RATE
from shards.media.picture import MAX_STORED_PIXELS as MAX_PIXELS
from shards.media.picture import decode_picture
from shards.media.signal_level import LevelMeter
from shards.progress import Progress
from shards.reading.reader import MAX_MEMBER, MAX_META, caption_metadata
from shards.tars.members import DamagedTar

_SIDE = 224  # side of decoded pictures in pixels, as in training
_TOLERANCE = 0.05  # largest difference from the index, in seconds
_BLOCK = 1 << 16
KEY = re.compile(r"[A-Za-z0-9_-]+")
STOCK_PICTURES = ("JPEG", "PNG", "WEBP")  # formats that tars of other programs may have


@dataclass(frozen=True)
class IndexedSample:
    """One sample in the index; members are (offset, bytes) of its JSON, picture and audio files."""

    key: str
    image_id: str
    twin: str | None
    members: tuple[tuple[int, int], ...]
    durations: tuple[float, ...]  # seconds
    decode: bool  # whether to decode picture and audio; otherwise only their headers are read


@dataclass(frozen=True)
class ShardTask:
    """One shard to check."""

    path: Path
    info: ShardInfo
    split: str
    samples: tuple[IndexedSample, ...]
    stock: bool = False  # whether another program wrote the tar, which was only indexed


@dataclass
class ShardFindings:
    """Problems and warnings of a shard, and the digests of its contents."""

    digests: Digests
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pictures: int = 0  # decoded
    audio_files: int = 0  # decoded


def task_of(m: Manifest, shard: int, decode: np.ndarray) -> ShardTask:
    """Build the task of one shard of a manifest; `decode` is bool [S]."""
    first, last = np.searchsorted(m.shard, np.array([shard, shard + 1], m.shard.dtype)).tolist()
    samples = []
    for s in range(first, last):
        rows = slice(int(m.first_caption[s]), int(m.first_caption[s + 1]))
        members = [
            (int(m.meta_offset[s]), int(m.meta_bytes[s])),
            (int(m.image_offset[s]), int(m.image_bytes[s])),
            *zip(m.audio_offset[rows].tolist(), m.audio_bytes[rows].tolist(), strict=True),
        ]
        twin = text(m.image_id[m.twin[s]]) if m.twin[s] >= 0 else None
        durations = tuple(m.duration[rows].tolist())
        samples.append(
            IndexedSample(text(m.key[s]), text(m.image_id[s]), twin, tuple(members), durations, bool(decode[s]))
        )
    split = m.splits[m.split[first]] if last > first else ""
    return ShardTask(m.folder / m.shards[shard].name, m.shards[shard], split, tuple(samples), m.indexed)


def check_shard(task: ShardTask, progress: Progress) -> ShardFindings:
    """Read a shard once, sequentially; memory is bounded by its largest member, of at most 64 MiB."""
    findings = ShardFindings(Digests(len(task.samples), sum(len(sample.durations) for sample in task.samples)))
    try:
        status = task.path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            findings.problems.append("is not a regular file")
        elif status.st_size != task.info.bytes:
            findings.problems.append(_wrong_size(task, status.st_size))
        elif task.stock:
            _scan_stock(task, findings)
        else:
            _scan(task, status.st_size, findings)
    except OSError as error:
        findings.problems.append(
            "is missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
        )
    findings.problems, findings.warnings = _shortened(findings.problems), _shortened(findings.warnings)
    progress(len(task.samples))
    return findings


def _wrong_size(task: ShardTask, size: int) -> str:
    line = f"has {size:,} bytes, the manifest has {task.info.bytes:,}: "
    if size > task.info.bytes:
        return line + "it was changed"
    complete = sum(all(offset + length <= size for offset, length in sample.members) for sample in task.samples)
    return line + f"truncated, {complete} of its {len(task.samples)} samples are complete"


def _shortened(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], f"and {rest} more like these"] if rest > 0 else list(lines)


@dataclass(frozen=True)
class _IndexedMember:
    """A member in the index: number `part` of a sample, 0 its JSON, 1 its picture, then the audio files."""

    sample: int
    part: int
    size: int  # bytes
    names: tuple[str, ...]  # accepted names
    first_caption: int  # number of the sample's first caption in the shard


def _scan(task: ShardTask, size: int, findings: ShardFindings) -> None:
    expected = _expected_members(task, findings)
    with open(task.path, "rb") as file:
        scan = TarScan(file, size)
        try:
            for member in scan.members():
                indexed = expected.pop(member.offset, None)
                if _fits(member, indexed, findings) and indexed and member.data is not None:
                    _check_content(task, indexed, member.data, findings)
            for offset, indexed in expected.items():
                findings.problems.append(f"member {indexed.names[0]} at byte {offset:,} is in the index, but missing")
        except DamagedTar as damage:
            findings.problems.append(f"{damage}; the rest of the shard was not checked")
        if scan.sha256() != task.info.sha256:
            findings.problems.append("its checksum differs from the manifest: its bytes changed since it was written")


def _scan_stock(task: ShardTask, findings: ShardFindings) -> None:
    """Check a tar of another program: its checksum, which covers the names in it, and the members in the index."""
    if file_sha256(task.path) != task.info.sha256:
        findings.problems.append("its checksum differs from the manifest: its bytes changed since it was indexed")
    captions = 0
    with open(task.path, "rb") as file:
        for number, sample in enumerate(task.samples):
            names = ["text", "picture", *(f"caption {n}" for n in range(len(sample.durations)))]
            for part, (offset, length) in enumerate(sample.members):
                name = f"{sample.key}, {names[part]}"
                if length > MAX_MEMBER:
                    findings.problems.append(f"{name} has {length:,} bytes, the limit is {MAX_MEMBER:,}")
                    continue
                file.seek(offset)
                indexed = _IndexedMember(number, part, length, (name,), captions)
                _check_content(task, indexed, file.read(length), findings)
            captions += len(sample.durations)


def _expected_members(task: ShardTask, findings: ShardFindings) -> dict[int, _IndexedMember]:
    """Return the members in the index by offset."""
    indexed: dict[int, _IndexedMember] = {}
    captions = 0
    for number, sample in enumerate(task.samples):
        if not KEY.fullmatch(sample.key):
            findings.problems.append(f"sample {sample.key!r}: a key must consist of letters, digits, _ and -")
        names: list[tuple[str, ...]] = [(f"{sample.key}.json",), (f"{sample.key}.jpg",)]
        names += [tuple(f"{sample.key}.{n}.{codec}" for codec in CODECS) for n in range(len(sample.durations))]
        if not sample.durations:
            findings.problems.append(f"sample {sample.key}: it has no captions")
        for part, (offset, length) in enumerate(sample.members):
            indexed[offset] = _IndexedMember(number, part, length, names[part], captions)
        captions += len(sample.durations)
    if list(indexed) != sorted(indexed) or len(indexed) < sum(len(sample.members) for sample in task.samples):
        findings.problems.append("its members are not consecutive in the order of the index")
    return indexed


def _fits(member: Member, indexed: _IndexedMember | None, findings: ShardFindings) -> bool:
    """Return whether a member matches the index at its offset; report it if not."""
    name = repr(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        findings.problems.append(f"member {name} at byte {member.offset:,} would be written outside of the folder")
    elif "/" in member.name:
        findings.problems.append(f"member {name} at byte {member.offset:,} is in a folder")
    elif member.data is None:
        findings.problems.append(f"member {name} has {member.size:,} bytes, the limit is {MAX_MEMBER:,}")
    elif indexed is None:
        findings.problems.append(f"member {name} at byte {member.offset:,} is not in the index")
    elif member.name not in indexed.names:
        findings.problems.append(f"member {name} at byte {member.offset:,} is {indexed.names[0]} in the index")
    elif member.size != indexed.size:
        findings.problems.append(f"member {name} has {member.size:,} bytes, the index has {indexed.size:,}")
    else:
        return True
    return False


def _check_content(task: ShardTask, indexed: _IndexedMember, data: bytes, findings: ShardFindings) -> None:
    sample, digests = task.samples[indexed.sample], findings.digests
    warning = None
    if indexed.part == 0:
        if task.stock:
            described = caption_metadata(data, sample.key, len(sample.durations))
            problem, utterances = None, [str(one["utterance"]) for one in described]
        else:
            problem, utterances = _check_meta(data, sample, task.split)
        for number, utterance in enumerate(utterances, indexed.first_caption):
            digests.put(digests.utterances, number, utterance.encode(errors="surrogatepass"))
    elif indexed.part == 1:
        digests.put(digests.pictures, indexed.sample, data)
        problem = problem_of_picture(data, sample.decode, STOCK_PICTURES if task.stock else ("JPEG",))
        findings.pictures += sample.decode
    else:
        digests.put(digests.audio_files, indexed.first_caption + indexed.part - 2, data)
        problem, warning = problem_of_audio(data, sample.durations[indexed.part - 2], sample.decode)
        findings.audio_files += sample.decode
    name = indexed.names[0] if indexed.part < 2 else f"{sample.key}, caption {indexed.part - 2}"
    if problem:
        findings.problems.append(f"{name}: {problem}")
    if warning:
        findings.warnings.append(f"{name}: {warning}")


def _check_meta(data: bytes, sample: IndexedSample, split: str) -> tuple[str | None, list[str]]:
    """Return how a sample's JSON differs from the index, or None and the ids of its utterances."""
    if len(data) > MAX_META:
        return f"{len(data):,} bytes, the limit is {MAX_META:,}", []
    try:
        meta = json.loads(data)
        problem = _problem_of_meta(meta, sample, split)
        return problem, [] if problem else [caption["utterance"] for caption in meta["captions"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"not a sample's JSON ({type(error).__name__}: {error})", []


def _problem_of_meta(meta: Any, sample: IndexedSample, split: str) -> str | None:
    """Return how a sample's JSON differs from the index; raises various errors if it is malformed."""
    expected = {"image_id": sample.image_id, "split": split, "twin": sample.twin}
    for name, value in expected.items():
        # The index has no twin if that picture was dropped.
        if meta.get(name) != value and not (name == "twin" and value is None):
            return f"{name} is {meta.get(name)!r}, in the index {value!r}"
    captions = meta["captions"]
    if len(captions) != len(sample.durations):
        return f"it has {len(captions)} captions, in the index {len(sample.durations)}"
    for number, (caption, duration) in enumerate(zip(captions, sample.durations, strict=True)):
        if not isinstance(caption["text"], str | None) or not isinstance(caption["utterance"], str):
            return f"caption {number} has no text or utterance"
        if abs(caption["duration"] - duration) > 1e-3:
            return f"caption {number} is {caption['duration']} s long, in the index {duration:.3f} s"
    return None


def problem_of_picture(data: bytes, decode: bool, formats: tuple[str, ...] = ("JPEG",)) -> str | None:
    """Check a picture's header against Pillow's names of the allowed formats, and optionally decode the picture.

    A decompression bomb is rejected by its header.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return f"a decompression bomb: more pixels than the limit of {MAX_PIXELS:,}"
    except Exception as error:  # for damaged files, Pillow raises various errors
        return f"not a {' or '.join(formats)} ({type(error).__name__})"
    if width * height > MAX_PIXELS:
        return f"a decompression bomb: {width:,} x {height:,} pixels, the limit is {MAX_PIXELS:,}"
    if decode:
        try:
            decode_picture(data, _SIDE)
        except UserError as error:
            return str(error)
    return None


def problem_of_audio(data: bytes, duration: float, decode: bool) -> tuple[str | None, str | None]:
    """Check an audio file's header, and optionally decode it block by block.

    Args:
        data: The encoded bytes.
        duration: Duration in the index, in seconds.
        decode: Whether to decode it.

    Returns:
        Problem and warning, or None.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.samplerate, file.channels) != (SAMPLE_RATE, 1):
                return f"{file.samplerate:,} Hz, {file.channels} channels; expected {SAMPLE_RATE:,} Hz, 1", None
            frames, meter = file.frames, None
            if max(frames / SAMPLE_RATE, duration) > MAX_SECONDS:
                return f"{max(frames / SAMPLE_RATE, duration):,.0f} s of audio, the limit is {MAX_SECONDS:.0f} s", None
            if decode:
                meter = _measure_level(file, int((duration + 2 * _TOLERANCE) * SAMPLE_RATE))
                frames = meter.samples
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        return f"cannot be decoded as audio ({error})", None
    if frames == 0 or (meter and not np.isfinite(meter.peak)):
        return "contains samples that are not finite" if frames else "contains no audio", None
    if abs(frames / SAMPLE_RATE - duration) > _TOLERANCE:
        return f"{frames / SAMPLE_RATE:,.2f} s of audio, the index has {duration:.2f} s", None
    return None, meter.warning if meter else None


def _measure_level(file: Any, limit: int) -> LevelMeter:
    """Measure the level of an audio file; stop at most one block after `limit` frames."""
    meter = LevelMeter()
    while meter.samples <= limit and len(block := file.read(_BLOCK, dtype="float32")):
        meter.add(block)
    return meter
