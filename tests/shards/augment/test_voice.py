"""Other voices: durations, pitch and formants change by the factors given, each without the others."""

import numpy as np
import pytest

from shards.augment.voice import change_speed, change_tempo, change_voice, fast_size, warp_formants
from shards.media.audio import SAMPLE_RATE

LENGTHS = [1, 2, 100, 639, 5000, 16001]


def vowel(pitch: float, formant: float = 1000.0, seconds: float = 1.2) -> np.ndarray:
    """Harmonics under one broad formant."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    partials = np.arange(pitch, 4000, pitch)
    weights = np.exp(-(((partials - formant) / 350) ** 2)) + 0.003
    return 0.1 * sum(w * np.cos(2 * np.pi * f * time) for f, w in zip(partials, weights, strict=True)).astype(
        np.float32
    )


def spectrum(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = wave[len(wave) // 4 : -len(wave) // 4]
    size = 1 << 17
    return np.fft.rfftfreq(size, 1 / SAMPLE_RATE), np.abs(np.fft.rfft(middle * np.hanning(len(middle)), size))


def pitch_of(wave: np.ndarray, near: float) -> float:
    """Pitch in Hz, as the largest peak of the autocorrelation within a third of an expected pitch."""
    _, magnitude = spectrum(wave)
    correlation = np.fft.irfft(magnitude**2)
    low, high = round(SAMPLE_RATE / near * 0.75), round(SAMPLE_RATE / near * 1.33)
    lag = low + int(correlation[low:high].argmax())
    # A parabola through the peak's neighbors.
    left, top, right = correlation[lag - 1 : lag + 2]
    return SAMPLE_RATE / (lag + 0.5 * (left - right) / (left - 2 * top + right))


def formant_of(wave: np.ndarray) -> float:
    """Center of the energy, in Hz."""
    frequency, magnitude = spectrum(wave)
    return float((frequency * magnitude**2).sum() / (magnitude**2).sum())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("factor", [0.5, 0.93, 1.0, 1.07, 2.0])
def test_durations(length: int, factor: float) -> None:
    wave = np.random.default_rng(length).uniform(-0.5, 0.5, length).astype(np.float32)
    expected = max(1, round(length / factor))
    both = change_voice(wave, tempo=factor, pitch=1.1)
    for changed in (change_speed(wave, factor), change_tempo(wave, factor), both):
        assert len(changed) == expected
        assert changed.dtype == np.float32
        assert np.isfinite(changed).all()
    assert len(warp_formants(wave, factor)) == length
    assert change_speed(wave, 1.0) is wave
    assert change_voice(wave) is wave


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.3])
def test_speed_moves_pitch_and_formants_together(factor: float) -> None:
    wave = vowel(130)
    changed = change_speed(wave, factor)
    assert pitch_of(changed, 130 * factor) == pytest.approx(130 * factor, rel=0.005)
    assert formant_of(changed) == pytest.approx(formant_of(wave) * factor, rel=0.02)


def test_speed_is_torchaudios_resampling() -> None:
    import torch
    from torchaudio.functional import resample

    wave = vowel(130, seconds=0.5)
    theirs = resample(torch.from_numpy(wave), 5, 4, lowpass_filter_width=64).numpy()
    ours = change_speed(wave, 1.25)
    assert ours[500:-500] == pytest.approx(theirs[500 : len(ours) - 500], abs=2e-3)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.15, 1.3])
def test_tempo_keeps_pitch_and_formants(factor: float) -> None:
    wave = vowel(130)
    changed = change_tempo(wave, factor)
    assert pitch_of(changed, 130) == pytest.approx(130, rel=0.01)
    assert formant_of(changed) == pytest.approx(formant_of(wave), rel=0.03)
    assert np.abs(changed).max() == pytest.approx(np.abs(wave).max(), rel=0.2)


def test_tempo_moves_events_in_proportion() -> None:
    wave = np.zeros(2 * SAMPLE_RATE, np.float32)
    wave[16000:20000] = vowel(130, seconds=0.25)
    heard = np.flatnonzero(np.abs(change_tempo(wave, 1.25)) > 0.02)
    assert heard[0] == pytest.approx(12800, abs=500)
    assert heard[-1] == pytest.approx(16000, abs=500)


@pytest.mark.parametrize("semitones", [-4, -2, 3, 5])
def test_pitch_keeps_tempo_and_formants(semitones: int) -> None:
    wave, factor = vowel(130), 2 ** (semitones / 12)
    changed = change_voice(wave, pitch=factor)
    assert len(changed) == len(wave)
    assert pitch_of(changed, 130 * factor) == pytest.approx(130 * factor, rel=0.01)
    assert formant_of(changed) == pytest.approx(formant_of(wave), rel=0.08)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_formants_move_and_the_pitch_stays(factor: float) -> None:
    wave = vowel(110)
    changed = warp_formants(wave, factor)
    assert pitch_of(changed, 110) == pytest.approx(110, rel=0.003)
    assert formant_of(changed) == pytest.approx(formant_of(wave) * factor, rel=0.06)


def test_formants_by_a_factor_near_one_change_little() -> None:
    wave = vowel(110)
    assert warp_formants(wave, 1.0001)[1000:-1000] == pytest.approx(wave[1000:-1000], abs=2e-3)


def test_no_click_at_the_ends() -> None:
    wave = vowel(120, seconds=0.4)
    for changed in (change_speed(wave, 1.08), change_tempo(wave, 0.9), warp_formants(wave, 1.1)):
        assert np.abs(changed).max() <= 1.3 * np.abs(wave).max()


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 129_000, 9_700_000])
def test_fast_sizes(size: int) -> None:
    result = fast_size(size)
    assert result >= size
    assert result <= max(size + 1, 1.07 * size)
    assert result % 2 == 0
