"""When words are spoken: an estimate from text and loudness alone."""

from dataclasses import dataclass

import numpy as np

from shards.media.audio import SAMPLE_RATE

_FRAME = 400  # samples, 25 ms
_QUIET = 35.0  # dB below the loudest frame


@dataclass(frozen=True)
class Word:
    """A word and the time in seconds in which it is spoken."""

    word: str
    start: float
    end: float


def align_proportionally(wave: np.ndarray, text: str) -> list[Word]:
    """Spread words over the speech in proportion to their letters.

    The speech lies between the first and the last frame of 25 ms that is at most 35 dB quieter than the loudest. This
    is no forced alignment: pauses, and words that are spoken faster than others, displace the words.

    Args:
        wave: float32 [n] at 16 kHz.
        text: The transcript.

    Returns:
        The words in order; empty without words.
    """
    words = text.split()
    if not words:
        return []
    start, end = speech_extent(wave)
    letters = [max(1, sum(character.isalnum() for character in word)) for word in words]
    bounds = start + (end - start) * np.concatenate([[0.0], np.cumsum(letters) / sum(letters)])
    return [Word(word, *map(float, bounds[n : n + 2])) for n, word in enumerate(words)]


def speech_extent(wave: np.ndarray) -> tuple[float, float]:
    """Begin of the first and end of the last loud frame, in seconds; all of a silent waveform."""
    padded = np.pad(wave.astype(np.float64), (0, -len(wave) % _FRAME))
    power = np.square(padded).reshape(-1, _FRAME).mean(axis=1)
    loud = np.flatnonzero((power >= power.max() * 10 ** (-_QUIET / 10)) & (power > 0))
    seconds = len(wave) / SAMPLE_RATE
    if not len(loud):
        return 0.0, seconds
    return float(loud[0] * _FRAME / SAMPLE_RATE), min(seconds, float((loud[-1] + 1) * _FRAME / SAMPLE_RATE))
