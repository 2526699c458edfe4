"""Write a corpus as shards: planned first, then made in parallel, a tar a task, same bytes whatever the workers."""

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from shards import manifest
from shards.corpora.item import AudioSource, Item, PictureSource, check_items
from shards.corpora.lists import ListFile
from shards.errors import UserError
from shards.files import atomic_write, file_sha256
from shards.media.audio import SAMPLE_RATE, Codec, Recording, encode_audio, mix_down, read_recording, resample
from shards.media.picture import read_picture
from shards.media.signal_level import level_warning
from shards.reading.reader import MAX_MEMBER, MAX_META
from shards.report import Dropped, RecordingWarning, Report, SizeEstimate, outlook_text
from shards.worker_pool import Progress, run_tasks
from shards.writing.folder_lock import UNFINISHED, WHOLE, Part, claimed, finished
from shards.writing.merge import close_folder
from shards.writing.shard_record import Plan, Record, Sample, files_digest, lists_digest, load_plan, load_record
from shards.writing.sources import SourceFile, by_split, crc32, files_of, stamp

_KEY_LENGTH = 80  # a member's name has 100 bytes in a ustar header
_TRIED = 8  # samples a split that are encoded for an estimate


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
class _Planned:
    """One shard to write."""

    name: str
    split: str
    items: tuple[Item, ...]
    form: Format
    lists: str  # digest of the items


@dataclass(frozen=True)
class Work:
    """All shards of a corpus, before any is written."""

    plan: Plan
    shards: tuple[_Planned, ...]

    def part(self, part: Part) -> tuple[_Planned, ...]:
        """The shards that a part of the run writes."""
        return self.shards[part.number - 1 :: part.of]

    def pictures(self, part: Part) -> int:
        """Pictures of a part."""
        return sum(len(shard.items) for shard in self.part(part))


def plan_shards(
    items: Sequence[Item],
    corpus: str,
    form: Format,
    arguments: Mapping[str, Any],
    parts: int = 1,
    dropped: Sequence[Dropped] = (),
    lists: Sequence[ListFile] = (),
) -> Work:
    """Deal the items to shards, split by split; their order within a split is the order of the shards.

    Args:
        items: the corpus.
        corpus: name kept in the manifest.
        form: how samples are stored.
        arguments: JSON values kept in the manifest.
        parts: into how many runs the work is divided.
        dropped: What was left out when the corpus was read, for the report.
        lists: The corpus's lists, as they were read.

    Raises:
        UserError: clashing ids, words that are no text, a picture without captions, an unknown twin, or nothing to
            write.
    """
    check_items(items)
    shards = []
    for split, every in by_split(items).items():
        if not manifest.SPLIT.fullmatch(split):
            raise UserError(f"split {split!r}: a split's name has letters, digits, _ and - only")
        for number, start in enumerate(range(0, len(every), form.samples_per_shard)):
            some = tuple(every[start : start + form.samples_per_shard])
            shards.append(_Planned(f"{split}-{number:06d}.tar", split, some, form, lists_digest(some, asdict(form))))
    digests = {shard.name: shard.lists for shard in shards}
    plain = json.loads(json.dumps(dict(arguments)))  # as it will be read back
    counts = len(items), sum(len(item.captions) for item in items)
    return Work(Plan(corpus, plain, asdict(form), digests, parts, tuple(dropped), tuple(lists), *counts), tuple(shards))


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
    """Write all samples, then the index, the report and, last, the manifest; go on where an earlier run was stopped.

    Args:
        items: the corpus; its order within a split is the order of the shards.
        folder: empty, new, or left unfinished by an earlier run. If this run fails, finished shards are kept.
        corpus: name kept in the manifest.
        form: how samples are stored.
        arguments: JSON values kept in the manifest.
        jobs: processes.
        progress: told how many pictures were done since the last call.
        restart: drop what an earlier run has left, finished or not.
        dropped: What was left out when the corpus was read, for the report.
        lists: The corpus's lists, as they were read.

    Raises:
        UserError: bad input (unless `form.skip_bad`), clashing ids, nothing to write, a folder in use, or a file that
            changed after it was read.
    """
    work = plan_shards(items, corpus, form, arguments, dropped=dropped, lists=lists)
    with claimed(folder, WHOLE, work.plan, restart):
        kept = _write(work, folder, WHOLE, jobs, progress)
        report = close_folder(folder, work.plan)
    report.kept = kept
    return report


