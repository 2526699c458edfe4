"""Speech in and out: any file that libsndfile decodes becomes float32 mono at 16 kHz; shards hold FLAC, WAV or Opus."""

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
from shards.media.containers import bytes_behind_nothing, find_spans, samples_extent
from shards.media.media_type import describe_content, read_head
from shards.media.ogg import with_serial_zero
from shards.media.random_access import Content, DamagedRecording, Span
from shards.media.signal_level import ChannelMixer, LevelMeter, check_audible, check_peak, peak_of

SAMPLE_RATE = 16000
Codec = Literal["flac", "wav", "opus"]
CODECS: tuple[Codec, ...] = get_args(Codec)
MAX_SECONDS = 600.0  # of a caption in a shard

_BLOCK = 1 << 16  # frames decoded at a time, so that many channels or a wrong header never fill the memory
_MAX_RATE = 192_000
_UNKNOWN = 1 << 62  # frames or more: a FLAC that was written to a pipe does not say how many it has
_MAX_IN_MEMORY = 1 << 28  # bytes of a stream that is decoded from memory
_AGAIN = "fetch the file again, or write it anew if this is all there is, e.g. ffmpeg -i X Y.flac"
# Containers of which only libsndfile's log tells that the file is shorter than its header says.
_LOG = re.compile(r"seems to be (a )?truncated|^Data length \d+ should be \d+", re.IGNORECASE | re.MULTILINE)
_LOGGED = ("MAT4", "VOC", "WVE")


@dataclass(frozen=True)
class Recording:
    """A decoded file.

    Attributes:
        wave: float32 [n] at 16 kHz in [-1, 1], n > 0.
        warning: What someone should know of it, if anything: that it is silent, very quiet or clipped, or that its
            channels cancel and one was kept.
    """

    wave: np.ndarray
    warning: str | None


def read_audio(source: Path | bytes, max_seconds: float) -> np.ndarray:
    """Decode a file by its content, whatever its name, and bring it to mono at 16 kHz.

    Args:
        source: A file, or the bytes of one.
        max_seconds: Longest duration allowed; checked from the header before anything is decoded.

    Returns:
        float32 [n] in [-1, 1], n > 0.

    Raises:
        UserError: No such file, empty, not decodable, truncated by what its container says, too long or of no known
            length, not finite, of a rate that is no speech's, or of a scale that is no audio's (see
            `shards/media/signal_level.py`).
    """
    return read_recording(source, max_seconds).wave


def read_recording(source: Path | bytes, max_seconds: float) -> Recording:
    """Decode a file as `read_audio` does, and tell what someone should know of it.

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
    # A rate that is rounded before resampling makes it a few samples longer.
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
    """What soundfile takes, a file by its number, since it would believe the ending of a name; and the same to read."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), Content(source)
        return
    with open(source, "rb") as file:
        yield file.fileno(), Content(file.fileno())


@dataclass(frozen=True)
class _Decoded:
    mono: np.ndarray  # float32 [n]
    rate: int  # Hz
    kept: int | None  # channel that stands for all, from 0, where their mean cancels


def _decode_all(source: Path | bytes, name: str, max_seconds: float) -> Iterator[_Decoded]:
    """Decode the streams of a file; nearly all have one."""
    import soundfile

    try:
        with _opened(source) as (opened, content):
            spans = find_spans(content)
            if len(spans) == 1 and not spans[0].header:
                yield _decode(opened, content, spans[0], name, max_seconds)
                return
            for span in spans:
                if span.end - span.start > _MAX_IN_MEMORY:
                    raise UserError(
                        f"{name}: too large for a file whose header does not tell its length: write it anew"
                    )
                part = span.header + content.read(span.start, span.end - span.start)
                yield _decode(io.BytesIO(part), Content(part), span, name, max_seconds)
    except DamagedRecording as damage:
        raise UserError(f"{name}: {damage}") from None
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        reason = getattr(error, "strerror", None)
        if reason is None and (content_is := describe_content(read_head(source), "audio")):
            raise UserError(f"{name}: cannot be decoded as audio: {content_is}") from None
        reason = reason or str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise UserError(f"{name}: cannot be decoded as audio ({reason})") from None


def _decode(opened: Any, content: Content, span: Span, name: str, max_seconds: float) -> _Decoded:
    import soundfile

    with soundfile.SoundFile(opened, closefd=False) as file:
        _check_rate(file.samplerate, name)
        if file.frames >= _UNKNOWN:
            raise UserError(f"{name}: its header does not give its length: write it anew, as ffmpeg does")
        # The header of a compressed file may understate, so the limit is kept while decoding too.
        if file.frames > math.ceil(max_seconds * file.samplerate):
            raise UserError(_too_long(name, file.frames / file.samplerate, max_seconds))
        mixer = ChannelMixer()
        blocks = [mixer.add(block.T) for block in _blocks(file, name, max_seconds)]
        _check_whole(file, sum(map(len, blocks)), content, span, name)
        kept = mixer.kept
        if kept is not None:
            file.seek(0)
            blocks = [block[:, kept].copy() for block in _blocks(file, name, max_seconds)]
        return _Decoded(blocks[0] if len(blocks) == 1 else np.concatenate(blocks), file.samplerate, kept)


