"""The doctor's look at one shard: its bytes, its members against the index, and what is in them."""

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
from shards.checking.finding import NAMED
from shards.checking.tar import DamagedTar, Member, TarScan
from shards.errors import UserError
from shards.manifest import Manifest, ShardInfo
from shards.media.audio import CODECS, MAX_SECONDS, SAMPLE_RATE
from shards.media.picture import MAX_STORED_PIXELS as MAX_PIXELS
from shards.media.picture import decode_picture
from shards.media.signal_level import LevelMeter
from shards.reading.reader import MAX_MEMBER, MAX_META
from shards.worker_pool import Progress

_SIDE = 224  # pixels a picture is decoded to, as training does
_TOLERANCE = 0.05  # seconds between what the index says and what is there
_BLOCK = 1 << 16
_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Stored:
    """One sample as the index has it: members are (offset, bytes) of its JSON, its picture and its recordings."""

    key: str
    image_id: str
    twin: str | None
    members: tuple[tuple[int, int], ...]
    durations: tuple[float, ...]  # seconds
    decode: bool  # whether picture and recordings are to be decoded, not only their headers read


@dataclass(frozen=True)
class Task:
    """One shard to look at."""

    path: Path
    info: ShardInfo
    split: str
    samples: tuple[Stored, ...]


@dataclass
class Found:
    """What is wrong with a shard, and what its samples are known by."""

    digests: Digests
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pictures: int = 0  # decoded
    recordings: int = 0


def task_of(m: Manifest, shard: int, decode: np.ndarray) -> Task:
    """Take out of a manifest what `check_shard` needs of one shard; `decode`: bool [S]."""
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
        samples.append(Stored(text(m.key[s]), text(m.image_id[s]), twin, tuple(members), durations, bool(decode[s])))
    split = m.splits[m.split[first]] if last > first else ""
    return Task(m.folder / m.shards[shard].name, m.shards[shard], split, tuple(samples))


def check_shard(task: Task, progress: Progress) -> Found:
    """Read a shard once, from front to back; memory is bounded by its largest member, of at most 64 MiB.

    Args:
        task: the shard and what the index says of it.
        progress: told how many samples were done since the last call.
    """
    found = Found(Digests(len(task.samples), sum(len(sample.durations) for sample in task.samples)))
    try:
        status = task.path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            found.problems.append("is no regular file")
        elif status.st_size != task.info.bytes:
            found.problems.append(_wrong_size(task, status.st_size))
        else:
            _scan(task, status.st_size, found)
    except OSError as error:
        found.problems.append("is missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}")
    found.problems, found.warnings = _shortened(found.problems), _shortened(found.warnings)
    progress(len(task.samples))
    return found


def _wrong_size(task: Task, size: int) -> str:
    line = f"has {size:,} bytes, the manifest says {task.info.bytes:,}: "
    if size > task.info.bytes:
        return line + "it was changed"
    whole = sum(all(offset + length <= size for offset, length in sample.members) for sample in task.samples)
    return line + f"truncated, {whole} of its {len(task.samples)} samples lie before its end"


