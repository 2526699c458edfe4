import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.errors import UserError
from shards.media.audio import CODECS, decode_audio, encode_audio, read_audio, resample

FIXTURES = Path(__file__).parents[3].parent / "shared/data/audio-fixtures"


def tone(seconds=0.5, rate=16000, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def loudest_hertz(wave):
    return np.abs(np.fft.rfft(wave)).argmax() * 16000 / len(wave)


def test_sixteen_bit_recording_comes_through_unchanged(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 16000)
    wave = read_audio(tmp_path / "a.wav", 30)
    assert wave.dtype == np.float32
    for codec in ("flac", "wav"):
        assert np.array_equal(decode_audio(encode_audio(wave, codec)) * 32768, pcm), codec


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_keep_the_sound_and_are_deterministic(codec):
    wave = tone(2.0)
    data = encode_audio(wave, codec)
    assert encode_audio(wave.copy(), codec) == data
    decoded = decode_audio(data)
    assert len(decoded) == len(wave)
    assert np.corrcoef(decoded, wave)[0, 1] > 0.99


def test_opus_pages_have_serial_zero_and_a_checksum_that_decoders_accept():
    data = encode_audio(tone(3.0), "opus")
    assert struct.unpack_from("<I", data, 14) == (0,)
    assert soundfile.info(io.BytesIO(data)).subtype == "OPUS"
    broken = bytearray(data)
    broken[22] ^= 1  # the first page's checksum
    with pytest.raises(UserError):
        decode_audio(bytes(broken))


def test_loud_samples_are_clipped_not_wrapped():
    decoded = decode_audio(encode_audio(np.array([1.0, -1.0, 0.999999], np.float32), "wav"))
    assert decoded.tolist() == pytest.approx([1.0, -1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44101])
def test_other_rates_are_resampled(rate):
    wave = resample(tone(0.5, rate), rate)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(8000, abs=2)
    assert loudest_hertz(wave) == pytest.approx(440, abs=3)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mp3 named.wav", {"format": "MP3"}),
        ("flac named.mp3", {"format": "FLAC", "subtype": "PCM_24"}),
        ("opus.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("vorbis.txt", {"format": "OGG", "subtype": "VORBIS"}),
        ("sphere.sph", {"format": "NIST"}),
        ("flac named.raw", {"format": "FLAC"}),
    ],
)
def test_decoded_by_content_whatever_the_name(tmp_path, name, how):
    path = tmp_path / name
    soundfile.write(path, np.stack([tone(0.5, 48000)] * 2, axis=1), 48000, **how)
    wave = read_audio(path, 30)
    assert 7900 < len(wave) < 9500  # lossy codecs pad
    assert loudest_hertz(wave) == pytest.approx(440, abs=4)
    assert np.array_equal(read_audio(path.read_bytes(), 30), wave)


def test_complete_length_is_read_over_many_blocks(tmp_path):
    pcm = np.random.default_rng(0).integers(-1000, 1000, 200_000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", pcm, 16000)
    assert np.array_equal(read_audio(tmp_path / "a.flac", 30) * 32768, pcm)


def with_rate(wav, rate):
    """A WAV whose header claims another sampling rate."""
    return wav[:24] + struct.pack("<I", rate) + wav[28:]


def without_length(flac):
    """A FLAC as it is written to a pipe: the number of frames, 36 bits of its first block, is left at 0."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def bad_files(folder):
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("no audio at all, though its name says so")
    soundfile.write(folder / "no samples.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "long.wav", np.zeros(33_000, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan], np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "slow.wav", np.zeros(10, np.float32), 100)
    (folder / "cut.flac").write_bytes(encode_audio(tone(), "flac")[:3000])
    (folder / "folder.wav").mkdir()
    (folder / "fast.wav").write_bytes(with_rate(encode_audio(tone(), "wav"), 2_000_000_000))
    (folder / "piped.flac").write_bytes(without_length(encode_audio(tone(), "flac")))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.wav", "No such file"),
        ("empty.wav", r"empty file \(0 bytes\)"),
        ("text.wav", "cannot be decoded as audio"),
        ("no samples.wav", r"has no audio \(0 samples\)"),
        ("long.wav", r"2\.1 s of audio or more, the longest allowed is 2 s"),
        ("nan.wav", "not finite"),
        ("slow.wav", "sampling rate 100 Hz"),
        ("cut.flac", "cannot be decoded as audio"),
        ("folder.wav", r"cannot be decoded as audio \(Is a directory\)"),
        ("fast.wav", "sampling rate 2000000000 Hz, expected"),
        ("piped.flac", "its header does not give its length: rewrite it"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, reason):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        read_audio(tmp_path / name, 2)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0", "AAC in MP4, .* convert it, e.g. ffmpeg -i X.m4a X.flac"),
        (b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(200), "AAC in ADTS, .* convert it, e.g. ffmpeg -i X.aac X.flac"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webm" + bytes(200), "WebM, .* convert it"),
        (b"<!DOCTYPE html><html><body>403", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "a PNG picture, where audio is expected"),
    ],
)
def test_files_without_audio_are_described_by_their_content(tmp_path, data, message):
    path = tmp_path / "speech.wav"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(UserError, match=f"cannot be decoded as audio: {message}") as caught:
            read_audio(source, 30)
        assert "\n" not in str(caught.value)


def test_length_and_rate_are_checked_before_decoding(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "hour.flac", np.zeros(16000 * 3600, np.int16), 16000)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(UserError, match=r"3600\.0 s of audio"):
        read_audio(tmp_path / "hour.flac", 30)
    (tmp_path / "fast.wav").write_bytes(with_rate(encode_audio(tone(), "wav"), 2_000_000_000))
    with pytest.raises(UserError, match="sampling rate 2000000000 Hz"):
        read_audio(tmp_path / "fast.wav", 30)


def test_resampling_does_not_pass_the_limit(tmp_path):
    soundfile.write(tmp_path / "odd.wav", tone(2, 44101), 44101)
    assert len(read_audio(tmp_path / "odd.wav", 2)) == 32_000


def test_length_is_checked_again_while_decoding(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000 * 60, np.int16), 16000)
    claimed = iter([100])  # what the header declares at first
    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda self: next(claimed, self._info.frames)))
    with pytest.raises(UserError, match="longest allowed is 30 s"):
        read_audio(tmp_path / "a.wav", 30)


@pytest.mark.parametrize("data", [b"", b"junk", encode_audio(tone(), "wav")[:20]])
def test_damaged_member(data):
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_audio(data)


def test_members_of_unknown_length_or_another_rate_are_refused():
    with pytest.raises(UserError, match="does not give its length in its header"):
        decode_audio(without_length(encode_audio(tone(), "flac")))
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 8000, format="WAV")
    with pytest.raises(UserError, match="8000 Hz"):
        decode_audio(buffer.getvalue())


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no audio fixtures")
def test_real_files_that_decoders_trip_over():
    for path in sorted(FIXTURES.iterdir()):
        wave = read_audio(path, 30)
        assert wave.size > 1000, path.name
        assert np.abs(wave).max() > 0.001, path.name
