"""Perturbations of a waveform, float32 [n] at 16 kHz, at given levels."""

import io
from collections.abc import Callable

import numpy as np

from shards.augment.speech import add_noise, colored_noise, mix_voices, reverberate, room_response, within_full_scale
from shards.augment.voice import change_speed, change_voice
from shards.media.audio import SAMPLE_RATE
from toolkit.evaluation.perturbations.kinds import KINDS

DIRECT_TO_REVERBERANT = 0.0  # dB
_MP3_DELAY = 1105  # samples: 576 of LAME's encoder and 529 of a decoder
_OPUS_BITRATES, _MP3_BITRATES = (6.0, 256.0), (8.0, 160.0)  # kbit/s at libsndfile's compression levels 1 and 0

# Returns the waveforms in the background: other captions, or a file.
Background = Callable[[np.random.Generator], list[np.ndarray]]


def perturb_speech(
    wave: np.ndarray, kind: str, level: float, generator: np.random.Generator, background: Background | None = None
) -> np.ndarray:
    """Perturb a waveform; peaks above full scale are scaled down to it, as in training's augmentation.

    Args:
        wave: float32 [n] in [-1, 1], 16 kHz, n > 0.
        kind: A kind of `KINDS` for speech.
        level: Its level; at the kind's clean level the result is `wave` itself.
        generator: Random numbers of the caption.
        background: For babble and noise.

    Returns:
        float32 [m] in [-1, 1], m > 0.

    Raises:
        ValueError: There is no such kind, or no background for it.
    """
    if kind not in KINDS or KINDS[kind].modality != "speech":
        raise ValueError(f"{kind} is not a perturbation of speech")
    if level == KINDS[kind].clean_level:
        return wave
    if kind in ("babble", "noise"):
        if background is None:
            raise ValueError(f"{kind} needs a background")
        noise = mix_voices(background(generator), len(wave), generator)
        return within_full_scale(add_noise(wave, noise, level))
    return within_full_scale(_FUNCTIONS[kind](wave, level, generator))


def _white(wave: np.ndarray, level: float, generator: np.random.Generator) -> np.ndarray:
    return add_noise(wave, colored_noise(generator, len(wave), 0.0), level)


def _reverberation(wave: np.ndarray, level: float, generator: np.random.Generator) -> np.ndarray:
    return reverberate(wave, room_response(generator, level, DIRECT_TO_REVERBERANT))


def telephone(wave: np.ndarray, rate: float) -> np.ndarray:
    """Resample to `rate` Hz, quantize by mu-law (ITU-T G.711), and resample back: float32 [n] to [n]."""
    narrow = change_speed(wave, SAMPLE_RATE / rate)
    return _fit(change_speed(mu_law(narrow), rate / SAMPLE_RATE), len(wave))


def mu_law(wave: np.ndarray) -> np.ndarray:
    """Quantize to the 255 values of mu-law (ITU-T G.711): float32 [n] to [n]."""
    return _coded(wave, "WAV", "ULAW")


def opus(wave: np.ndarray, kilobits: float) -> np.ndarray:
    """Encode as Opus at a bit rate in kbit/s, and decode: float32 [n] to [n]."""
    return _fit(_coded(wave, "OGG", "OPUS", compression_level=_compression(kilobits, _OPUS_BITRATES)), len(wave))


def mp3(wave: np.ndarray, kilobits: float) -> np.ndarray:
    """Encode as MP3 at a constant bit rate in kbit/s, and decode: float32 [n] to [n]."""
    compression = _compression(kilobits, _MP3_BITRATES)
    decoded = _coded(wave, "MP3", "MPEG_LAYER_III", compression_level=compression, bitrate_mode="CONSTANT")
    # At low bit rates the frames have no room for the header that states delay and length.
    return _fit(decoded[_MP3_DELAY:] if len(decoded) > len(wave) else decoded, len(wave))


def _compression(kilobits: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return (high - kilobits) / (high - low)


def _coded(wave: np.ndarray, container: str, codec: str, **options: object) -> np.ndarray:
    """Encode with libsndfile, and decode."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, format=container, subtype=codec, **options)
    buffer.seek(0)
    return soundfile.read(buffer, dtype="float32")[0]


def _fit(wave: np.ndarray, length: int) -> np.ndarray:
    return np.pad(wave[:length], (0, max(0, length - len(wave))))


def clip(wave: np.ndarray, decibels: float) -> np.ndarray:
    """Clip the samples at a level in dB below the peak."""
    limit = np.abs(wave).max() * np.float32(10 ** (-decibels / 20))
    return np.clip(wave, -limit, limit)


def truncate(wave: np.ndarray, percent: float) -> np.ndarray:
    """Keep the beginning, at least one sample."""
    return wave[: max(1, round(len(wave) * percent / 100))]


_FUNCTIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "white": _white,
    "reverberation": _reverberation,
    "speed": lambda wave, level, _: change_speed(wave, level),
    "pitch": lambda wave, level, _: change_voice(wave, pitch=2 ** (level / 12)),
    "opus": lambda wave, level, _: opus(wave, level),
    "mp3": lambda wave, level, _: mp3(wave, level),
    "telephone": lambda wave, level, _: telephone(wave, 1000 * level),
    "clipping": lambda wave, level, _: clip(wave, level),
    "truncation": lambda wave, level, _: truncate(wave, level),
}


def duration_factor(kind: str, level: float) -> float:
    """Factor by which a perturbation changes the duration."""
    if kind == "speed":
        return 1 / level
    return level / 100 if kind == "truncation" else 1.0
