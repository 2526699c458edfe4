"""A page of check_shards: pictures, audio, captions and histograms in one HTML file without scripts or links."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup

from shards.checking.check import CheckResult, split_rows
from shards.checking.check_shard import STOCK_PICTURES, problem_of_audio, problem_of_picture, text
from shards.errors import UserError
from shards.html.chart import histogram, waveform
from shards.html.render import audio_url, data_url, write_html
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE
from shards.reading.reader import MAX_META

SHOWN = 24  # samples
_MAX_BYTES = 2 << 20  # of a picture or audio file that is shown
_MAX_CAPTIONS = 5  # shown per sample


@dataclass(frozen=True)
class Section:
    """A title and cards with a picture and recordings each; see the macro `sample` of `shards/html/parts.html`."""

    title: str
    cards: list[dict[str, Any]]


def write_page(
    path: Path, result: CheckResult, advice: Sequence[str] = (), further: Callable[[Manifest], Section] | None = None
) -> None:
    """Write the page atomically, with `advice` below the summary and the section of `further` before the samples.

    Raises:
        UserError: The file cannot be written.
    """
    m = result.manifest
    charts: list[Markup] = []
    sections: list[Section] = []
    if m is not None and len(m.key):
        charts = _histograms(m)
        sections = [*([further(m)] if further else []), _samples(m)]
    values = {"title": f"Shards: {result.folder}", "result": result, "advice": advice, "charts": charts}
    splits = [_split(row) for row in split_rows(m)] if m is not None else []
    try:
        write_html(path, Path(__file__).with_name("page.html"), **values, splits=splits, sections=sections)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _split(row: dict[str, Any]) -> list[str]:
    counts = [f"{row['pictures']:,}", f"{row['captions']:,}", f"{row['hours']:,.2f}"]
    return [row["split"], *counts, f"{row['shards']:,}", f"{row['megabytes']:,.1f}"]


def _histograms(m: Manifest) -> list[Markup]:
    return [
        histogram("Duration of a caption", m.duration, "seconds"),
        histogram("Captions of a picture", np.diff(m.first_caption)),
        histogram("Size of a picture", m.image_bytes / 1e3, "kB"),
        histogram("Size of an audio file", m.audio_bytes / 1e3, "kB"),
    ]


def _samples(m: Manifest) -> Section:
    """Show evenly spaced samples of each split, in proportion to its size and at least one."""
    rows: list[int] = []
    for split in m.splits:
        samples = m.rows(split)
        count = min(len(samples), max(1, round(SHOWN * len(samples) / len(m.key))))
        rows += samples[np.linspace(0, len(samples) - 1, count).round().astype(int)].tolist()
    return Section(f"{len(rows)} of {len(m.key):,} samples", [_card(m, row) for row in rows])


def _card(m: Manifest, sample: int) -> dict[str, Any]:
    name, rows = m.shards[m.shard[sample]].name, list(m.captions(sample))
    try:
        with open(m.folder / name, "rb", opener=_open_nonblocking) as file:
            picture = _read(file, m.image_offset[sample], m.image_bytes[sample])
            meta = _read(file, m.meta_offset[sample], m.meta_bytes[sample])
            audio = [_read(file, m.audio_offset[row], m.audio_bytes[row]) for row in rows[:_MAX_CAPTIONS]]
    except OSError as error:
        return card(text(m.image_id[sample]), problem=f"{name}: {error.strerror}")
    problem = _too_large(picture) or problem_of_picture(picture, True, STOCK_PICTURES)
    texts = _caption_texts(meta, len(rows))
    hidden = len(rows) - _MAX_CAPTIONS
    return card(
        text(m.image_id[sample]),
        [_caption(*one) for one in zip(audio, m.duration[rows].tolist(), texts, strict=False)],
        note=f"{name}, {m.image_bytes[sample]:,} bytes",
        picture=None if problem else data_url("image/jpeg", picture),
        problem=problem,
        more=f"and {hidden} more captions" if hidden > 0 else "",
    )


def card(title: str, recordings: Sequence[dict[str, Any]] = (), **values: Any) -> dict[str, Any]:
    """Return the values of a card; see the macro `sample` of `shards/html/parts.html`."""
    return {
        "note": "",
        "picture": None,
        "problem": None,
        "more": "",
        **values,
        "title": title,
        "recordings": recordings,
    }


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in place of a shard would block


def _read(file: io.BufferedReader, offset: int, count: int) -> bytes:
    file.seek(int(offset))
    return file.read(min(int(count), _MAX_BYTES + 1))


def _too_large(data: bytes) -> str | None:
    return "too large to show" if len(data) > _MAX_BYTES else None


def _caption_texts(meta: bytes, count: int) -> list[tuple[str, str]]:
    """Return text of each caption, and its speaker and language; placeholders if the JSON cannot be read."""
    unknown = [("(no text)", "")] * count
    try:
        captions = json.loads(meta)["captions"] if len(meta) <= MAX_META else []
        texts = [(str(one["text"] or "(no text)"), _said_by(one["speaker"], one.get("language"))) for one in captions]
        return texts[:count] + unknown
    except (ValueError, KeyError, TypeError, RecursionError):
        return unknown


def _said_by(speaker: Any, language: Any) -> str:
    return f"{speaker or 'no speaker'}, {language}" if language else str(speaker or "no speaker")


def _caption(data: bytes, duration: float, text_and_speaker: tuple[str, str]) -> dict[str, Any]:
    spoken, speaker = (value[:1000] for value in text_and_speaker)
    problem = _too_large(data) or problem_of_audio(data, duration, decode=False)[0]
    return recording(data, f"{speaker}, {duration:.2f} s", problem, text=spoken)


def recording(data: bytes, note: str, problem: str | None = None, **values: Any) -> dict[str, Any]:
    """Return the values of a recording of a card, with its waveform.

    Args:
        data: An audio file whose header is within bounds, unless there is a problem.
        note: A line about it.
        problem: Why it is not shown.
        values: Further values: "text", "picture".
    """
    values = {"text": "", "picture": None, **values, "note": note, "problem": problem, "waveform": "", "audio": None}
    if problem is None:
        values["audio"] = audio_url(data)
        try:
            wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
            values["waveform"] = waveform(wave, SAMPLE_RATE)
        except soundfile.SoundFileError as error:
            values["problem"] = f"cannot be decoded ({error})"
    return values
