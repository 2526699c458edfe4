"""A page of check_shards: pictures, audio, captions and histograms in one HTML file without scripts or links."""

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import soundfile

from shards.checking.check import CheckResult, split_rows
from shards.checking.check_shard import problem_of_audio, problem_of_picture, text
from shards.errors import UserError
from shards.files import atomic_write
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE
from shards.reading.reader import MAX_META

SHOWN = 24  # samples
_MAX_BYTES = 2 << 20  # of a picture or audio file that is shown
_MAX_CAPTIONS = 5  # shown per sample
_BINS = 30
_MIME = {b"fLaC": "audio/flac", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}
_WAVE = (300, 44)  # width and height of a waveform

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%s</title>
<style>
:root { --text: #1d2329; --soft: #616b75; --line: #dfe3e7; --back: #f5f6f8; --card: #fff; --ink: #2f6f9f;
  --good: #2c7a4b; --bad: #b3352c; --warn: #8a6100 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7eb; --soft: #98a3ad; --line: #343c44; --back: #14181c;
  --card: #1c2228; --ink: #6fb0dd; --good: #6bbf8a; --bad: #ee8378; --warn: #dcb25a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.5rem 0 .8rem }
p { margin: .3rem 0 } .soft, small { color: var(--soft) }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
.verdict { font-weight: 650; font-size: 1.1rem }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 500 }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
ul { margin: 0; padding-left: 1.2rem } li { overflow-wrap: anywhere }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%%), 1fr)) }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%%), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; min-width: 0 }
.card > div { padding: .7rem .9rem }
.card > img { display: block; width: 100%%; height: 14rem; object-fit: contain; background: var(--line) }
.card h3 { margin: 0; font-size: .9rem; overflow-wrap: anywhere }
.caption img { display: block; max-width: 100%% }
.caption { margin-top: .7rem; padding-top: .6rem; border-top: 1px solid var(--line) }
svg { display: block; width: 100%%; height: auto; fill: var(--ink) }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
audio { width: 100%%; height: 2.2rem; margin-top: .4rem }
</style></head><body>
"""


def write_page(
    path: Path, result: CheckResult, advice: Sequence[str] = (), further: Callable[[Manifest], list[str]] | None = None
) -> None:
    """Write the page atomically.

    Args:
        path: The file to write.
        result: The result of `check_folder`.
        advice: Lines shown at the end of the summary.
        further: Makes a further section, before the samples.

    Raises:
        UserError: The file cannot be written.
    """
    page = "\n".join([_HEAD % escape(f"Shards: {result.folder}"), *_summary(result, advice)])
    if result.manifest is not None and len(result.manifest.key):
        section = further(result.manifest) if further else []
        page += "\n".join([*_histograms(result.manifest), *section, *_cards(result.manifest)])
    try:
        with atomic_write(path) as file:
            # A name in a damaged tar may contain lone surrogates.
            file.write(f"{page}\n</body></html>\n".encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _summary(result: CheckResult, advice: Sequence[str]) -> list[str]:
    lines = [f"<h1>{escape(str(result.folder))}</h1>"]
    lines.append(f'<p class="verdict {"good" if result.healthy else "bad"}">{escape(result.verdict)}</p>')
    if (m := result.manifest) is not None:
        lines.append(f'<p class="soft">corpus {escape(str(m.corpus))}, hash {escape(str(m.hash)[:12])}</p>')
        lines.append("<h2>Splits</h2><table><tr><th>split<th>pictures<th>captions<th>hours<th>shards<th>MB</tr>")
        for row in split_rows(m):
            cells = [escape(row["split"]), f"{row['pictures']:,}", f"{row['captions']:,}", f"{row['hours']:,.2f}"]
            cells += [f"{row['shards']:,}", f"{row['megabytes']:,.1f}"]
            lines.append(f"<tr>{''.join(f'<td>{cell}' for cell in cells)}</tr>")
        lines.append("</table>")
    for title, kind, findings in (("Problems", "bad", result.problems), ("Warnings", "warn", result.warnings)):
        if findings:
            items = "".join(f'<li class="{kind}">{escape(str(finding))}</li>' for finding in findings)
            lines.append(f"<h2>{title}</h2><ul>{items}</ul>")
    if advice:
        lines.append(f"<h2>Advice</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in advice)}</ul>")
    return lines


def _histograms(m: Manifest) -> list[str]:
    columns = [
        ("Duration of a caption, seconds", m.duration),
        ("Captions of a picture", np.diff(m.first_caption)),
        ("Size of a picture, kB", m.image_bytes / 1e3),
        ("Size of an audio file, kB", m.audio_bytes / 1e3),
    ]
    figures = [f'<div class="card"><div><h3>{title}</h3>{_histogram(values)}</div></div>' for title, values in columns]
    return ["<h2>Distributions</h2>", f'<div class="grid charts">{"".join(figures)}</div>']


def _histogram(values: np.ndarray) -> str:
    """Draw a histogram as SVG: a bar per value for integers of a small range; the last includes the largest 0.1 %."""
    if not len(values):
        return '<p class="soft">none</p>'
    low, high = float(values.min()), float(np.quantile(values, 0.999))
    if values.dtype.kind == "i" and high - low < _BINS:
        edges = np.arange(low - 0.5, high + 1.5)
    else:
        edges = np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    width, height = 300, 90
    step = width / max(8, len(counts))
    bars = [
        f'<rect x="{n * step:.1f}" y="{height - tall:.1f}" width="{max(1.0, step - 2):.1f}" height="{tall:.1f}">'
        f"<title>{max(edges[n], 0):.4g} to {edges[n + 1]:.4g}: {count:,}</title></rect>"
        for n, count in enumerate(counts.tolist())
        if (tall := height * count / max(1, counts.max()))
    ]
    if values.dtype.kind == "i" and len(counts) < _BINS:
        marks = [(n * step + step / 2, "middle", f"{round((edges[n] + edges[n + 1]) / 2)}") for n in range(len(counts))]
        marks = marks[:: max(1, len(marks) // 10)]
    else:
        marks = [(0, "start", f"{low:.3g}"), (width, "end", f"{edges[-1]:.3g}")]
        marks.insert(1, (width / 2, "middle", f"{(edges[0] + edges[-1]) / 2:.3g}"))
    labels = [
        f'<text x="{x:.1f}" y="{height + 14}" text-anchor="{anchor}">{label}</text>' for x, anchor, label in marks
    ]
    statistics = f"median {np.median(values):.4g}, mean {values.mean():.4g}, largest {values.max():.4g}"
    svg = f'<svg viewBox="0 -4 {width} {height + 24}" role="img">{"".join(bars + labels)}</svg>'
    return f"{svg}<small>{statistics}</small>"


def _cards(m: Manifest) -> list[str]:
    """Show evenly spaced samples of each split, in proportion to its size and at least one."""
    rows: list[int] = []
    for split in m.splits:
        samples = m.rows(split)
        count = min(len(samples), max(1, round(SHOWN * len(samples) / len(m.key))))
        rows += samples[np.linspace(0, len(samples) - 1, count).round().astype(int)].tolist()
    cards = "".join(_card(m, row) for row in rows)
    return [f"<h2>{len(rows)} of {len(m.key):,} samples</h2>", f'<div class="grid">{cards}</div>']


def _card(m: Manifest, sample: int) -> str:
    name, rows = m.shards[m.shard[sample]].name, list(m.captions(sample))
    try:
        with open(m.folder / name, "rb", opener=_open_nonblocking) as file:
            picture = _read(file, m.image_offset[sample], m.image_bytes[sample])
            meta = _read(file, m.meta_offset[sample], m.meta_bytes[sample])
            audio = [_read(file, m.audio_offset[row], m.audio_bytes[row]) for row in rows[:_MAX_CAPTIONS]]
    except OSError as error:
        return f'<div class="card"><div class="bad">{escape(name)}: {escape(str(error.strerror))}</div></div>'
    problem = _too_large(picture) or problem_of_picture(picture, decode=True)
    shown = (
        f'<div class="bad">{escape(problem)}</div>'
        if problem
        else f'<img alt="" src="{data_url("image/jpeg", picture)}">'
    )
    texts = _caption_texts(meta, len(rows))
    captions = [_caption(*one) for one in zip(audio, m.duration[rows].tolist(), texts, strict=False)]
    if len(rows) > _MAX_CAPTIONS:
        captions.append(f'<div class="caption soft">and {len(rows) - _MAX_CAPTIONS} more captions</div>')
    title = f"<h3>{escape(text(m.image_id[sample]))}</h3><small>{escape(name)}, {m.image_bytes[sample]:,} bytes</small>"
    return f'<div class="card">{shown}<div>{title}{"".join(captions)}</div></div>'


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in place of a shard would block


def _read(file: io.BufferedReader, offset: int, count: int) -> bytes:
    file.seek(int(offset))
    return file.read(min(int(count), _MAX_BYTES + 1))


def _too_large(data: bytes) -> str | None:
    return "too large to show" if len(data) > _MAX_BYTES else None


def _caption_texts(meta: bytes, count: int) -> list[tuple[str, str]]:
    """Return text and speaker of each caption, or placeholders if the JSON cannot be read."""
    unknown = [("(no text)", "")] * count
    try:
        captions = json.loads(meta)["captions"] if len(meta) <= MAX_META else []
        texts = [(str(one["text"] or "(no text)"), str(one["speaker"] or "no speaker")) for one in captions]
        return texts[:count] + unknown
    except (ValueError, KeyError, TypeError, RecursionError):
        return unknown


def _caption(data: bytes, duration: float, text_and_speaker: tuple[str, str]) -> str:
    spoken, speaker = (escape(value[:1000]) for value in text_and_speaker)
    problem = _too_large(data) or problem_of_audio(data, duration, decode=False)[0]
    lines = f'<div class="caption"><p>{spoken}</p><small>{speaker}, {duration:.2f} s</small>'
    if problem:
        return f'{lines}<p class="bad">{escape(problem)}</p></div>'
    mime = _MIME.get(data[:4], "application/octet-stream")
    return f'{lines}{draw_waveform(data)}<audio controls preload="none" src="{data_url(mime, data)}"></audio></div>'


def draw_waveform(data: bytes) -> str:
    """Draw the envelope of an audio file as SVG: a bar per interval, as high as its largest sample."""
    width, height = _WAVE
    try:
        wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")  # its header is within bounds, see `_caption`
    except soundfile.SoundFileError as error:
        return f'<p class="bad">cannot be decoded ({escape(str(error))})</p>'
    bars = width // 3
    starts = np.unique(np.linspace(0, len(wave) - 1, bars, endpoint=False).astype(int))
    peaks = np.maximum.reduceat(np.abs(wave), starts)
    tall = np.maximum(1.0, height * np.minimum(1.0, peaks / max(float(peaks.max()), 0.05)))
    bars_svg = "".join(
        f'<rect x="{3 * n}" y="{(height - high) / 2:.1f}" width="2" height="{high:.1f}" rx="1"/>'
        for n, high in enumerate(tall.tolist())
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{len(wave) / SAMPLE_RATE:.2f} s">{bars_svg}</svg>'
    )


def data_url(mime: str, data: bytes) -> str:
    """Encode bytes as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
