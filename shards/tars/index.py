"""An index over tars as they are: manifest, index and report beside them, and no byte of a tar is changed.

A tar fits if its samples have one picture in JPEG, PNG or WebP and captions at 16 kHz mono, if its keys consist of
letters, digits, _ and - and occur once, and if all its samples are of one split. Captions are described by the JSON of
our shards, by a JSON with `text`, `speaker` and `language`, or by a text; `Reader.meta` reads all three.
"""

import io
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards import manifest
from shards.checking.check_shard import KEY, STOCK_PICTURES, problem_of_audio, problem_of_picture
from shards.checking.duplicates import Digests, digest, find_duplicates, gather_digests
from shards.corpora.records import BadRecord, optional_text
from shards.errors import UserError
from shards.files import file_sha256, listed
from shards.media.audio import SAMPLE_RATE
from shards.progress import Progress, progress_bar
from shards.reading.reader import MAX_MEMBER, MAX_META, caption_metadata
from shards.report import AudioWarning, Dropped, Report
from shards.tars.members import TarMember, list_tar
from shards.tars.samples import (
    DEFAULT_SPLIT,
    Layout,
    StockSample,
    StockTar,
    group,
    natural_order,
    split_of,
)
from shards.worker_pool import run_tasks
from shards.writing.folder_lock import UNFINISHED
from shards.writing.shard_record import SampleRecord, ShardRecord, gather
from shards.writing.sources import split_order

logger = logging.getLogger(__name__)

_MB = 1 << 20


@dataclass(frozen=True)
class IndexOptions:
    """How tars are indexed."""

    layout: Layout = field(default_factory=Layout)
    splits: tuple[str, ...] = ()  # NAME=PATTERN
    skip_bad: bool = False  # leave samples that do not fit out of the index


@dataclass
class _IndexedTar:
    record: ShardRecord
    digests: Digests
    unnamed: bool  # whether nothing says its split


def index_folder(folder: Path, name: str, options: IndexOptions, jobs: int = 1, restart: bool = False) -> Report:
    """Write the manifest of a folder of tars; it appears when all tars have been read and decoded once.

    Raises:
        UserError: A sample or a tar does not fit, there are duplicates, or the folder has shards of make_shards.
    """
    paths = _tars(folder, restart)
    total = sum(path.stat().st_size for path in paths.values()) // _MB + len(paths)
    with progress_bar(total, "MB", "indexing") as progress:
        tars = dict(run_tasks(partial(_index_tar, options), paths, jobs, progress))
    ordered = sorted(tars.values(), key=lambda one: (split_order(one.record.split), natural_order(one.record.name)))
    used = [one for one in ordered if one.record.samples]
    gathered = gather(one.record for one in ordered)
    if not used:
        reason = f": {gathered.report.dropped[0].reason}" if gathered.report.dropped else ""
        raise UserError(f"no sample of {folder} fits{reason}")
    if unnamed := [one.record.name for one in used if one.unnamed]:
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        logger.warning(
            "no split in the name of %s%s: all is %s (--split NAME=PATTERN)", unnamed[0], more, DEFAULT_SPLIT
        )
    columns: dict[str, Any] = {
        column: np.asarray(values, manifest.COLUMNS[column]) for column, values in gathered.columns().items()
    }
    made = manifest.Manifest(folder, name, "", tuple(gathered.shards), tuple(gathered.splits), **columns)
    _check_duplicates(made, [one.digests for one in used])
    report = gathered.report.save(folder)
    layout = {name: list(endings) for name, endings in vars(options.layout).items()}
    arguments = {"corpus": manifest.INDEXED, "split": list(options.splits), **layout}
    manifest.save(folder, name, gathered.shards, gathered.splits, columns, arguments, report)
    return gathered.report