def _blocks(file: Any, name: str, max_seconds: float) -> Iterator[np.ndarray]:
    """Yield what is left of an open file, float32 [n, channels] at a time."""
    total, limit = 0, math.ceil(max_seconds * file.samplerate)
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        total += len(block)
        if total > limit:
            raise UserError(_too_long(name, total / file.samplerate, max_seconds))
        yield block


def _check_whole(file: Any, total: int, content: Content, span: Span, name: str) -> None:
    """See that the samples are there which the file's container promises.

    Args:
        file: It, decoded to its end.
        total: Frames that were decoded.
        content: Its bytes.
        span: Where they are, of a file that holds several streams.
        name: For the message.

    Raises:
        UserError: They are not.
    """
    held, promised = float(total), float(file.frames)
    if file.format == "MP3":  # its length is estimated where no header tells
        held, promised = span.present * promised, promised if span.present < 1 else 0.0
    elif extent := samples_extent(content):
        promised = total / extent.present if extent.present else math.inf
    elif file.format in _LOGGED and _LOG.search(file.extra_info):
        promised = math.inf
    if held < promised:
        digits = 1 if promised - held > 0.1 * file.samplerate else 3
        told = f"{promised / file.samplerate:.{digits}f} s" if math.isfinite(promised) else "more"
        there = f"the file holds {held / file.samplerate:.{digits}f} s"
        raise UserError(f"{name}: truncated: its header promises {told}, {there}: {_AGAIN}")
    if total:
        return
    if behind := bytes_behind_nothing(content):
        mend = "if they are its samples, write it anew, e.g. ffmpeg -ignore_length 1 -i X.wav Y.wav"
        raise UserError(
            f"{name}: its header says 0 samples, with {behind:,} bytes behind it, as a recorder that is cut "
            f"off leaves it: {mend}"
        )
    raise UserError(f"{name}: holds no audio (0 samples)")


def _too_long(name: str, seconds: float, max_seconds: float) -> str:
    return f"{name}: {seconds:.1f} s of audio or more, the longest allowed is {max_seconds:g} s (--max-seconds)"


def mix_down(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels, or the loudest where that cancels them: float32 [channels, n] or [n] to [n]."""
    if samples.ndim == 1:
        return samples
    mixer = ChannelMixer()
    mono = mixer.add(np.asarray(samples, np.float32))
    return mono if mixer.kept is None else samples[mixer.kept]


def resample(wave: np.ndarray, rate: int, name: str = "audio") -> np.ndarray:
    """Bring float32 [n] at `rate` Hz to 16 kHz, clipped to [-1, 1].

    Raises:
        UserError: A rate that is no speech's, or samples that are not finite or of a scale that is no audio's.
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
    # torchaudio's windowed-sinc resampling; the module keeps the filter, which costs more to make than to apply.
    from torchaudio.transforms import Resample

    if rate // math.gcd(rate, SAMPLE_RATE) > 1000:
        # The filter bank grows with the reduced rates; to the nearest 25 Hz it is small, and no one hears the step.
        rate = round(rate / 25) * 25
    return Resample(rate, SAMPLE_RATE)


def encode_audio(wave: np.ndarray, codec: Codec) -> bytes:
    """Encode float32 [n] at 16 kHz; FLAC and WAV hold 16 bits, so that 16-bit recordings survive unchanged.

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


def decode_audio(data: bytes, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Decode what `encode_audio` gave to float32 [n] at 16 kHz, n > 0.

    Args:
        data: An encoded caption.
        max_seconds: Longest duration allowed; checked from the header, which also bounds what is decoded.

    Raises:
        UserError: not decodable, not 16 kHz mono, too long, empty, or not finite.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.samplerate != SAMPLE_RATE or file.channels != 1:
                shape = f"{file.samplerate} Hz and {file.channels} channels"
                raise UserError(f"audio of {shape} in a shard, expected {SAMPLE_RATE} Hz mono")
            if file.frames >= _UNKNOWN:
                raise UserError(f"audio of {len(data)} bytes in a shard does not give its length in its header")
            if file.frames > max_seconds * SAMPLE_RATE:
                raise UserError(
                    f"audio of {file.frames / SAMPLE_RATE:.1f} s in a shard, the longest allowed is {max_seconds:g} s"
                )
            wave = file.read(dtype="float32")
            floats = file.subtype in ("FLOAT", "DOUBLE")
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise UserError(f"audio of {len(data)} bytes cannot be decoded ({error})") from None
    if not len(wave) or (floats and not np.isfinite(wave).all()):
        what = "samples that are not finite" if len(wave) else "no samples"
        raise UserError(f"audio of {len(data)} bytes in a shard holds {what}")
    return wave
