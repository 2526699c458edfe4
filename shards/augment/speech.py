"""Augmentation of a waveform: another voice, a room, noise, a microphone, masks and a level.

voice (speed, tempo, pitch, formants) -> reverberation -> noise, babble -> equalizer, band limit, masks -> gain
"""

from collections.abc import Callable, Sequence

import numpy as np

from shards.augment.randomness import SampleRandomness, uniform
from shards.augment.settings import SpeechAugment
from shards.augment.voice import change_speed, change_voice, fast_size
from shards.media.audio import SAMPLE_RATE

_EQUALIZER_BANDS = 7
_PADDING = 2048  # zeros in which the impulse response of a filter dies away

# Returns up to a number of other utterances, float32 [n], chosen by the generator.
Voices = Callable[[np.random.Generator, int], list[np.ndarray]]


def augment_speech(
    wave: np.ndarray, settings: SpeechAugment, randomness: SampleRandomness, voices: Voices | None = None
) -> np.ndarray:
    """Augment a waveform.

    Args:
        wave: float32 [n] in [-1, 1], 16 kHz, n > 0.
        settings: Probabilities and ranges.
        randomness: Random numbers of the sample.
        voices: Source of the babble; None: no babble.

    Returns:
        float32 [m] in [-1, 1], m > 0; `wave` itself if nothing is applied.
    """
    before = wave
    wave = _another_voice(wave, settings, randomness)
    if generator := randomness.draw("reverberation", settings.reverberation):
        seconds = uniform(generator, settings.reverberation_seconds)
        ratio = uniform(generator, settings.reverberation_db)
        wave = reverberate(wave, room_response(generator, seconds, ratio))
        randomness.note("reverberation", seconds, unit="s")
    wave = _add_background(wave, settings, randomness, voices)
    wave = _filter(wave, settings, randomness)
    if generator := randomness.draw("time_mask", settings.time_mask):
        wave = mask_time(wave, generator, settings.time_masks, settings.time_mask_seconds)
        randomness.note("time_mask")
    if generator := randomness.draw("gain", settings.gain):
        decibels = uniform(generator, settings.gain_db)
        wave = wave * np.float32(10 ** (decibels / 20))
        randomness.note("gain", decibels, unit="dB")
    return wave if wave is before else within_full_scale(wave)


def _another_voice(wave: np.ndarray, settings: SpeechAugment, randomness: SampleRandomness) -> np.ndarray:
    factors = dict.fromkeys(("tempo", "pitch", "formants"), 1.0)
    for kind, bounds in (
        ("tempo", settings.tempo_range),
        ("pitch", settings.pitch_semitones),
        ("formants", settings.formants_range),
    ):
        if generator := randomness.draw(kind, getattr(settings, kind)):
            value = uniform(generator, bounds)
            factors[kind] = 2 ** (value / 12) if kind == "pitch" else value
            randomness.note(kind, value, unit="semitones" if kind == "pitch" else "")
    if generator := randomness.draw("speed", settings.speed):
        factor = uniform(generator, settings.speed_range)
        wave = change_speed(wave, factor)
        randomness.note("speed", factor)
    return change_voice(wave, **factors)


def _add_background(
    wave: np.ndarray, settings: SpeechAugment, randomness: SampleRandomness, voices: Voices | None
) -> np.ndarray:
    if generator := randomness.draw("noise", settings.noise):
        snr = uniform(generator, settings.noise_snr)
        wave = add_noise(wave, colored_noise(generator, len(wave), uniform(generator, (0.0, 2.0))), snr)
        randomness.note("noise", snr, unit="dB")
    generator = randomness.draw("babble", settings.babble)
    if generator and voices:
        snr = uniform(generator, settings.babble_snr)
        others = voices(generator, int(generator.integers(1, settings.babble_voices + 1)))
        if others:
            wave = add_noise(wave, mix_voices(others, len(wave), generator), snr)
            randomness.note("babble", snr, unit=f"dB, {len(others)} voices")
    return wave


def mix_voices(voices: Sequence[np.ndarray], length: int, generator: np.random.Generator) -> np.ndarray:
    """Sum waveforms float32 [n] at equal levels, repeated or cut from a random beginning: float32 [length]."""
    return np.asarray(sum(_fit(_normalized(voice), length, generator) for voice in voices), np.float32)