def write_part(
    work: Work, folder: Path, part: Part, jobs: int = 1, progress: Progress = lambda done: None
) -> tuple[int, int]:
    """Write one part's shards; other parts may be written at once, on other machines too.

    Returns:
        How many shards were written, and how many were there from an earlier run.

    Raises:
        UserError: as for `write_shards`.
    """
    with claimed(folder, part, work.plan):
        kept = _write(work, folder, part, jobs, progress)
    return len(work.part(part)) - kept, kept


def merge_shards(folder: Path) -> Report:
    """Write the index, the report and the manifest of a folder whose parts are all written.

    Raises:
        UserError: there are no parts, one is missing or at work, a file changed after a part has read it, or the folder
            cannot be written.
    """
    if load_plan(folder / UNFINISHED) is None:
        raise UserError(f"{folder} holds no parts to merge: write them with make_shards.py CORPUS --out DIR --part I/N")
    with claimed(folder):
        plan = load_plan(folder / UNFINISHED)
        assert plan is not None
        return close_folder(folder, plan)


def _write(work: Work, folder: Path, part: Part, jobs: int, progress: Progress) -> int:
    """Write or keep the shards of a part, and give how many were kept."""
    tasks = {shard.name: shard for shard in work.part(part)}
    try:
        return sum(kept for _, kept in run_tasks(partial(_make_shard, folder), tasks, jobs, progress))
    except UserError as error:
        kept = going_on(folder)
        raise UserError(f"{error}; {kept}" if kept else str(error)) from None


def going_on(folder: Path) -> str:
    """What to say of the shards that a stopped run leaves; nothing if there are none."""
    kept, plan = finished(folder), load_plan(folder / UNFINISHED)
    if not kept or plan is None:
        return ""
    command = "the same command" if plan.skip_bad else "the same command, or with --skip-bad,"
    return f"{kept} of {len(plan.shards)} shards are finished and kept: {command} goes on from there"


