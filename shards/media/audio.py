"""Audio decoding and encoding: any file that libsndfile reads becomes 16 kHz mono, stored as FLAC, WAV or Opus."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from shards.errors import UserError
from shards.media.containers import bytes_after_empty_header, find_spans, samples_extent
from shards.media.media_type import describe_content, read_head
from shards.media.ogg import with_serial_zero
from shards.media.random_access import Content, DamagedAudioError, Span
from shards.media.signal_level import ChannelMixer, LevelMeter, check_audible, check_peak, peak_of

SAMPLE_RATE = 16000
Codec = Literal["flac", "wav", "opus"]
CODECS: tuple[Codec, ...] = get_args(Codec)
MAX_SECONDS = 600.0  # of a caption in a shard

_BLOCK = 1 << 16  # frames decoded at a time; bounds memory with many channels or a wrong header
_MAX_RATE = 192_000
_UNKNOWN = 1 << 62  # at least this many frames: a FLAC written to a pipe, of unknown length
_MAX_IN_MEMORY = 1 << 28  # largest stream in bytes that is decoded from memory
_REPAIR = "fetch the file again, or rewrite it if no more is available, e.g. ffmpeg -i X Y.flac"
# Containers for which truncation is only visible in libsndfile's log.
_LOG = re.compile(r"seems to be (a )?truncated|^Data length \d+ should be \d+", re.IGNORECASE | re.MULTILINE)
_LOGGED = ("MAT4", "VOC", "WVE")


@dataclass(frozen=True)
class Recording:
    """A decoded audio file."""

    wave: np.ndarray  # float32 [n] at 16 kHz in [-1, 1], n > 0
    # Why someone should listen to it, if needed: it is silent, very quiet or clipped, or its channels cancel and only
    # one was kept.
    warning: str | None


def read_audio(source: Path | bytes, max_seconds: float) -> np.ndarray:
    """Decode a file to 16 kHz mono; the format is detected from the content, not from the name.

    Args:
        source: A file, or the bytes of one.
        max_seconds: Longest duration allowed; checked in the header before anything is decoded.

    Returns:
        float32 [n] in [-1, 1], n > 0.

    Raises:
        UserError: The file is missing, empty, not decodable, truncated according to its container, too long or of
            unknown length, or has values that are not finite, an unsupported sampling rate, or an invalid scale (see
            `shards/media/signal_level.py`).
    """
    return read_recording(source, max_seconds).wave


def read_recording(source: Path | bytes, max_seconds: float) -> Recording:
    """Decode a file as `read_audio` does, and add a warning if its level is suspicious.

    Raises:
        UserError: As for `read_audio`.
    """
    name = "audio" if isinstance(source, bytes) else str(source)
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    if size == 0:
        raise UserError(f"{name}: empty file (0 bytes)")
    # Rounding the rate before resampling can add a few samples.
    longest = math.ceil(max_seconds * SAMPLE_RATE)
    parts = list(_decode_all(source, name, max_seconds))
    waves = [resample(part.mono, part.rate, name)[:longest] for part in parts]
    wave = waves[0] if len(waves) == 1 else np.concatenate(waves)
    if len(wave) > longest:
        raise UserError(_too_long(name, len(wave) / SAMPLE_RATE, max_seconds))
    meter = LevelMeter()
    meter.add(wave)
    check_audible(meter.peak, name)
    kept = next((part.kept for part in parts if part.kept is not None), None)
    cancelled = (
        None if kept is None else f"cancelled: the mean of its channels is nearly 0; channel {kept + 1} was kept"
    )
    return Recording(wave, cancelled or meter.warning)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Any, Content]]:
    """Open a source for soundfile and for `Content`; by descriptor, since soundfile trusts the ending of a name."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), Content(source)
        return
    with open(source, "rb") as file:
        yield file.fileno(), Content(file.fileno())


@dataclass(frozen=True)
class _Decoded:
    mono: np.ndarray  # float32 [n]
    rate: int  # Hz
    kept: int | None  # index of the channel used in place of the mean, if the channels cancel


