"""Each perturbation of speech does what its level says, and its clean level nothing."""

import numpy as np
import pytest

from shards.media.audio import SAMPLE_RATE
from tests.shards.augment.test_speech import others, spoken
from toolkit.evaluation.perturbations.kinds import KINDS, generator_of
from toolkit.evaluation.perturbations.speech import (
    clip,
    duration_factor,
    mp3,
    mu_law,
    opus,
    perturb_speech,
    telephone,
    truncate,
)

SPEECH = [name for name, kind in KINDS.items() if kind.modality == "speech"]


def perturbed(wave, kind, level, number=0, seed=0):
    return perturb_speech(wave, kind, level, generator_of(seed, kind, number), lambda g: others(g, 3))


def power_above(wave, frequency):
    """Share of the power above a frequency in Hz."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    return power[np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE) > frequency].sum() / power.sum()


def hiss(seconds=1.0):
    return (0.1 * np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE))).astype(np.float32)


@pytest.mark.parametrize("kind", SPEECH)
def test_the_clean_level_changes_nothing(kind):
    wave = spoken()
    assert perturbed(wave, kind, KINDS[kind].clean_level) is wave


@pytest.mark.parametrize("kind", SPEECH)
def test_levels_change_the_waveform_reproducibly_by_seed_and_caption(kind):
    wave = spoken()
    before = wave.copy()
    for level in KINDS[kind].levels:
        once, again = perturbed(wave, kind, level), perturbed(wave, kind, level)
        assert once.dtype == np.float32
        assert np.array_equal(once, again)
        assert not np.array_equal(once, wave)
        assert np.isfinite(once).all()
        assert np.abs(once).max() <= 1
    assert np.array_equal(wave, before), "the input was written to"
    if kind in ("white", "babble", "noise", "reverberation"):
        level = KINDS[kind].levels[0]
        assert not np.array_equal(perturbed(wave, kind, level, number=1), perturbed(wave, kind, level))
        assert not np.array_equal(perturbed(wave, kind, level, seed=1), perturbed(wave, kind, level))


@pytest.mark.parametrize("kind", ["white", "babble", "noise"])
@pytest.mark.parametrize("level", [30.0, 10.0, 0.0, -10.0])
def test_signal_to_noise_ratio_is_the_level(kind, level):
    wave = spoken()
    noise = perturbed(wave, kind, level) - wave
    measured = 10 * np.log10(np.mean(np.square(wave, dtype=float)) / np.mean(np.square(noise, dtype=float)))
    assert measured == pytest.approx(level, abs=0.1)


def test_the_ratio_holds_where_peaks_are_scaled_down_to_full_scale():
    wave = spoken() / np.abs(spoken()).max()
    noisy = perturbed(wave, "white", 0.0)
    assert np.abs(noisy).max() == pytest.approx(1)
    quiet = perturbed(0.01 * wave, "white", 0.0)
    np.testing.assert_allclose(noisy / np.abs(noisy).max(), quiet / np.abs(quiet).max(), atol=1e-5)


def test_all_levels_have_the_same_noise():
    wave = spoken()
    loud, quiet = (perturbed(wave, "white", level) - wave for level in (0.0, 20.0))
    np.testing.assert_allclose(loud, 10 * quiet, atol=1e-6)


def test_reverberation_decays_by_60_db_in_its_time():
    """The tail after a click: Schroeder's backward integral falls from -5 to -25 dB in a third of the time."""
    click = np.zeros(2 * SAMPLE_RATE, np.float32)
    click[0] = 0.5
    for seconds in (0.3, 1.2):
        tail = perturbed(click, "reverberation", seconds)[1:].astype(float)
        energy = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / np.sum(tail**2))
        span = np.argmax(energy < -25) - np.argmax(energy < -5)
        assert 3 * span / SAMPLE_RATE == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_speed_changes_duration_and_pitch(factor):
    tone = np.sin(2 * np.pi * 500 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    fast = perturbed(tone, "speed", factor)
    assert len(fast) == round(len(tone) / factor) == round(len(tone) * duration_factor("speed", factor))
    spectrum = np.abs(np.fft.rfft(fast[1000:-1000]))
    peak = np.fft.rfftfreq(len(fast) - 2000, 1 / SAMPLE_RATE)[spectrum.argmax()]
    assert peak == pytest.approx(500 * factor, abs=2)


@pytest.mark.parametrize("semitones", [-4.0, 4.0])
def test_pitch_keeps_the_duration(semitones):
    wave = spoken(pitch=150.0)
    higher = perturbed(wave, "pitch", semitones)
    assert len(higher) == pytest.approx(len(wave), abs=2)

    def period(samples):
        centered = samples[4000:20000].astype(float)
        correlation = np.correlate(centered, centered[:12000], "valid")
        return 60 + np.argmax(correlation[60:300])

    assert period(wave) / period(higher) == pytest.approx(2 ** (semitones / 12), rel=0.03)


def test_telephone_has_4_khz_of_bandwidth_and_values_of_mu_law():
    wave = hiss()
    narrow = telephone(wave, 8000)
    assert len(narrow) == len(wave)
    assert power_above(wave, 4000) == pytest.approx(0.5, abs=0.05)
    assert power_above(narrow, 4100) < 1e-3
    values = np.unique(mu_law(np.linspace(-1, 1, 100_001, dtype=np.float32)))
    assert 250 <= len(values) <= 255, "one of 256 codes is the second zero"
    steps = np.diff(values[values > 0])
    assert steps.max() / steps.min() == pytest.approx(128), "8 segments, each with twice the step"


def test_codecs_keep_length_and_alignment_and_lose_more_at_lower_bit_rates():
    wave = spoken(2.0)[: 2 * SAMPLE_RATE - 77]
    for codec, rates in ((opus, (64, 24, 6)), (mp3, (128, 64, 32, 16))):
        errors = []
        for rate in rates:
            decoded = codec(wave, rate)
            assert decoded.shape == wave.shape
            lags = np.correlate(decoded[1000:25000], wave[3000:23000], "valid")
            assert abs(lags.argmax() - 2000) <= 2, f"{codec.__name__} at {rate} kbit/s is delayed"
            errors.append(np.mean((decoded - wave) ** 2))
        assert errors == sorted(errors)


@pytest.mark.parametrize(("codec", "bounds"), [(opus, (6, 256)), (mp3, (8, 160))])
def test_bit_rates_are_those_of_the_stream(codec, bounds, monkeypatch):
    """Of 4 seconds of noise, which no encoder can shorten, container included."""
    import soundfile

    sizes, read = [], soundfile.read
    monkeypatch.setattr(soundfile, "read", lambda file, **how: sizes.append(len(file.getvalue())) or read(file, **how))
    for rate in (16, 32, 64):
        codec(hiss(4.0), rate)
    assert [8 * size / 4 / 1000 for size in sizes] == pytest.approx([16, 32, 64], rel=0.12)


def test_clipping_is_below_the_peak():
    wave = spoken()
    clipped = clip(wave, 6.0)
    assert np.abs(clipped).max() == pytest.approx(np.abs(wave).max() * 10 ** (-6 / 20), rel=1e-6)
    inside = np.abs(wave) < np.abs(clipped).max()
    assert np.array_equal(clipped[inside], wave[inside])
    assert 0 < (~inside).mean() < 0.5


def test_truncation_keeps_the_beginning():
    wave = spoken()
    half = truncate(wave, 50)
    assert np.array_equal(half, wave[: len(wave) // 2])
    assert len(truncate(wave[:3], 1)) == 1
    assert duration_factor("truncation", 50) == 0.5


@pytest.mark.parametrize("kind", SPEECH)
@pytest.mark.parametrize("length", [1, 50, 400])
def test_very_short_and_silent_captions_survive(kind, length):
    for wave in (np.zeros(length, np.float32), spoken()[:length]):
        for level in KINDS[kind].levels:
            changed = perturbed(wave, kind, level)
            assert len(changed) > 0
            assert np.isfinite(changed).all()


def test_what_is_not_a_perturbation_of_speech_is_refused():
    with pytest.raises(ValueError, match="jpeg is not a perturbation of speech"):
        perturb_speech(spoken(), "jpeg", 10, generator_of(0, "jpeg", 0))
    with pytest.raises(ValueError, match="babble needs a background"):
        perturb_speech(spoken(), "babble", 10, generator_of(0, "babble", 0))