def outlook(items: Sequence[Item], form: Format) -> str:
    """What writing a corpus would give, as a table; a few samples of each split are encoded for it.

    Raises:
        UserError: as for `plan_shards`, and for bad input among those samples.
    """
    splits: dict[str, list[_Planned]] = {}
    for shard in plan_shards(items, "", form, {}).shards:
        splits.setdefault(shard.split, []).append(shard)
    tried = 0
    rows = []
    for split, shards in splits.items():
        every = [item for shard in shards for item in shard.items]
        some = [every[n * len(every) // _TRIED] for n in range(_TRIED)] if len(every) > _TRIED else every
        trial, size = _trial(some, form)
        tried += len(some)
        share = len(every) / len(some)
        seconds = share * sum(sum(sample.durations) for sample in trial.samples)
        captions = sum(len(item.captions) for item in every)
        rows.append(SizeEstimate(split, len(every), captions, len(shards), seconds, share * size))
    return outlook_text(rows, tried)


def _trial(items: Sequence[Item], form: Format) -> tuple[Record, int]:
    """Write a few samples into memory: their record and how many bytes of a tar they fill."""
    shard, file = Record("", "", "", ""), io.BytesIO()
    with tarfile.TarFile("", "w", file, format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            _write_sample(tar, file, item, form, shard)
        size = file.tell()
    return shard, size


def sample_key(image_id: str) -> str:
    """The image id as a tar member's name: letters, digits, _ and - only; a changed one gets a hash to stay unique."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)
    if key == image_id and 0 < len(key) <= _KEY_LENGTH:
        return key
    return f"{key[: _KEY_LENGTH - 13]}-{sha256(image_id.encode()).hexdigest()[:12]}"


def _make_shard(folder: Path, plan: _Planned, progress: Progress) -> bool:
    """Write one shard unless it is there, finished, from the same files; tell which."""
    notes = folder / UNFINISHED
    # Before the files are read: if one changes meanwhile, the next run sees another time than this one.
    stamps = {path: stamp(path) for path in files_of(plan.items)}
    files = files_digest(stamps[path] for path in files_of(plan.items))
    finished_one = load_record(notes, plan.name, plan.lists, plan.form.skip_bad)
    if finished_one and finished_one.files == files:
        if finished_one.sources is None:
            finished_one.sources = [_source(path, stamps) for path in files_of(plan.items)]
            finished_one.save(notes)
        progress(len(plan.items))
        return True
    path = folder / plan.name
    sources: list[SourceFile] = []
    shard = Record(plan.name, plan.split, plan.lists, files, sources=sources)
    try:
        # A record of what the tar held before must not be found beside a new tar.
        (notes / f"{plan.name}.json").unlink(missing_ok=True)
        with atomic_write(path) as file, tarfile.TarFile("", "w", file, format=tarfile.USTAR_FORMAT) as tar:
            for item in plan.items:
                # As the stamps, before the files are read.
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


def _source(path: Path, stamps: Mapping[Path, tuple[int, int]]) -> SourceFile:
    return SourceFile(os.path.abspath(path), *stamps[path], crc32(path))


def _write_sample(tar: tarfile.TarFile, file: IO[bytes], item: Item, form: Format, shard: Record) -> None:
    try:
        picture = _picture(item.picture, form)
    except _BadFile as bad:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, str(bad), captions=len(item.captions)))
        return
    spoken = _spoken(item, form, shard.dropped)
    if not spoken:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, "no caption is left", captions=0))
        return
    captions = [caption for caption, _, _ in spoken]
    meta = {"image_id": item.image_id, "split": item.split, "captions": captions}
    if item.twin is not None:
        meta["twin"] = item.twin
    members = {"json": json.dumps(meta, ensure_ascii=False).encode(), "jpg": picture}
    members |= {f"{n}.{form.codec}": audio for n, (_, audio, _) in enumerate(spoken)}
    try:
        _check_sizes(members, item, form)
    except _BadFile as bad:
        shard.dropped.append(Dropped("picture", item.image_id, item.split, str(bad), captions=len(captions)))
        return
    key = sample_key(item.image_id)
    durations, speakers = ([one[name] for one in captions] for name in ("duration", "speaker"))
    sample = Sample(key, item.image_id, item.twin, durations, speakers)
    for ending, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size, info.mode = len(data), 0o644  # the rest stays at its defaults: no time, no owner
        sample.members.append((file.tell() + tarfile.BLOCKSIZE, len(data)))
        tar.addfile(info, io.BytesIO(data))
    shard.samples.append(sample)
    for n, (caption, _, warning) in enumerate(spoken):
        if warning:
            shard.warnings.append(RecordingWarning(caption["utterance"], item.split, shard.name, key, n, warning))


def _check_sizes(members: Mapping[str, bytes], item: Item, form: Format) -> None:
    """Refuse what no reader of shards would take."""
    for ending, data in members.items():
        most = MAX_META if ending == "json" else MAX_MEMBER
        if len(data) > most:
            line = f"picture {item.image_id}: its .{ending} would have {len(data):,} bytes, the limit is {most:,}"
            mend = "shorten its texts" if ending == "json" else "store it smaller"
            raise _droppable(UserError(f"{line}: {mend}"), form)


class _BadFile(Exception):
    """A file that cannot be used and may be dropped."""


def _picture(source: PictureSource, form: Format) -> bytes:
    if not isinstance(source, Path):
        return read_picture(source(), form.short_side, form.quality)
    try:
        return read_picture(source, form.short_side, form.quality)
    except UserError as error:
        raise _droppable(error, form) from None


def _spoken(item: Item, form: Format, dropped: list[Dropped]) -> list[tuple[dict[str, Any], bytes, str | None]]:
    """Description and encoded audio of the usable captions, and what someone should know of them."""
    spoken = []
    for one in item.captions:
        try:
            recording = _audio(one.audio, form)
        except _BadFile as bad:
            dropped.append(Dropped("caption", one.utterance, item.split, str(bad), captions=1))
            continue
        described = {
            "text": one.text,
            "speaker": one.speaker,
            "utterance": one.utterance,
            "duration": len(recording.wave) / SAMPLE_RATE,
        }
        spoken.append((described, encode_audio(recording.wave, form.codec), recording.warning))
    return spoken


def _audio(source: AudioSource, form: Format) -> Recording:
    if not isinstance(source, Path):
        samples, rate = source()
        wave = resample(mix_down(samples), rate)
        return Recording(wave, level_warning(wave))
    try:
        return read_recording(source, form.max_seconds)
    except UserError as error:
        raise _droppable(error, form) from None


def _droppable(error: UserError, form: Format) -> Exception:
    return _BadFile(str(error)) if form.skip_bad else error