def _shortened(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - NAMED
    return [*lines[:NAMED], f"and {rest} more like these"] if rest > 0 else list(lines)


@dataclass(frozen=True)
class _Place:
    """A member as the index has it: number `part` of a sample, 0 its JSON, 1 its picture, then the recordings."""

    sample: int
    part: int
    size: int  # bytes
    names: tuple[str, ...]  # one of these
    first_caption: int  # of the sample, among the captions of the shard


def _scan(task: Task, size: int, found: Found) -> None:
    places = _places(task, found)
    with open(task.path, "rb") as file:
        scan = TarScan(file, size)
        try:
            for member in scan.members():
                place = places.pop(member.offset, None)
                if _fits(member, place, found) and place and member.data is not None:
                    _look_into(task, place, member.data, found)
            for offset, place in places.items():
                found.problems.append(f"there is no member {place.names[0]} at byte {offset:,}, as the index says")
        except DamagedTar as damage:
            found.problems.append(f"{damage}; the rest of the shard was not looked at")
        if scan.sha256() != task.info.sha256:
            found.problems.append("its checksum is not the manifest's: its bytes changed since it was written")


def _places(task: Task, found: Found) -> dict[int, _Place]:
    """The members that the index expects, by their offset."""
    places: dict[int, _Place] = {}
    captions = 0
    for number, sample in enumerate(task.samples):
        if not _KEY.fullmatch(sample.key):
            found.problems.append(f"sample {sample.key!r}: a key has letters, digits, _ and - only")
        names: list[tuple[str, ...]] = [(f"{sample.key}.json",), (f"{sample.key}.jpg",)]
        names += [tuple(f"{sample.key}.{n}.{codec}" for codec in CODECS) for n in range(len(sample.durations))]
        if not sample.durations:
            found.problems.append(f"sample {sample.key}: it has no captions")
        for part, (offset, length) in enumerate(sample.members):
            places[offset] = _Place(number, part, length, names[part], captions)
        captions += len(sample.durations)
    if list(places) != sorted(places) or len(places) < sum(len(sample.members) for sample in task.samples):
        found.problems.append("its members do not lie one behind another in the order of the index")
    return places


def _fits(member: Member, place: _Place | None, found: Found) -> bool:
    """Whether a member is the one that the index has at its offset; if not, it is named."""
    name = repr(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        found.problems.append(f"member {name} at byte {member.offset:,} would be written outside of the folder")
    elif "/" in member.name:
        found.problems.append(f"member {name} at byte {member.offset:,} is in a folder")
    elif member.data is None:
        found.problems.append(f"member {name} has {member.size:,} bytes, the limit is {MAX_MEMBER:,}")
    elif place is None:
        found.problems.append(f"member {name} at byte {member.offset:,} is not in the index")
    elif member.name not in place.names:
        found.problems.append(f"member {name} at byte {member.offset:,} is {place.names[0]} in the index")
    elif member.size != place.size:
        found.problems.append(f"member {name} has {member.size:,} bytes, the index says {place.size:,}")
    else:
        return True
    return False


def _look_into(task: Task, place: _Place, data: bytes, found: Found) -> None:
    sample, digests = task.samples[place.sample], found.digests
    warning = None
    if place.part == 0:
        problem, utterances = _look_into_meta(data, sample, task.split)
        for number, utterance in enumerate(utterances, place.first_caption):
            digests.put(digests.utterances, number, utterance.encode(errors="surrogatepass"))
    elif place.part == 1:
        digests.put(digests.pictures, place.sample, data)
        problem = problem_of_picture(data, sample.decode)
        found.pictures += sample.decode
    else:
        digests.put(digests.recordings, place.first_caption + place.part - 2, data)
        problem, warning = problem_of_recording(data, sample.durations[place.part - 2], sample.decode)
        found.recordings += sample.decode
    name = place.names[0] if place.part < 2 else f"{sample.key}, caption {place.part - 2}"
    if problem:
        found.problems.append(f"{name}: {problem}")
    if warning:
        found.warnings.append(f"{name}: {warning}")


def _look_into_meta(data: bytes, sample: Stored, split: str) -> tuple[str | None, list[str]]:
    """What of a sample's JSON does not agree with the index; if all of it does, the ids of its utterances too."""
    if len(data) > MAX_META:
        return f"{len(data):,} bytes, the limit is {MAX_META:,}", []
    try:
        meta = json.loads(data)
        problem = _problem_of_meta(meta, sample, split)
        return problem, [] if problem else [caption["utterance"] for caption in meta["captions"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"not a sample's JSON ({type(error).__name__}: {error})", []


def _problem_of_meta(meta: Any, sample: Stored, split: str) -> str | None:
    """What of a sample's JSON does not agree with the index; any error of it if it has another form."""
    wanted = {"image_id": sample.image_id, "split": split, "twin": sample.twin}
    for name, value in wanted.items():
        # The index has no twin where that picture was dropped.
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


def problem_of_picture(data: bytes, decode: bool) -> str | None:
    """Look at a JPEG's header, and decode it if asked; a bomb is refused by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return f"a picture bomb: more pixels than the limit of {MAX_PIXELS:,}"
    except Exception as error:  # a damaged file makes Pillow raise nearly any type
        return f"not a JPEG ({type(error).__name__})"
    if width * height > MAX_PIXELS:
        return f"a picture bomb: {width:,} x {height:,} pixels, the limit is {MAX_PIXELS:,}"
    if decode:
        try:
            decode_picture(data, _SIDE)
        except UserError as error:
            return str(error)
    return None


def problem_of_recording(data: bytes, duration: float, decode: bool) -> tuple[str | None, str | None]:
    """Look at a recording's header, and decode it block by block if asked: problem and warning.

    Args:
        data: the encoded bytes.
        duration: what the index says, in seconds.
        decode: whether to decode it.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.samplerate, file.channels) != (SAMPLE_RATE, 1):
                return f"{file.samplerate:,} Hz, {file.channels} channels; expected {SAMPLE_RATE:,} Hz, 1", None
            frames, meter = file.frames, None
            if max(frames / SAMPLE_RATE, duration) > MAX_SECONDS:
                return f"{max(frames / SAMPLE_RATE, duration):,.0f} s of audio, the limit is {MAX_SECONDS:.0f} s", None
            if decode:
                meter = _decoded(file, int((duration + 2 * _TOLERANCE) * SAMPLE_RATE))
                frames = meter.samples
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        return f"cannot be decoded as audio ({error})", None
    if frames == 0 or (meter and not np.isfinite(meter.peak)):
        return "holds samples that are not finite" if frames else "holds no audio", None
    if abs(frames / SAMPLE_RATE - duration) > _TOLERANCE:
        return f"{frames / SAMPLE_RATE:,.2f} s of audio, the index says {duration:.2f} s", None
    return None, meter.warning if meter else None


def _decoded(file: Any, limit: int) -> LevelMeter:
    """Measure a recording, of which no more than a block beyond `limit` frames is decoded."""
    meter = LevelMeter()
    while meter.samples <= limit and len(block := file.read(_BLOCK, dtype="float32")):
        meter.add(block)
    return meter