def _decode_all(source: Path | bytes, name: str, max_seconds: float) -> Iterator[_Decoded]:
    """Decode the streams of a file; most files have one."""
    import soundfile

    try:
        with _opened(source) as (opened, content):
            spans = find_spans(content)
            if len(spans) == 1 and not spans[0].header:
                yield _decode(opened, content, spans[0], name, max_seconds)
                return
            for span in spans:
                if span.end - span.start > _MAX_IN_MEMORY:
                    raise UserError(f"{name}: too large for a file whose header does not give its length: rewrite it")
                part = span.header + content.read(span.start, span.end - span.start)
                yield _decode(io.BytesIO(part), Content(part), span, name, max_seconds)
    except DamagedAudioError as error:
        raise UserError(f"{name}: {error}") from None
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        reason = getattr(error, "strerror", None)
        if reason is None and (file_type := describe_content(read_head(source), "audio")):
            raise UserError(f"{name}: cannot be decoded as audio: {file_type}") from None
        reason = reason or str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise UserError(f"{name}: cannot be decoded as audio ({reason})") from None


def _decode(opened: Any, content: Content, span: Span, name: str, max_seconds: float) -> _Decoded:
    import soundfile

    with soundfile.SoundFile(opened, closefd=False) as file:
        _check_rate(file.samplerate, name)
        if file.frames >= _UNKNOWN:
            raise UserError(f"{name}: its header does not give its length: rewrite it, e.g. with ffmpeg")
        # The header of a compressed file may understate the length, so the limit is also enforced while decoding.
        if file.frames > math.ceil(max_seconds * file.samplerate):
            raise UserError(_too_long(name, file.frames / file.samplerate, max_seconds))
        mixer = ChannelMixer()
        blocks = [mixer.add(block.T) for block in _blocks(file, name, max_seconds)]
        _check_complete(file, sum(map(len, blocks)), content, span, name)
        kept = mixer.kept
        if kept is not None:
            file.seek(0)
            blocks = [block[:, kept].copy() for block in _blocks(file, name, max_seconds)]
        return _Decoded(blocks[0] if len(blocks) == 1 else np.concatenate(blocks), file.samplerate, kept)


def _blocks(file: Any, name: str, max_seconds: float) -> Iterator[np.ndarray]:
    """Yield the remaining blocks of an open file, float32 [n, channels]."""
    total, limit = 0, math.ceil(max_seconds * file.samplerate)
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        total += len(block)
        if total > limit:
            raise UserError(_too_long(name, total / file.samplerate, max_seconds))
        yield block


def _check_complete(file: Any, total: int, content: Content, span: Span, name: str) -> None:
    """Check that a file has all samples that its container declares.

    Raises:
        UserError: The file is truncated or has no samples.
    """
    present, declared = float(total), float(file.frames)
    if file.format == "MP3":  # without a header its length is only an estimate
        present, declared = span.fraction * declared, declared if span.fraction < 1 else 0.0
    elif extent := samples_extent(content):
        declared = total / extent.fraction if extent.fraction else math.inf
    elif file.format in _LOGGED and _LOG.search(file.extra_info):
        declared = math.inf
    if present < declared:
        digits = 1 if declared - present > 0.1 * file.samplerate else 3
        expected = f"{declared / file.samplerate:.{digits}f} s" if math.isfinite(declared) else "more"
        actual = f"{present / file.samplerate:.{digits}f} s"
        raise UserError(f"{name}: truncated: its header declares {expected}, the file has {actual}: {_REPAIR}")
    if total:
        return
    if extra := bytes_after_empty_header(content):
        hint = "if they are its samples, rewrite it, e.g. ffmpeg -ignore_length 1 -i X.wav Y.wav"
        raise UserError(
            f"{name}: its header declares 0 samples, but {extra:,} bytes follow, as after an interrupted "
            f"recording: {hint}"
        )
    raise UserError(f"{name}: has no audio (0 samples)")


