"""Write a corpus as shards: plan them, then write the tars in parallel; the bytes do not depend on the processes."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from shards import manifest
from shards.corpora.item import AudioSource, Item, PictureSource, check_items
from shards.corpora.text_files import ListFile
from shards.errors import TransientError, UserError
from shards.files import atomic_write, file_sha256
from shards.media.audio import SAMPLE_RATE, Codec, Recording, encode_audio, mix_down, read_recording, resample
from shards.media.picture import read_picture
from shards.media.signal_level import level_warning
from shards.progress import Progress
from shards.reading.reader import MAX_MEMBER, MAX_META
from shards.report import AudioWarning, Dropped, Report, SizeEstimate, size_table
from shards.stored import StoredFile, decoded
from shards.worker_pool import run_tasks
from shards.writing.folder_lock import ALL, UNFINISHED, Part, claim_folder, count_finished
from shards.writing.merge import close_folder
from shards.writing.shard_record import (
    SampleRecord,
    ShardRecord,
    WritingPlan,
    files_digest,
    lists_digest,
    load_plan,
    load_record,
)
from shards.writing.sources import SourceFile, by_split, crc32, files_of, stamp

_MAX_KEY = 80  # characters; a member's name has at most 100 bytes in a ustar header
_TRIAL_SAMPLES = 8  # samples per split that are encoded for an estimate


@dataclass(frozen=True)
class Format:
    """How samples are stored."""

    samples_per_shard: int = 500
    short_side: int = 256  # pixels; larger pictures are shrunk
    quality: int = 90  # of the JPEG
    codec: Codec = "flac"
    max_seconds: float = 30.0  # longer audio is bad input
    skip_bad: bool = False  # drop what cannot be read rather than end the run


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write."""

    name: str
    split: str
    items: tuple[Item, ...]
    form: Format
    lists: str  # digest of the items; see `lists_digest`


@dataclass(frozen=True)
class PlannedCorpus:
    """All shards of a corpus, before any is written."""

    plan: WritingPlan
    shards: tuple[PlannedShard, ...]

    def part(self, part: Part) -> tuple[PlannedShard, ...]:
        """Return the shards that a part of the run writes."""
        return self.shards[part.number - 1 :: part.of]

    def pictures(self, part: Part) -> int:
        """Return the number of pictures of a part."""
        return sum(len(shard.items) for shard in self.part(part))


def plan_shards(
    items: Sequence[Item],
    corpus: str,
    form: Format,
    arguments: Mapping[str, Any],
    parts: int = 1,
    dropped: Sequence[Dropped] = (),
    lists: Sequence[ListFile] = (),
) -> PlannedCorpus:
    """Divide the items of each split into shards, in order.

    Args:
        items: The samples of the corpus.
        corpus: Name of the corpus in the manifest.
        form: How samples are stored.
        arguments: JSON values stored in the manifest.
        parts: Number of runs among which the shards are divided.
        dropped: Pictures and captions that were dropped while the corpus was read, for the report.
        lists: The list files of the corpus, as they were read.

    Raises:
        UserError: Duplicate ids, invalid text, a picture without captions, an unknown twin, or no items.
    """
    check_items(items)
    shards = []
    for split, split_items in by_split(items).items():
        if not manifest.SPLIT.fullmatch(split):
            raise UserError(f"split {split!r}: the name of a split must consist of letters, digits, _ and -")
        for number, start in enumerate(range(0, len(split_items), form.samples_per_shard)):
            chosen = tuple(split_items[start : start + form.samples_per_shard])
            name, lists_sha = f"{split}-{number:06d}.tar", lists_digest(chosen, asdict(form))
            shards.append(PlannedShard(name, split, chosen, form, lists_sha))
    digests = {shard.name: shard.lists for shard in shards}
    stored = json.loads(json.dumps(dict(arguments)))  # as they are read back
    counts = len(items), sum(len(item.captions) for item in items)
    plan = WritingPlan(corpus, stored, asdict(form), digests, parts, tuple(dropped), tuple(lists), *counts)
    return PlannedCorpus(plan, tuple(shards))


def write_shards(
    items: Sequence[Item],
    folder: Path,
    corpus: str,
    form: Format,
    arguments: Mapping[str, Any],
    jobs: int = 1,
    progress: Progress = lambda done: None,
    restart: bool = False,
    dropped: Sequence[Dropped] = (),
    lists: Sequence[ListFile] = (),
) -> Report:
    """Write all shards, then the index, the report and, last, the manifest; resume an earlier run that was stopped.

    Args:
        items: The samples of the corpus; within a split, shards follow their order.
        folder: A new or empty folder, or that of an unfinished run. If this run fails, finished shards are kept.
        corpus: Name of the corpus in the manifest.
        form: How samples are stored.
        arguments: JSON values stored in the manifest.
        jobs: Number of processes.
        progress: Called with the number of pictures done since the last call.
        restart: Remove the shards of an earlier run, finished or not.
        dropped: Pictures and captions that were dropped while the corpus was read, for the report.
        lists: The list files of the corpus, as they were read.

    Raises:
        UserError: Bad input (unless `form.skip_bad`), duplicate ids, no items, a folder in use, or a file that changed
            after it was read.
    """
    planned = plan_shards(items, corpus, form, arguments, dropped=dropped, lists=lists)
    with claim_folder(folder, ALL, planned.plan, restart):
        kept = _write(planned, folder, ALL, jobs, progress)
        report = close_folder(folder, planned.plan)
    report.kept = kept
    return report


