"""Truncated and damaged audio files, and complete ones with unusual headers, in every container."""

import io
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.errors import UserError
from shards.media.audio import read_audio

RATE = 16000


def speech(seconds: float = 1.0, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Something that codecs do not make small: float32 [n, channels]."""
    n = round(seconds * rate)
    noise = 0.05 * np.random.default_rng(seed).standard_normal((n, channels))
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(n) / rate)[:, None] + noise).astype(np.float32)


def encoded(wave: np.ndarray, container: str, subtype: str | None = None, rate: int = RATE, **how: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=container, subtype=subtype, **how)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read_audio(data, 30)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Containers whose header tells how long the samples are.
TOLD = [
    *(("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "PCM_32", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *(("WAV", subtype) for subtype in ("IMA_ADPCM", "MS_ADPCM", "GSM610")),
    *((container, subtype) for container in ("WAVEX", "RF64", "W64", "CAF") for subtype in ("PCM_16", "FLOAT", "ULAW")),
    *((container, subtype) for container in ("AIFF", "AU") for subtype in ("PCM_16", "PCM_24", "FLOAT", "ULAW")),
    *(("NIST", subtype) for subtype in ("PCM_16", "PCM_24", "ULAW", "ALAW")),
    ("CAF", "ALAC_16"),
    ("SVX", "PCM_16"),
    ("MAT4", "FLOAT"),
    ("VOC", "PCM_16"),
    ("WVE", "ALAW"),
    ("HTK", "PCM_16"),
]
CODED = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("MP3", None), ("OGG", "OPUS"), ("OGG", "VORBIS")]
SAYS_HOW_MUCH = [one for one in TOLD if one[0] not in ("CAF", "MAT4", "VOC", "WVE", "HTK")]


@pytest.mark.parametrize(("container", "subtype"), [*TOLD, *CODED])
@pytest.mark.parametrize("rate", [8000, 48000])
def test_a_cut_recording_is_refused(container: str, subtype: str | None, rate: int) -> None:
    complete = encoded(speech(3.0, rate), container, subtype, rate)
    read_audio(complete, 30)
    for share in (0.1, 0.5, 0.9, 0.97):
        refusal(complete[: int(share * len(complete))])


@pytest.mark.parametrize(("container", "subtype"), [*TOLD, *CODED])
def test_a_recording_that_lost_bytes_within_is_refused(container: str, subtype: str | None) -> None:
    complete = encoded(speech(2.0), container, subtype)
    for share in (0.3, 0.5, 0.8):
        at = int(share * len(complete))
        refusal(complete[:at] + complete[at + 400 :])


@pytest.mark.parametrize(("container", "subtype"), CODED)
def test_a_recording_with_zeros_for_bytes_is_refused(container: str, subtype: str | None) -> None:
    complete = encoded(speech(2.0), container, subtype)
    at = len(complete) // 2
    refusal(complete[:at] + bytes(1000) + complete[at + 1000 :])


def writes(container: str, subtype: str | None, channels: int = 1, rate: int = RATE) -> bool:
    """Whether this libsndfile writes it, and reads as many channels again."""
    try:
        data = encoded(speech(0.1, rate, channels), container, subtype, rate)
        return soundfile.info(io.BytesIO(data)).channels == channels
    except (soundfile.SoundFileError, ValueError):
        return False


KINDS = [(*one, channels) for one in (*SAYS_HOW_MUCH, ("MP3", None)) for channels in (1, 2) if writes(*one, channels)]


@pytest.mark.parametrize(("container", "subtype", "channels"), KINDS)
def test_the_message_tells_how_much_is_there(container: str, subtype: str | None, channels: int) -> None:
    complete = encoded(speech(4.0, channels=channels), container, subtype)
    line = refusal(complete[: len(complete) // 2])
    assert re.search(r"truncated: its header declares (4\.[01]|3\.9) s, the file has (2\.[01]|1\.9) s: fetch", line)


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_an_ogg_stream_without_its_last_page_is_truncated(subtype: str) -> None:
    complete = encoded(speech(4.0), "OGG", subtype)
    last = complete.rindex(b"OggS")
    for end in (len(complete) - 1, last + 100, last, last // 2):
        assert "truncated: its Ogg stream ends before its last page, at byte " in refusal(complete[:end])


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_an_ogg_stream_that_lacks_a_page_is_damaged(subtype: str) -> None:
    complete = encoded(speech(6.0), "OGG", subtype)
    starts = [at for at in range(len(complete)) if complete[at : at + 4] == b"OggS"]
    one, following = starts[-3:-1]
    line = refusal(complete[:one] + complete[following:])
    assert f"damaged: bytes of its Ogg stream are missing or changed at byte {one:,}: fetch the file again" in line


def subtypes() -> Iterator[tuple[str, str]]:
    """Every container and encoding that libsndfile writes into memory and reads again."""
    for container in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(container):
            # RAW has no header, SD2 a second file; libsndfile reads no SDS from memory, and no DWVW at all.
            readable = container not in ("RAW", "SD2", "SDS") and not subtype.startswith("DWVW")
            if readable and any(writes(container, subtype, 1, rate) for rate in (8000, 16000, 44100)):
                yield container, subtype


@pytest.mark.parametrize(("container", "subtype"), subtypes())
def test_complete_recordings_of_all_containers_are_accepted(container: str, subtype: str) -> None:
    written = 0
    for channels, rate, frames in [
        *((1, 16000, frames) for frames in (101, 1153, 4001, 9000)),
        *((1, rate, 3000) for rate in (8000, 11025, 44100, 48000)),
        *((2, rate, 2999) for rate in (16000, 44100)),
    ]:
        try:
            data = encoded(speech(frames / rate, rate, channels), container, subtype, rate)
        except (soundfile.SoundFileError, ValueError):
            continue  # not with so many channels, or not at this rate
        written += 1
        assert len(read_audio(data, 30)) > 0.9 * frames * 16000 / rate or container in ("WVE", "XI", "HTK")
    assert written


@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_complete_mp3_are_accepted_and_truncated_ones_are_not(rate: int, channels: int, bitrate_mode: str) -> None:
    data = encoded(speech(1.5, rate, channels), "MP3", None, rate, bitrate_mode=bitrate_mode)
    assert len(read_audio(data, 30)) == 24000
    assert "truncated" in refusal(data[: 9 * len(data) // 10])


def without_xing(mp3: bytes) -> bytes:
    """The frames of an MP3 without the first, which declares their number, as many recorders write it."""
    return mp3[mp3.index(mp3[:2], 4) :]


def id3(size: int) -> bytes:
    """An ID3v2 tag, as long as one with a picture."""
    return b"ID3\4\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(size)


MP3 = encoded(speech(2.0), "MP3", None, bitrate_mode="VARIABLE")


@pytest.mark.parametrize(
    "data",
    [
        without_xing(MP3),
        without_xing(MP3)[:-50],  # real ones end within a frame
        id3(300_000) + MP3,
        id3(20) + id3(30) + MP3,
        MP3 + b"TAG" + bytes(125),
        MP3 + b"APETAGEX" + bytes(5000),
        MP3 + bytes(1000),
        MP3.replace(b"Xing", b"none"),
        encoded(speech(2.0), "MP3", None, bitrate_mode="CONSTANT") + b"\xff\xfb\x90\x64" + bytes(100),
    ],
    ids=lambda data: f"{len(data)}",
)
def test_complete_mp3_that_look_odd_are_accepted(data: bytes) -> None:
    assert len(read_audio(data, 30)) == pytest.approx(32000, abs=2000)


def test_joined_mp3_files_are_read_to_their_end() -> None:
    second = encoded(speech(1.5, seed=1), "MP3")
    for joined in (MP3 + second, id3(50) + MP3 + b"TAG" + bytes(125) + id3(70) + second):
        wave = read_audio(joined, 30)
        assert np.array_equal(wave, np.concatenate([read_audio(MP3, 30), read_audio(second, 30)]))


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_chained_ogg_streams_are_read_to_their_end(subtype: str) -> None:
    one, other = (encoded(speech(seconds, seed=seed), "OGG", subtype) for seed, seconds in ((1, 1.5), (2, 0.5)))
    both = np.concatenate([read_audio(one, 30), read_audio(other, 30)])
    assert np.array_equal(read_audio(one + other, 30), both)
    assert np.array_equal(read_audio(one + bytes(300) + other + bytes(300), 30), both)
    assert np.array_equal(read_audio(one + one, 30), np.tile(read_audio(one, 30), 2))
    with pytest.raises(UserError, match=r"2\.0 s of audio or more, the longest allowed is 1\.8 s"):
        read_audio(one + other, 1.8)
    assert "truncated" in refusal(one + other[:-100])
    assert "damaged" in refusal(one[:-100] + other)


def with_sizes(wav: bytes, riff: int, data: int) -> bytes:
    """A WAV with other numbers for the length of the file and of the samples."""
    at = wav.index(b"data") + 4
    wav = wav[:at] + struct.pack("<I", data) + wav[at + 4 :]
    return wav[:4] + struct.pack("<I", riff) + wav[8:]


PCM = encoded(speech(1.0), "WAV", "PCM_16")


@pytest.mark.parametrize(
    "data",
    [
        *(with_sizes(PCM, size, size) for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0)),
        with_sizes(PCM, 0xFFFFFFFF, 0xFFFFFFFF - 36),
        with_sizes(PCM, 0x7FFFFFFF, 0x7FFFFFFF - 36),
        with_sizes(PCM, 36, 0),
        with_sizes(PCM, 12345, 32000),
        with_sizes(PCM, len(PCM) - 8, 32044),  # counts the header too
        PCM + b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.45.100\0",
        PCM + b"odd bytes behind it",
        PCM[:36] + b"LIST" + struct.pack("<I", 5004) + b"INFO" + bytes(5000) + PCM[36:],
        id3(40) + PCM,
    ],
    ids=lambda data: f"{len(data)}",
)
def test_complete_wav_that_look_odd_are_accepted(data: bytes) -> None:
    assert len(read_audio(data, 30)) == pytest.approx(16000, abs=30)


def test_an_odd_number_of_bytes_needs_no_padding() -> None:
    padded = encoded(speech(0.1)[:999], "WAV", "PCM_U8")
    assert len(read_audio(padded, 30)) == len(read_audio(padded[:-1], 30)) == 999


@pytest.mark.parametrize(
    ("container", "name", "behind", "length"),
    [("AU", b".snd", 8, 0xFFFFFFFF), ("AIFF", b"SSND", 4, 0x7F000000), ("RF64", b"ds64", 16, 0xFFFFFFFF)],
)
def test_streamed_lengths_are_accepted(container: str, name: bytes, behind: int, length: int) -> None:
    data = encoded(speech(), container, "PCM_16")
    at = data.index(name) + behind
    assert len(read_audio(data[:at] + struct.pack(">I", length) + data[at + 4 :], 30)) == 16000


def sphere(wave: np.ndarray, change: Callable[[bytes], bytes]) -> bytes:
    data = encoded(wave, "NIST", "PCM_16")
    return change(data[:1024].rstrip(b"\0 ")).ljust(1024) + data[1024:]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b"sample_count -i 16000\n", b""),
        lambda header: header.replace(b"sample_count -i 16000", b"sample_count -i 32000"),  # of both channels
    ],
)
def test_sphere_headers_that_count_otherwise(change: Callable[[bytes], bytes]) -> None:
    assert len(read_audio(sphere(speech(channels=2), change), 30)) == 16000


def test_samples_behind_a_length_of_zero_are_named() -> None:
    line = refusal(with_sizes(PCM, len(PCM) - 8, 0))
    assert "its header declares 0 samples, but 32,000 bytes follow, as after an interrupted recording" in line
    assert "rewrite it, e.g. ffmpeg -ignore_length 1 -i X.wav Y.wav" in line
    empty = with_sizes(PCM[:44], 36, 0)
    for data in (empty, with_sizes(empty + b"LIST" + struct.pack("<I", 4) + b"INFO", 48, 0)):
        assert refusal(data).endswith("has no audio (0 samples)")


def test_a_file_is_read_as_its_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "one.bin"
    ogg = encoded(speech(2.0), "OGG", "OPUS")
    for data in (PCM, MP3, id3(100_000) + MP3, ogg, ogg + ogg, MP3 + MP3, without_xing(MP3)):
        path.write_bytes(data)
        assert np.array_equal(read_audio(path, 30), read_audio(data, 30))
        path.write_bytes(data[:-700])
        if data != without_xing(MP3):
            with pytest.raises(UserError, match="truncated"):
                read_audio(path, 30)
