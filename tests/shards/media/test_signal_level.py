"""Recordings at a wrong scale, silent, clipped, or whose channels cancel: refused or named by stated rules."""

import io

import numpy as np
import pytest
import soundfile

from shards.errors import UserError
from shards.media.audio import decode_audio, encode_audio, mix_down, read_audio, read_recording
from shards.media.signal_level import ChannelMixer, LevelMeter, level_warning

RATE = 16000


def tone(peak: float = 0.5, rate: int = RATE) -> np.ndarray:
    return peak * np.sin(2 * np.pi * 220 * np.arange(rate // 2) / rate)


def speech(peak: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness varies as that of speech does, with few samples near its peak: float64 [n]."""
    chance = np.random.default_rng(seed)
    loudness = np.repeat(chance.uniform(0, 1, 80) ** 2, 200)
    wave = chance.laplace(size=len(loudness)) * loudness
    return peak * wave / np.abs(wave).max()


def encoded(wave: np.ndarray, subtype: str = "FLOAT", container: str = "WAV", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=container, subtype=subtype)
    return buffer.getvalue()


FLOATS = [(container, subtype) for container in ("WAV", "AIFF", "AU", "CAF", "W64") for subtype in ("FLOAT", "DOUBLE")]


@pytest.mark.parametrize(("container", "subtype"), FLOATS)
@pytest.mark.parametrize("rate", [RATE, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("peak", [4.0, 128.0, 32768.0, 2.0**31, 1e29])
def test_floats_far_beyond_full_scale_are_refused(
    container: str, subtype: str, rate: int, channels: int, peak: float
) -> None:
    wave = np.stack([tone(peak, rate)] * channels, axis=1)
    with pytest.raises(UserError, match=r"has samples up to .*, full scale is 1: divide them") as caught:
        read_audio(encoded(wave, subtype, container, rate), 30)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_values_that_are_not_finite_are_refused(number: float, channels: int) -> None:
    wave = np.stack([tone()] * channels, axis=1)
    wave[100, -1] = number
    with pytest.raises(UserError, match="not finite"):
        read_audio(encoded(wave), 30)


def test_opposite_channels_far_beyond_full_scale_are_refused() -> None:
    for peak in (32768.0, 1e29):
        with pytest.raises(UserError, match="full scale is 1"):
            read_audio(encoded(np.stack([tone(peak), -tone(peak)], axis=1)), 30)


@pytest.mark.parametrize("peak", [1.0, 1.2, 1.9])
def test_a_little_beyond_full_scale_is_clipped_and_named(peak: float) -> None:
    recording = read_recording(encoded(tone(peak)), 30)
    assert np.abs(recording.wave).max() == 1
    assert recording.wave == pytest.approx(tone(peak).clip(-1, 1), abs=1e-6)
    assert recording.warning is not None
    assert recording.warning.startswith("clipped: ")
    assert recording.warning.endswith(" % of its samples are at full scale")


@pytest.mark.parametrize(
    ("wave", "subtype"),
    [
        (tone(1e-5), "FLOAT"),
        (tone(1e-9), "DOUBLE"),
        (np.rint(tone(32767)).astype(np.int32), "PCM_32"),  # 16-bit values in 32-bit words
        (np.rint(tone(500)).astype(np.int32), "PCM_32"),
        (np.rint(tone(100)).astype(np.int32) << 8, "PCM_24"),
    ],
)
@pytest.mark.parametrize("container", ["WAV", "AIFF", "CAF"])
def test_what_16_bits_would_store_as_silence_is_refused(wave: np.ndarray, subtype: str, container: str) -> None:
    with pytest.raises(UserError, match=r"of full scale, which 16 bits store as silence; .*: scale them up"):
        read_audio(encoded(wave, subtype, container), 30)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_digital_silence_is_kept_and_named(subtype: str) -> None:
    for silence in (np.zeros(8000), np.zeros((8000, 2))):
        recording = read_recording(encoded(silence, subtype), 30)
        assert recording.warning == "silence"
        assert not recording.wave.any()


@pytest.mark.parametrize(
    ("wave", "subtype", "warning"),
    [
        (np.rint(tone(3)).astype(np.int16), "PCM_16", "silence"),
        (np.rint(tone(40)).astype(np.int16), "PCM_16", "very quiet: its peak is -58 dB of full scale"),
        # 24-bit values in 32-bit words, 16-bit values in 24-bit words
        (np.rint(tone(2**23 - 1)).astype(np.int32), "PCM_32", "very quiet: its peak is -48 dB of full scale"),
        (np.rint(tone(2**15 - 1)).astype(np.int32) << 8, "PCM_24", "very quiet: its peak is -48 dB of full scale"),
        (np.rint(speech(200)).astype(np.int16), "PCM_16", None),
        (speech(0.01), "FLOAT", None),
    ],
)
def test_quiet_recordings_are_kept_and_named(wave: np.ndarray, subtype: str, warning: str | None) -> None:
    recording = read_recording(encoded(wave, subtype), 30)
    assert recording.warning == warning
    stored = decode_audio(encode_audio(recording.wave, "flac"))
    assert stored == pytest.approx(recording.wave, abs=1 / 65536)
    assert stored.any()


def test_normalized_speech_is_not_called_clipped() -> None:
    for seed in range(5):
        assert level_warning(speech(1.0, seed).astype(np.float32)) is None
        assert "clipped: " in str(level_warning((3 * speech(1.0, seed)).clip(-1, 1).astype(np.float32)))


def test_a_meter_adds_up_its_blocks() -> None:
    wave = (3 * speech(1.0)).clip(-1, 1).astype(np.float32)
    meter = LevelMeter()
    for start in range(0, len(wave), 999):
        meter.add(wave[start : start + 999])
    assert (meter.samples, meter.peak, meter.warning) == (len(wave), 1.0, level_warning(wave))
    meter.add(np.array([np.nan], np.float32))
    assert np.isnan(meter.peak)


OPPOSITE = np.stack([tone(), -tone()], axis=1)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("NIST", "PCM_16"), ("MP3", None), ("OGG", "OPUS"), ("OGG", "VORBIS")],
)
def test_of_channels_that_cancel_the_loudest_is_kept_and_named(container: str, subtype: str | None) -> None:
    data = encoded(OPPOSITE * [0.9, 1.0], subtype, container)
    recording = read_recording(data, 30)
    assert recording.warning == "cancelled: the mean of its channels is nearly 0; channel 2 was kept"
    channels, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert rate == RATE
    assert recording.wave == pytest.approx(channels[:, 1].clip(-1, 1), abs=1e-3)


def test_cancellation_is_measured_over_the_complete_recording() -> None:
    long = np.tile(OPPOSITE, (20, 1))
    assert "cancel" in str(read_recording(encoded(long), 30).warning)
    long[40_000:, 1] *= -1  # the rest is in phase
    assert read_recording(encoded(long), 30).wave == pytest.approx(long.mean(axis=1), abs=1e-6)


@pytest.mark.parametrize(
    "channels",
    [
        OPPOSITE * [1.0, -1.0],
        OPPOSITE * [1.0, 0.0],
        OPPOSITE * [1.0, 0.5],  # weak, but the mean has a quarter of the louder one
        np.random.default_rng(0).uniform(-0.3, 0.3, (8000, 2)),
        np.random.default_rng(0).uniform(-0.3, 0.3, (8000, 16)),
        np.eye(8)[0] * tone()[:, None],
        np.zeros((8000, 2)),
    ],
    ids=str.split("in-phase one-silent half unrelated 16-unrelated one-of-8 silent"),
)
def test_channels_that_do_not_cancel_are_averaged(channels: np.ndarray) -> None:
    recording = read_recording(encoded(channels), 30)
    assert recording.wave == pytest.approx(channels.mean(axis=1), abs=1e-6)
    assert "cancel" not in str(recording.warning)


def test_mix_down_follows_the_same_rule() -> None:
    assert mix_down(OPPOSITE.T) == pytest.approx(tone(), abs=1e-6)
    assert mix_down(np.float32([[0.5, 0.0], [0.1, 0.2]])) == pytest.approx([0.3, 0.1])
    assert mix_down(np.float32([0.5, 0.0])) == pytest.approx([0.5, 0.0])
    assert ChannelMixer().kept is None