def _tars(folder: Path, restart: bool) -> dict[str, Path]:
    """Return the tars of a folder that may be indexed, by name."""
    names = {path.name: path for path in listed(folder)}
    if manifest.MANIFEST in names:
        if not manifest.load(folder).indexed:
            raise UserError(f"{folder} has the manifest of make_shards: it needs no index")
        if not restart:
            raise UserError(f"{folder} has an index already: --restart makes it again")
    if UNFINISHED in names:
        raise UserError(f"{folder} has the shards of an unfinished make_shards: finish it by the same command")
    tars = {name: names[name] for name in sorted(names, key=natural_order) if name.endswith(".tar")}
    if not tars:
        deeper = next(folder.glob("*/*.tar"), None)
        hint = f"index {deeper.parent} and its like one by one, or" if deeper else "name another folder, or"
        raise UserError(f"{folder} has no tar: {hint} write shards by make_shards.py webdataset --root {folder}")
    for name in tars:
        if not manifest.SHARD_NAME.fullmatch(name):
            raise UserError(f"{folder / name}: the name has to consist of letters, digits, _, . and -: rename it")
    return tars


def _index_tar(options: IndexOptions, path: Path, progress: Progress) -> _IndexedTar:
    """Read and check one tar.

    Raises:
        UserError: It does not fit, or changed meanwhile.
    """
    before, location = os.stat(path), os.path.abspath(path)
    tar = group(location, list_tar(location, options.layout.is_text), options.layout)
    split = _split(tar, options)
    shard = ShardRecord(path.name, split or DEFAULT_SPLIT, "", "", bytes=before.st_size, sha256=file_sha256(path))
    checker, shown = _Checker(shard, options.skip_bad), 0
    for sample in tar.samples:
        checker.add(sample)
        read = max((member.offset for member in (*sample.pictures, *sample.audio.values())), default=0) // _MB
        progress(max(0, read - shown))
        shown = max(shown, read)
    progress(before.st_size // _MB + 1 - shown)
    for key, reason in tar.problems:
        checker.leave_out(key or "the rest", reason, 0)
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path} changed while it was read: run the same command again")
    return _IndexedTar(shard, checker.digests, split is None)


def _split(tar: StockTar, options: IndexOptions) -> str | None:
    """Return the split of a tar; None if nothing says it.

    Raises:
        UserError: No pattern matches the tar, or its samples are of several splits.
    """
    split = split_of(tar.location, options.splits)
    if options.splits:
        if split is None:
            raise UserError(f"{tar.location}: no --split pattern matches it")
        return split
    named: dict[str | None, str] = {}  # split in the JSON -> first key
    for sample in tar.samples:
        with suppress(BadRecord, ValueError):  # reported when the sample is checked
            named.setdefault(optional_text(sample.record(), "split"), sample.key)
    if len(named) > 1:
        some = " and ".join(f"{key} of {name or 'no split'}" for name, key in list(named.items())[:2])
        raise UserError(
            f"{tar.location} has samples of several splits ({some}), which an index cannot hold: write shards by "
            "make_shards.py webdataset, or name one by --split NAME=PATTERN"
        )
    return next(iter(named), None) or split