def add_noise(wave: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Add noise float32 [n] at a signal-to-noise ratio in dB, as torchaudio.functional.add_noise; unchanged if silent.

    Both levels are the mean over all samples.
    """
    signal, level = _rms(wave), _rms(noise)
    if not signal or not level:
        return wave
    return wave + noise * np.float32(signal / level * 10 ** (-snr / 20))


def colored_noise(generator: np.random.Generator, length: int, exponent: float) -> np.ndarray:
    """Gaussian noise whose power falls as f^-exponent (0: white, 1: pink, 2: brown) above 50 Hz: float32 [length]."""
    size = fast_size(length)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    shape = np.maximum(frequency, 50.0) ** (-exponent / 2)
    spectrum = np.fft.rfft(generator.standard_normal(size, dtype=np.float32))
    return np.fft.irfft(spectrum * shape.astype(np.float32), size)[:length].astype(np.float32)


def room_response(generator: np.random.Generator, seconds: float, ratio: float) -> np.ndarray:
    """Impulse response of a room: the direct sound, and Gaussian noise that decays by 60 dB.

    Args:
        generator: Source of the noise.
        seconds: Reverberation time, in which the energy decays by 60 dB.
        ratio: Ratio of direct to reverberant energy in dB.

    Returns:
        float32 [n], n > 0.
    """
    time = np.arange(1, max(2, round(seconds * SAMPLE_RATE)), dtype=np.float32) / SAMPLE_RATE
    tail = generator.standard_normal(len(time), dtype=np.float32) * 10 ** (-3 * time / seconds)
    tail *= 10 ** (-ratio / 20) / np.sqrt(np.square(tail).sum() + 1e-12)
    return np.concatenate([[1.0], tail]).astype(np.float32)


def reverberate(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve with an impulse response, at the same length and level: float32 [n] to [n]."""
    size = fast_size(len(wave) + len(response))
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    wet = np.fft.irfft(spectrum, size)[: len(wave)]
    level = _rms(wet)
    return (wet * (_rms(wave) / level)).astype(np.float32) if level else wave


def _filter(wave: np.ndarray, settings: SpeechAugment, randomness: SampleRandomness) -> np.ndarray:
    """Apply equalizer, band limits and frequency masks as one zero-phase filter."""
    if not (settings.equalizer or settings.band_limit or settings.frequency_mask):
        return wave
    size = fast_size(len(wave) + _PADDING)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gains = []
    if generator := randomness.draw("equalizer", settings.equalizer):
        decibels = [uniform(generator, settings.equalizer_db) for _ in range(_EQUALIZER_BANDS)]
        gains.append(equalizer_gain(frequency, decibels))
        randomness.note("equalizer")
    if generator := randomness.draw("band_limit", settings.band_limit):
        low, high = uniform(generator, settings.band_low), uniform(generator, settings.band_high)
        gains.append(band_gain(frequency, low, high))
        randomness.note("band_limit", low, high, unit="Hz")
    if generator := randomness.draw("frequency_mask", settings.frequency_mask):
        for _ in range(int(generator.integers(1, settings.frequency_masks + 1))):
            width = uniform(generator, settings.frequency_mask_width)
            low = generator.random() * (1 - width)
            gains.append(~((_mel(frequency) >= low) & (_mel(frequency) < low + width)))
        randomness.note("frequency_mask")
    if not gains:
        return wave
    gain = np.prod(gains, axis=0).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(wave, size) * gain, size)[: len(wave)].astype(np.float32)


def equalizer_gain(frequency: np.ndarray, decibels: list[float]) -> np.ndarray:
    """Gain at frequencies in Hz, from gains in dB at equal distances of the mel scale."""
    return 10 ** (np.interp(_mel(frequency), np.linspace(0, 1, len(decibels)), decibels) / 20)


def band_gain(frequency: np.ndarray, low: float, high: float) -> np.ndarray:
    """Gain at frequencies in Hz of a band-pass filter, with the slopes of Butterworth filters of order 4."""
    rising = (frequency / low) ** 4 / np.sqrt(1 + (frequency / low) ** 8)
    return rising / np.sqrt(1 + (frequency / high) ** 8)


def mask_time(wave: np.ndarray, generator: np.random.Generator, masks: int, seconds: list[float]) -> np.ndarray:
    """Silence 1 to `masks` spans, each of a duration in the range and at most a tenth of the waveform."""
    wave = wave.copy()
    for _ in range(int(generator.integers(1, masks + 1))):
        length = min(round(uniform(generator, seconds) * SAMPLE_RATE), len(wave) // 10)
        start = int(generator.integers(len(wave) - length + 1))
        wave[start : start + length] = 0
    return wave


def _mel(frequency: np.ndarray) -> np.ndarray:
    """Map 0 to 8 kHz to the mel scale, as 0 to 1."""
    return np.log1p(frequency / 700) / np.log1p(SAMPLE_RATE / 2 / 700)


def _fit(wave: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """Repeat or cut a waveform to a length, from a random beginning."""
    return np.resize(np.roll(wave, -int(generator.integers(len(wave)))), length)


def _normalized(wave: np.ndarray) -> np.ndarray:
    level = _rms(wave)
    return wave / np.float32(level) if level else wave


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def within_full_scale(wave: np.ndarray) -> np.ndarray:
    """Scale a waveform down to peaks of 1, if they are higher."""
    peak = float(np.abs(wave).max())
    return np.clip(wave / np.float32(peak), -1, 1) if peak > 1 else wave
