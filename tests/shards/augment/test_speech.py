"""Augmented waveforms: ranges are kept, nothing depends on order, and hard inputs survive."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from shards.augment import randomness
from shards.augment import speech as module
from shards.augment.randomness import SampleRandomness
from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS, SpeechAugment
from shards.augment.speech import add_noise, augment_speech, colored_noise, mask_time, reverberate, room_response
from shards.media.audio import SAMPLE_RATE

ALL = SpeechAugment(**dict.fromkeys(SPEECH_KINDS, 1.0))


def spoken(seconds: float = 1.5, pitch: float = 120.0, seed: int = 0) -> np.ndarray:
    """Harmonics of a pitch, louder and quieter four times a second, with a little noise."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    harmonics = sum(np.cos(2 * np.pi * pitch * k * time) / k for k in range(1, 20))
    loudness = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)
    hiss = np.random.default_rng(seed).standard_normal(len(time))
    return (0.05 * loudness * harmonics + 0.001 * hiss).astype(np.float32)


def others(generator: np.random.Generator, count: int) -> list[np.ndarray]:
    return [spoken(0.8, float(generator.uniform(90, 250)), seed=n) for n in range(count)]


def augmented(wave: np.ndarray, position: int = 0, seed: int = 1, **settings: Any) -> tuple[np.ndarray, list[str]]:
    numbers = SampleRandomness(seed, position)
    return augment_speech(wave, SpeechAugment(**settings), numbers, others), numbers.applied


def decibels(ratio: float) -> float:
    return 20 * float(np.log10(ratio))


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))


def test_streams_are_those_of_every_version() -> None:
    kinds = (*SPEECH_KINDS, *IMAGE_KINDS)
    assert [randomness._STREAMS[kind] for kind in kinds] == list(range(1, len(kinds) + 1))
    numbers = [SampleRandomness(3, 7).draw(kind, 1.0) for kind in ("speed", "color")]
    assert [round(one.random(), 6) for one in numbers if one] == [0.237931, 0.446763]


def test_off_by_default_and_the_same_array() -> None:
    wave = spoken()
    assert all(getattr(SpeechAugment(), kind) == 0 for kind in SPEECH_KINDS)
    result, applied = augmented(wave)
    assert result is wave
    assert not applied
    assert {one.name for one in fields(SpeechAugment) if isinstance(one.default, float)} == set(SPEECH_KINDS)


@pytest.mark.parametrize("kind", SPEECH_KINDS)
def test_a_kind_changes_the_waveform_and_is_a_function_of_seed_and_position(kind: str) -> None:
    wave = spoken(0.7)
    before = wave.copy()
    result, applied = augmented(wave, 5, **{kind: 1.0})
    assert np.array_equal(wave, before), "the input was changed"
    assert not np.array_equal(result, wave)
    assert len(applied) == 1
    assert applied[0].startswith(kind.replace("_", " "))
    assert result.dtype == np.float32
    augmented(wave, 4, **{kind: 1.0})  # whatever comes before
    again, _ = augmented(wave, 5, **{kind: 1.0})
    assert np.array_equal(result, again)
    for position, seed in ((6, 1), (5, 2)):
        assert not np.array_equal(augmented(wave, position, seed, **{kind: 1.0})[0], result)


def test_kinds_do_not_change_each_others_values() -> None:
    wave = spoken(0.5)
    _, alone = augmented(wave, 3, noise=1.0)
    _, together = augmented(wave, 3, noise=1.0, speed=1.0, gain=1.0, reverberation=1.0)
    assert alone[0] in together


def test_probability() -> None:
    wave = spoken(0.05)
    count = sum(bool(augmented(wave, position, gain=0.3)[1]) for position in range(400))
    assert 85 <= count <= 155  # 120 expected, with a standard deviation of 9


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(8000, np.float32),
        np.zeros(1, np.float32),
        np.full(1, 0.5, np.float32),
        np.linspace(-1, 1, 7, dtype=np.float32),
        np.ones(400, np.float32),
        np.sign(np.sin(np.arange(9000) / 20)).astype(np.float32),
    ],
    ids=["silence", "one zero", "one sample", "seven", "constant", "full scale"],
)
def test_hard_inputs_survive(wave: np.ndarray) -> None:
    for position in range(6):
        result, applied = augmented(wave, position, **vars(ALL))
        assert len(applied) >= len(SPEECH_KINDS) - 2
        assert result.dtype == np.float32
        assert len(result) > 0
        assert np.isfinite(result).all()
        assert np.abs(result).max() <= 1


def test_silent_background_and_no_background() -> None:
    wave = spoken(0.3)
    settings = SpeechAugment(babble=1.0)
    silent = augment_speech(wave, settings, SampleRandomness(0, 0), lambda *_: [np.zeros(100, np.float32)])
    assert np.array_equal(silent, wave)
    assert np.array_equal(augment_speech(wave, settings, SampleRandomness(0, 0), lambda *_: []), wave)
    assert np.array_equal(augment_speech(wave, settings, SampleRandomness(0, 0)), wave)


@pytest.mark.parametrize("kind", ["noise", "babble"])
def test_snr_is_in_range(kind: str) -> None:
    wave = spoken(0.6)
    actual = []
    for position in range(30):
        result, _ = augmented(wave, position, **{kind: 1.0, f"{kind}_snr": [7.0, 12.0]})
        actual.append(decibels(rms(wave) / rms(result - wave)))
    assert 6.99 <= min(actual) < 8.5
    assert 10.5 < max(actual) <= 12.01