class _Checker:
    """Collects the samples of a tar that fit."""

    def __init__(self, shard: ShardRecord, skip_bad: bool) -> None:
        self.shard, self.skip_bad, self.digests = shard, skip_bad, Digests(0, 0)

    def add(self, sample: StockSample) -> None:
        """Check a sample, and add it or leave it out."""
        try:
            self._add(sample)
        except (BadRecord, ValueError) as error:
            self.leave_out(sample.key, str(error), len(sample.audio))

    def leave_out(self, key: str, reason: str, captions: int) -> None:
        """Note a sample that does not fit.

        Raises:
            UserError: Such samples are not skipped.
        """
        if not self.skip_bad:
            hint = "--skip-bad leaves such samples out, make_shards.py webdataset writes shards of them"
            raise UserError(f"{self.shard.name}: {key}: {reason}; {hint}")
        self.shard.dropped.append(Dropped("picture", key, self.shard.split, f"{self.shard.name}: {reason}", captions))

    def _add(self, sample: StockSample) -> None:
        if not KEY.fullmatch(sample.key):
            raise BadRecord("a key has to consist of letters, digits, _ and -")
        if len(sample.pictures) != 1 or not sample.audio:
            what = f"{len(sample.pictures)} pictures" if len(sample.pictures) != 1 else "no audio"
            raise BadRecord(f"has {what}: a sample needs one picture and its captions")
        own, (description, span) = sample.record(), _description(sample)
        split, image_id = optional_text(own, "split"), optional_text(own, "image_id") or sample.key
        if split is not None and not manifest.SPLIT.fullmatch(split):
            raise BadRecord(f"split is {split!r}, expected a name of letters, digits, _ and - only")
        picture = _read(sample.pictures[0])
        if problem := problem_of_picture(picture, True, STOCK_PICTURES):
            raise BadRecord(f"{sample.pictures[0].name}: {problem}")
        record = SampleRecord(sample.key, image_id, optional_text(own, "twin"), [], [])
        record.members += [span, (sample.pictures[0].offset, sample.pictures[0].size)]
        captions, warnings, audio = caption_metadata(description, sample.key, len(sample.audio)), [], b""
        for number, (member, caption) in enumerate(zip(sample.audio.values(), captions, strict=True)):
            data = _read(member)
            seconds, warning = _check_audio(member, data, caption.get("duration"))
            record.durations.append(seconds)
            record.speakers.append(caption["speaker"])
            record.members.append((member.offset, member.size))
            audio += digest(data)
            if warning:
                where = self.shard.split, self.shard.name, sample.key, number
                warnings.append(AudioWarning(caption["utterance"], *where, warning))
        self.shard.samples.append(record)
        self.shard.warnings += warnings
        self.digests.pictures += digest(picture)
        self.digests.audio_files += audio
        self.digests.utterances += b"".join(digest(one["utterance"].encode()) for one in captions)


def _description(sample: StockSample) -> tuple[bytes, tuple[int, int]]:
    """Return the member that describes the captions, JSON or text, and its offset and size; empty if there is none."""
    for contents, members in ((sample.json, sample.json_members), (sample.texts, sample.text_members)):
        part = "" if "" in contents else next(iter(sample.audio)) if len(sample.audio) == 1 else ""
        if part in contents:
            data, member = contents[part], members[part]
            if data is None:
                raise BadRecord(f"{member.name} has {member.size:,} bytes, the limit is {MAX_META:,}")
            return data, (member.offset, member.size)
    return b"", (0, 0)


def _read(member: TarMember) -> bytes:
    if member.size > MAX_MEMBER:
        raise BadRecord(f"{member.name} has {member.size:,} bytes, the limit is {MAX_MEMBER:,}")
    return member.read()


def _check_audio(member: TarMember, data: bytes, duration: float | None) -> tuple[float, str | None]:
    """Decode a caption, and return its duration in seconds, as described or else of the file, and a warning."""
    import soundfile

    if duration is None:
        with suppress(soundfile.SoundFileError, TypeError, OSError):  # reported below
            duration = soundfile.info(io.BytesIO(data)).frames / SAMPLE_RATE
    problem, warning = problem_of_audio(data, duration or 0.0, decode=True)
    if problem:
        raise BadRecord(f"{member.name}: {problem}")
    return duration or 0.0, warning


def _check_duplicates(made: manifest.Manifest, digests: Sequence[Digests]) -> None:
    """Refuse ids that occur twice and what is in two splits, and warn about other duplicates."""
    problems, warnings = find_duplicates(made, gather_digests(digests))
    if problems:
        more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}: make_shards.py webdataset joins samples of one image_id")
    for finding in warnings:
        logger.warning("%s", finding)