def write_part(
    planned: PlannedCorpus, folder: Path, part: Part, jobs: int = 1, progress: Progress = lambda done: None
) -> tuple[int, int]:
    """Write the shards of one part; other parts may be written concurrently, also on other machines.

    Returns:
        Number of shards written, and number of shards kept from an earlier run.

    Raises:
        UserError: As for `write_shards`.
    """
    with claim_folder(folder, part, planned.plan):
        kept = _write(planned, folder, part, jobs, progress)
    return len(planned.part(part)) - kept, kept


def merge_shards(folder: Path) -> Report:
    """Write the index, the report and the manifest of a folder whose parts are all written.

    Raises:
        UserError: There are no parts, one is missing or being written, a source file changed after it was read, or the
            folder cannot be written.
    """
    if load_plan(folder / UNFINISHED) is None:
        raise UserError(
            f"{folder} contains no parts to merge: write them with make_shards.py CORPUS --out DIR --part I/N"
        )
    with claim_folder(folder):
        plan = load_plan(folder / UNFINISHED)
        assert plan is not None
        return close_folder(folder, plan)


def _write(planned: PlannedCorpus, folder: Path, part: Part, jobs: int, progress: Progress) -> int:
    """Write the missing shards of a part, and return the number of shards kept."""
    tasks = {shard.name: shard for shard in planned.part(part)}
    try:
        return sum(kept for _, kept in run_tasks(partial(_make_shard, folder), tasks, jobs, progress))
    except UserError as error:
        hint = resume_hint(folder)
        raise UserError(f"{error}; {hint}" if hint else str(error)) from None


def resume_hint(folder: Path) -> str:
    """Return how to resume a stopped run; "" if it finished no shard."""
    kept, plan = count_finished(folder), load_plan(folder / UNFINISHED)
    if not kept or plan is None:
        return ""
    command = "the same command" if plan.skip_bad else "the same command, or with --skip-bad,"
    return f"{kept} of {len(plan.shards)} shards are finished and kept: {command} resumes from there"