def _too_long(name: str, seconds: float, max_seconds: float) -> str:
    return f"{name}: {seconds:.1f} s of audio or more, the longest allowed is {max_seconds:g} s (--max-seconds)"


def mix_down(samples: np.ndarray) -> np.ndarray:
    """Average the channels, or return the loudest if they cancel: float32 [channels, n] or [n] to [n]."""
    if samples.ndim == 1:
        return samples
    mixer = ChannelMixer()
    mono = mixer.add(np.asarray(samples, np.float32))
    return mono if mixer.kept is None else samples[mixer.kept]


def resample(wave: np.ndarray, rate: int, name: str = "audio") -> np.ndarray:
    """Resample float32 [n] at `rate` Hz to 16 kHz, clipped to [-1, 1].

    Raises:
        UserError: The rate is unsupported, or samples are not finite or have an invalid scale.
    """
    _check_rate(rate, name)
    peak = peak_of(wave)
    check_peak(peak, name)
    if rate != SAMPLE_RATE:
        import torch

        with torch.inference_mode():
            wave = _resampler(rate)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
    elif peak <= 1:
        return wave
    return np.clip(wave, -1.0, 1.0)


def _check_rate(rate: int, name: str) -> None:
    if not 1000 <= rate <= _MAX_RATE:
        raise UserError(f"{name}: sampling rate {rate} Hz, expected 1,000 to {_MAX_RATE:,} Hz")


@lru_cache(maxsize=8)
def _resampler(rate: int) -> Any:
    # torchaudio's windowed-sinc resampling; cached, since creating the filter costs more than applying it.
    from torchaudio.transforms import Resample

    if rate // math.gcd(rate, SAMPLE_RATE) > 1000:
        # The filter bank grows with the reduced rates; rounding to 25 Hz keeps it small and is inaudible.
        rate = round(rate / 25) * 25
    return Resample(rate, SAMPLE_RATE)


def encode_audio(wave: np.ndarray, codec: Codec) -> bytes:
    """Encode float32 [n] at 16 kHz; FLAC and WAV have 16 bits, lossless for 16-bit audio.

    The same samples give the same bytes.
    """
    import soundfile

    buffer = io.BytesIO()
    if codec == "opus":
        soundfile.write(buffer, wave, SAMPLE_RATE, format="OGG", subtype="OPUS")
        return with_serial_zero(buffer.getvalue())
    pcm = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    soundfile.write(buffer, pcm, SAMPLE_RATE, format=codec.upper(), subtype="PCM_16")
    return buffer.getvalue()


def decode_audio(data: bytes) -> np.ndarray:
    """Decode the output of `encode_audio` to float32 [n] at 16 kHz, n > 0.

    Raises:
        UserError: The audio is not decodable, not 16 kHz mono, by its header longer than `MAX_SECONDS`, empty, or not
            finite.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.samplerate != SAMPLE_RATE or file.channels != 1:
                shape = f"{file.samplerate} Hz and {file.channels} channels"
                raise UserError(f"audio of {shape} in a shard, expected {SAMPLE_RATE} Hz mono")
            if file.frames >= _UNKNOWN:
                raise UserError(f"audio of {len(data)} bytes in a shard does not give its length in its header")
            if file.frames > MAX_SECONDS * SAMPLE_RATE:
                raise UserError(
                    f"audio of {file.frames / SAMPLE_RATE:.1f} s in a shard, the longest allowed is {MAX_SECONDS:g} s"
                )
            wave = file.read(dtype="float32")
            floats = file.subtype in ("FLOAT", "DOUBLE")
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise UserError(f"audio of {len(data)} bytes cannot be decoded ({error})") from None
    if not len(wave) or (floats and not np.isfinite(wave).all()):
        problem = "samples that are not finite" if len(wave) else "no samples"
        raise UserError(f"audio of {len(data)} bytes in a shard has {problem}")
    return wave
