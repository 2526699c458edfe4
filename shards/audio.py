"""Speech in and out: any file that libsndfile decodes becomes float32 mono at 16 kHz; shards hold FLAC, WAV or Opus."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from shards.errors import UserError

SAMPLE_RATE = 16000
Codec = Literal["flac", "wav", "opus"]
CODECS: tuple[Codec, ...] = get_args(Codec)
MAX_SECONDS = 600.0  # of a caption in a shard

_BLOCK = 1 << 16  # frames decoded at a time, so that many channels or a wrong header never fill the memory
_MAX_RATE = 192_000
_UNKNOWN = 1 << 62  # frames or more: a FLAC that was written to a pipe does not say how many it has


def read_audio(source: Path | bytes, max_seconds: float) -> np.ndarray:
    """Decode a file by its content, whatever its name, and bring it to mono at 16 kHz.

    Args:
        source: a file, or the bytes of one.
        max_seconds: longest duration allowed; checked from the header before anything is decoded.

    Returns:
        float32 [n] in [-1, 1], n > 0.

    Raises:
        UserError: no such file, empty, not decodable, too long or of no known length, not finite, or a rate that is no
            speech's.
    """
    name = "audio" if isinstance(source, bytes) else str(source)
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    if size == 0:
        raise UserError(f"{name}: empty file (0 bytes)")
    mono, rate = _decode(source, name, max_seconds)
    # A rate that is rounded before resampling makes it a few samples longer.
    return resample(mono, rate, name)[: math.ceil(max_seconds * SAMPLE_RATE)]


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    """What soundfile takes: a file by its number, since it would believe the ending of a name."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    with open(source, "rb") as file:
        yield file.fileno()


def _decode(source: Path | bytes, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        with _opened(source) as opened, soundfile.SoundFile(opened, closefd=False) as file:
            _check_rate(file.samplerate, name)
            if file.frames >= _UNKNOWN:
                raise UserError(f"{name}: its header does not give its length: write it anew, as ffmpeg does")
            limit = math.ceil(max_seconds * file.samplerate)
            # The header of a compressed file may understate, so the limit is kept while decoding too.
            if file.frames > limit:
                raise UserError(_too_long(name, file.frames / file.samplerate, max_seconds))
            blocks, total = [], 0
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1) if block.shape[1] > 1 else block[:, 0])
                total += len(block)
                if total > limit:
                    raise UserError(_too_long(name, total / file.samplerate, max_seconds))
            rate = file.samplerate
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise UserError(f"{name}: cannot be decoded as audio ({reason})") from None
    if not total:
        raise UserError(f"{name}: holds no audio (0 samples)")
    return np.concatenate(blocks), rate


def _too_long(name: str, seconds: float, max_seconds: float) -> str:
    return f"{name}: {seconds:.1f} s of audio or more, the longest allowed is {max_seconds:g} s (--max-seconds)"


def mix_down(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels: float32 [channels, n] or [n] to [n]."""
    return samples if samples.ndim == 1 else samples.mean(axis=0, dtype=np.float32)


def resample(wave: np.ndarray, rate: int, name: str = "audio") -> np.ndarray:
    """Bring float32 [n] at `rate` Hz to 16 kHz, clipped to [-1, 1].

    Raises:
        UserError: a rate that is no speech's, or samples that are not finite.
    """
    _check_rate(rate, name)
    if not np.isfinite(wave).all():
        raise UserError(f"{name}: holds samples that are not finite")
    if rate != SAMPLE_RATE:
        import torch

        with torch.inference_mode():
            wave = _resampler(rate)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
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
        return _fix_serial(buffer.getvalue())
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


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _fix_serial(stream: bytes) -> bytes:
    # libsndfile draws an Ogg stream's serial number from the clock; with 0 instead, same speech gives same bytes.
    # A page (RFC 3533): 27 bytes of header, the serial at 14, the checksum at 22, then the table of segment lengths.
    pages, at = [], 0
    while at < len(stream):
        segments = stream[at + 26]
        end = at + 27 + segments + sum(stream[at + 27 : at + 27 + segments])
        blank = stream[at : at + 14] + bytes(4) + stream[at + 18 : at + 22] + bytes(4) + stream[at + 26 : end]
        pages.append(blank[:22] + struct.pack("<I", _ogg_checksum(blank)) + blank[26:])
        at = end
    return b"".join(pages)


def _ogg_checksum(page: bytes) -> int:
    # Ogg's CRC-32 runs from the high bit, starts from 0 and is not inverted at the end; zlib's is its mirror image.
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)