def estimate_sizes(items: Sequence[Item], form: Format) -> str:
    """Estimate the size of the shards of a corpus, as a table; a few samples of each split are encoded.

    Raises:
        UserError: As for `plan_shards`, or bad input among the encoded samples.
    """
    shards = Counter(shard.split for shard in plan_shards(items, "", form, {}).shards)
    encoded = 0
    rows = []
    for split, split_items in by_split(items).items():
        count = len(split_items)
        trials = min(count, _TRIAL_SAMPLES)
        trial, size = _encode_trial([split_items[n * count // trials] for n in range(trials)], form)
        encoded += trials
        scale = count / trials
        seconds = scale * sum(sum(sample.durations) for sample in trial.samples)
        captions = sum(len(item.captions) for item in split_items)
        rows.append(SizeEstimate(split, count, captions, shards[split], seconds, scale * size))
    return size_table(rows, encoded)


def _encode_trial(items: Sequence[Item], form: Format) -> tuple[ShardRecord, int]:
    """Write a few samples to memory; return their record and their bytes in a tar."""
    shard, file = ShardRecord("", "", "", ""), io.BytesIO()
    with tarfile.TarFile("", "w", file, format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            _write_sample(tar, file, item, form, shard)
        size = file.tell()
    return shard, size


def sample_key(image_id: str) -> str:
    """Return the image id as a tar member's name of letters, digits, _ and -; a hash keeps changed ids unique."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)
    if key == image_id and 0 < len(key) <= _MAX_KEY:
        return key
    return f"{key[: _MAX_KEY - 13]}-{sha256(image_id.encode()).hexdigest()[:12]}"


def _make_shard(folder: Path, plan: PlannedShard, progress: Progress) -> bool:
    """Write one shard unless it is finished and its source files are unchanged; return whether it was kept."""
    notes = folder / UNFINISHED
    # Taken before the files are read: if one changes meanwhile, the next run sees another time of modification.
    stamps = {path: stamp(path) for path in files_of(plan.items)}
    files = files_digest(stamps[path] for path in files_of(plan.items))
    record = load_record(notes, plan.name, plan.lists, plan.form.skip_bad)
    if record and record.files == files:
        if record.sources is None:
            record.sources = [_source(path, stamps) for path in files_of(plan.items)]
            record.save(notes)
        progress(len(plan.items))
        return True
    path = folder / plan.name
    sources: list[SourceFile] = []
    shard = ShardRecord(plan.name, plan.split, plan.lists, files, sources=sources)
    try:
        # The record of an earlier tar must not exist beside the new one.
        (notes / f"{plan.name}.json").unlink(missing_ok=True)
        with atomic_write(path) as file, tarfile.TarFile("", "w", file, format=tarfile.USTAR_FORMAT) as tar:
            for item in plan.items:
                # Like the stamps, taken before the files are read.
                sources += [_source(path, stamps) for path in files_of([item])]
                _write_sample(tar, file, item, plan.form, shard)
                progress(1)
        if shard.samples:
            shard.bytes, shard.sha256 = path.stat().st_size, file_sha256(path)
        else:
            path.unlink()
        shard.save(notes)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return False


def _source(path: Path | StoredFile, stamps: Mapping[Path | StoredFile, tuple[int, int]]) -> SourceFile:
    location = path.container if isinstance(path, StoredFile) else os.path.abspath(path)
    return SourceFile(location, *stamps[path], crc32(path))


def _write_sample(tar: tarfile.TarFile, file: IO[bytes], item: Item, form: Format, shard: ShardRecord) -> None:
    try:
        picture = _encode_picture(item.picture, form)
    except _BadInput as bad:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, str(bad), captions=len(item.captions)))
        return
    encoded = _encode_captions(item, form, shard.dropped)
    if not encoded:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, "no caption is left", captions=0))
        return
    captions = [caption for caption, _, _ in encoded]
    meta = {"image_id": item.image_id, "split": item.split, "captions": captions}
    if item.twin is not None:
        meta["twin"] = item.twin
    members = {"json": json.dumps(meta, ensure_ascii=False).encode(), "jpg": picture}
    members |= {f"{n}.{form.codec}": audio for n, (_, audio, _) in enumerate(encoded)}
    try:
        _check_sizes(members, item, form)
    except _BadInput as bad:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, str(bad), captions=len(captions)))
        return
    key = sample_key(item.image_id)
    durations, speakers = ([one[name] for one in captions] for name in ("duration", "speaker"))
    sample = SampleRecord(key, item.image_id, item.twin, durations, speakers)
    for ending, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size, info.mode = len(data), 0o644  # the rest stays at its defaults: no time, no owner
        sample.members.append((file.tell() + tarfile.BLOCKSIZE, len(data)))
        tar.addfile(info, io.BytesIO(data))
    shard.samples.append(sample)
    for n, (caption, _, warning) in enumerate(encoded):
        if warning:
            shard.warnings.append(AudioWarning(caption["utterance"], item.split, shard.name, key, n, warning))


def _check_sizes(members: Mapping[str, bytes], item: Item, form: Format) -> None:
    """Raise an error for members that exceed the limits of the reader."""
    for ending, data in members.items():
        most = MAX_META if ending == "json" else MAX_MEMBER
        if len(data) > most:
            line = f"picture {item.image_id}: its .{ending} would have {len(data):,} bytes, the limit is {most:,}"
            fix = "shorten its texts" if ending == "json" else "store it smaller"
            raise _droppable(UserError(f"{line}: {fix}"), form)


class _BadInput(Exception):
    """Input that cannot be used and may be dropped."""


def _encode_picture(source: PictureSource, form: Format) -> bytes:
    if not isinstance(source, Path | StoredFile):
        return read_picture(source(), form.short_side, form.quality)
    try:
        return decoded(source, lambda content: read_picture(content, form.short_side, form.quality))
    except UserError as error:
        raise _droppable(error, form) from None


def _encode_captions(
    item: Item, form: Format, dropped: list[Dropped]
) -> list[tuple[dict[str, Any], bytes, str | None]]:
    """Return metadata, encoded audio and warning of each usable caption; append the others to `dropped`."""
    encoded = []
    for caption in item.captions:
        try:
            recording = _read_audio(caption.audio, form)
        except _BadInput as bad:
            dropped.append(Dropped("caption", caption.utterance, item.split, str(bad), captions=1))
            continue
        metadata = {
            "text": caption.text,
            "speaker": caption.speaker,
            "utterance": caption.utterance,
            "duration": len(recording.wave) / SAMPLE_RATE,
        }
        if caption.language is not None:
            metadata["language"] = caption.language
        encoded.append((metadata, encode_audio(recording.wave, form.codec), recording.warning))
    return encoded


def _read_audio(source: AudioSource, form: Format) -> Recording:
    if not isinstance(source, Path | StoredFile):
        samples, rate = source()
        wave = resample(mix_down(samples), rate)
        return Recording(wave, level_warning(wave))
    try:
        return decoded(source, lambda content: read_recording(content, form.max_seconds))
    except UserError as error:
        raise _droppable(error, form) from None


def _droppable(error: UserError, form: Format) -> Exception:
    return _BadInput(str(error)) if form.skip_bad and not isinstance(error, TransientError) else error