def test_noise_at_an_snr_is_torchaudios() -> None:
    import torch
    from torchaudio.functional import add_noise as expected

    wave, noise = spoken(0.2), colored_noise(np.random.default_rng(0), 3200, 1.0)
    theirs = expected(torch.from_numpy(wave), torch.from_numpy(noise), torch.tensor(8.0)).numpy()
    assert add_noise(wave, noise, 8.0) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_color_of_the_noise(exponent: float) -> None:
    power = np.abs(np.fft.rfft(colored_noise(np.random.default_rng(1), 1 << 16, exponent))) ** 2
    frequency = np.fft.rfftfreq(1 << 16, 1 / SAMPLE_RATE)
    octaves = [power[(frequency >= low) & (frequency < 2 * low)].mean() for low in (250, 500, 1000, 2000)]
    slope = np.polyfit(np.arange(4), np.log2(octaves), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


def test_gain_is_in_range_and_peaks_stay_within_full_scale() -> None:
    wave = spoken(0.3)
    actual = [decibels(rms(augmented(wave, p, gain=1.0)[0]) / rms(wave)) for p in range(40)]
    assert -12.01 < min(actual) < -8
    assert 2 < max(actual) < 6.01
    loud, _ = augmented(wave / np.abs(wave).max(), gain=1.0, gain_db=[20.0, 20.0])
    assert np.abs(loud).max() == pytest.approx(1.0, abs=1e-6)
    assert np.corrcoef(loud, wave)[0, 1] > 0.9999, "scaled, not clipped"


def test_a_room_keeps_length_and_level_and_decays_as_requested() -> None:
    response = room_response(np.random.default_rng(2), 0.4, 6.0)
    assert len(response) == round(0.4 * SAMPLE_RATE)
    assert decibels(1 / np.sqrt(np.square(response[1:]).sum())) == pytest.approx(6.0, abs=0.01)
    remaining = np.cumsum(np.square(response[:0:-1]).astype(np.float64))[::-1]
    time = np.arange(len(remaining)) / SAMPLE_RATE
    slope = np.polyfit(time[:3200], 10 * np.log10(remaining[:3200]), 1)[0]  # Schroeder's integral, dB/s
    assert -60 / slope == pytest.approx(0.4, rel=0.1)
    wave = spoken(0.5)
    wet = reverberate(wave, response)
    assert len(wet) == len(wave)
    assert rms(wet) == pytest.approx(rms(wave), rel=1e-4)
    assert reverberate(wave, np.ones(1, np.float32)) == pytest.approx(wave, abs=1e-5)


def response_of(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz and gain in dB with which white noise of 4 s passes."""
    white = 0.05 * np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    result, _ = augmented(white, **settings)
    gain = np.abs(np.fft.rfft(result)) / np.abs(np.fft.rfft(white))
    return np.fft.rfftfreq(1 << 16, 1 / SAMPLE_RATE), 20 * np.log10(gain + 1e-9)


def test_equalizer_is_smooth_and_in_range() -> None:
    frequency, gain = response_of(equalizer=1.0, equalizer_db=[-9.0, 9.0])
    bands = [np.median(gain[(frequency >= low) & (frequency < low + 100)]) for low in range(100, 7900, 100)]
    assert -9.2 < min(bands) < -2
    assert 2 < max(bands) < 9.2
    assert np.abs(np.diff(bands)).max() < 4


def test_band_limits() -> None:
    frequency, gain = response_of(band_limit=1.0, band_low=[300.0, 300.0], band_high=[3400.0, 3400.0])
    at = {hertz: np.median(gain[np.abs(frequency - hertz) < 20]) for hertz in (100, 300, 1000, 3400, 7000)}
    assert at[1000] == pytest.approx(0, abs=0.2)
    assert at[300] == pytest.approx(-3, abs=0.4)
    assert at[3400] == pytest.approx(-3, abs=0.4)
    assert at[100] < -30
    assert at[7000] < -20


def test_frequency_masks_remove_as_much_of_the_mel_scale_as_requested() -> None:
    frequency, gain = response_of(frequency_mask=1.0, frequency_masks=1, frequency_mask_width=[0.2, 0.2])
    removed = module._mel(frequency[gain < -30])
    assert removed.max() - removed.min() == pytest.approx(0.2, abs=0.02)
    assert np.median(gain[gain > -30]) == pytest.approx(0, abs=0.1)


def test_time_masks_are_spans_of_the_requested_duration() -> None:
    wave = np.ones(SAMPLE_RATE, np.float32)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        silent = np.flatnonzero(mask_time(wave, generator, 1, [0.02, 0.05]) == 0)
        assert 320 <= len(silent) <= 800
        assert silent[-1] - silent[0] + 1 == len(silent)
        assert (mask_time(wave, generator, 3, [1.0, 1.0]) == 0).sum() <= 0.3 * SAMPLE_RATE, "the whole caption is gone"


def test_speed_before_a_voice_multiplies_durations() -> None:
    wave = spoken(1.0)
    both = replace(SpeechAugment(speed=1.0, tempo=1.0), speed_range=[1.25, 1.25], tempo_range=[0.8, 0.8])
    assert len(augment_speech(wave, both, SampleRandomness(0, 0))) == pytest.approx(len(wave), abs=2)
