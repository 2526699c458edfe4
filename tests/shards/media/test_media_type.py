import io
import re
import struct
import zipfile

import numpy as np
import pytest
import soundfile

from shards.media.media_type import HEAD_BYTES, describe_content, read_head
from tests.shards.media.picture_files import saved


def iso(major, *compatible):
    box = b"ftyp" + major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(box) + 4) + box + bytes(64)


def wav(tag):
    fmt = struct.pack("<HHIIHH", tag, 1, 16_000, 32_000, 2, 16)
    return b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + bytes(64)


def caf(codec):
    return b"caff\0\1\0\0desc" + struct.pack(">Qd4s", 32, 16_000.0, codec) + bytes(40)


AUDIO = {  # formats that libsndfile does not read: bytes, description, suffix
    "m4a": (iso(b"M4A ", b"mp42", b"isom"), "AAC in MP4", "m4a"),
    "m4b": (iso(b"M4B ", b"isom"), "AAC in MP4", "m4a"),
    "m4a by its second brand": (iso(b"mp42", b"M4A "), "AAC in MP4", "m4a"),
    "mp4": (iso(b"isom", b"mp41"), "AAC or a video in MP4", "mp4"),
    "3gp": (iso(b"3gp4", b"isom"), "AMR or AAC in 3GP", "3gp"),
    "mov": (iso(b"qt  "), "a QuickTime video", "mov"),
    "mov without ftyp": (b"\0\0\1\0moov" + bytes(64), "a QuickTime video", "mov"),
    "adts": (b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(40), "AAC in ADTS", "aac"),
    "adts of MPEG-2 with a checksum": (b"\xff\xf8\x50\x80\x02\x1f\xfc" + bytes(40), "AAC in ADTS", "aac"),
    "adif": (b"ADIF" + bytes(40), "AAC in ADIF", "aac"),
    "amr": (b"#!AMR\n" + bytes(40), "AMR audio", "amr"),
    "amr wide band": (b"#!AMR-WB\n" + bytes(40), "AMR audio", "amr"),
    "silk": (b"\2#!SILK_V3" + bytes(40), "SILK audio", "silk"),
    "webm": (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm" + bytes(40), "WebM", "webm"),
    "matroska": (b"\x1a\x45\xdf\xa3\xa3B\x86\x81\1B\x82\x88matroska" + bytes(40), "Matroska", "mkv"),
    "wma": (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(40), "Windows Media", "wma"),
    "caf with AAC": (caf(b"aac "), "AAC in CAF", "caf"),
    "caf with IMA": (caf(b"ima4"), "IMA4 in CAF", "caf"),
    "caf with MP3": (caf(b".mp3"), "MP3 in CAF", "caf"),
    "wav with MP3": (wav(0x55), "MP3 in WAV", "wav"),
    "wav with G.729": (wav(0x83), "G.729 in WAV", "wav"),
    "wav with WMA": (wav(0x161), "Windows Media in WAV", "wav"),
    "speex": (b"OggS\0\2" + bytes(22) + b"Speex   1.2" + bytes(64), "Speex in Ogg", "ogg"),
    "ape": (b"MAC \x96\x0f" + bytes(40), "Monkey's Audio", "ape"),
    "wavpack": (b"wvpk" + bytes(40), "WavPack", "wv"),
    "shorten": (b"ajkg\2" + bytes(40), "Shorten", "shn"),
    "avi": (b"RIFF\0\1\0\0AVI LIST" + bytes(40), "an AVI video", "avi"),
    "transport stream": (b"G" + bytes(187) + b"G" + bytes(187), "an MPEG transport stream", "ts"),
}


@pytest.mark.parametrize(("head", "name", "suffix"), AUDIO.values(), ids=AUDIO)
def test_audio_that_libsndfile_does_not_read_is_to_be_converted(head, name, suffix):
    clause = describe_content(head, "audio")
    assert clause.startswith(name)
    assert clause.endswith(f", which libsndfile does not read: convert it, e.g. ffmpeg -i X.{suffix} X.flac")
    assert describe_content(head) == clause
    assert describe_content(head, "picture").endswith(", where a picture is expected: check the columns or paths")


def test_sphere_compressed_by_shorten_names_its_own_tool():
    head = b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
    assert "sph2pipe" in describe_content(head, "audio")
    assert describe_content(b"NIST_1A\n   1024\nsample_coding -s3 pcm\nend_head\n", "audio") is None


PICTURES = {
    "heic": (iso(b"heic", b"mif1", b"heic"), "a HEIC picture"),
    "heic by its second brand": (iso(b"mif1", b"heic"), "a HEIC picture"),
    "avif": (iso(b"avif", b"mif1", b"miaf"), "an AVIF picture"),
    "avif by its second brand": (iso(b"mif1", b"avif"), "an AVIF picture"),
    "raw of Canon": (iso(b"crx "), "a raw photograph"),
    "raw of Fuji": (b"FUJIFILMCCD-RAW 0201" + bytes(40), "a raw photograph"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "a JPEG XL picture"),
    "JPEG XL in a container": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL picture"),
    "OpenEXR": (b"v/1\1\2\0\0\0" + bytes(40), "an OpenEXR picture"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
}


@pytest.mark.parametrize(("head", "name"), PICTURES.values(), ids=PICTURES)
def test_pictures_that_pillow_does_not_read_are_to_be_converted(head, name):
    clause = describe_content(head, "picture")
    assert clause.startswith(name)
    assert "convert it to " in clause
    assert describe_content(head) == clause
    assert describe_content(head, "audio").endswith(", where audio is expected: check the columns or paths")


@pytest.mark.parametrize("kind", [None, "audio", "picture"])
@pytest.mark.parametrize(
    ("head", "clause"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"<!DOCTYPE html><html>", "an HTML page.*fetch it again"),
        (b"\xef\xbb\xbf\n <HTML><body>404", "an HTML page"),
        (b"<!-- login -->\n<html lang='en'>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs.*: run git lfs pull$"),
        (b"/annex/objects/SHA256E-s1--a.wav\n", "git-annex.*: run git annex get$"),
        (b"../.git/annex/objects/Xk/9z/SHA256E-s1--a.wav", "git-annex"),
        (b"PK\3\4\x14\0", "a zip archive: unpack it"),
        (b"\x1f\x8b\x08\0", "gzip-compressed: unpack it"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd-compressed"),
        (bytes(257) + b"ustar\x0000", "a tar archive"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "macOS metadata"),
        (bytes(64), "only zero bytes"),
        (b"hello there,\tthis is\r\nno media", "text that begins 'hello there, this is no media'"),
        ("Überschrift".encode("utf-16"), "text that begins 'Überschrift'"),
        (b'{"error": "quota exceeded"}', "text that begins"),
    ],
)
def test_files_that_are_neither_audio_nor_picture(head, clause, kind):
    assert re.search(clause, describe_content(head, kind))


def recorded(container, subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(3_000), 16_000, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_pictures_that_pillow_reads_are_described_only_where_audio_is_expected(kind):
    assert describe_content(saved(kind), "picture") is None
    assert describe_content(saved(kind), "audio").endswith("where audio is expected: check the columns or paths")
    assert describe_content(saved(kind))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "MS_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
     ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16"),
     ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("NIST", "PCM_16")],
)  # fmt: skip
def test_audio_that_libsndfile_reads_is_described_only_where_a_picture_is_expected(container, subtype):
    data = recorded(container, subtype)
    assert describe_content(data, "audio") is None
    assert describe_content(data, "picture").endswith("where a picture is expected: check the columns or paths")
    assert describe_content(data)


def test_unknown_bytes_have_no_description():
    rng = np.random.default_rng(0)
    noise = [bytes([1, 2]) + rng.integers(0, 256, 200).astype(np.uint8).tobytes() for _ in range(50)]
    assert {describe_content(head) for head in noise} == {None}


def test_every_clause_is_one_line_of_any_bytes():
    rng = np.random.default_rng(1)
    heads = [saved("PNG"), *(head for head, *_ in AUDIO.values()), b"<html>", "é\n".encode() * 300]
    for head in heads:
        for end in range(len(head[:80])):
            damaged = head[:end] + rng.integers(0, 256, 9).astype(np.uint8).tobytes()
            for text in (describe_content(head[:end], "audio"), describe_content(damaged)):
                assert text is None or (len(text) < 160 and text.isprintable())
    assert describe_content("é".encode() * 300).startswith("text")


def test_head_of_a_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.wav", "w") as archive:
        archive.writestr("a.wav", bytes(9_000))
    assert len(read_head(tmp_path / "a.wav")) == HEAD_BYTES
    assert describe_content(read_head(tmp_path / "a.wav")) == "a zip archive: unpack it"
    assert read_head(b"RIFF") == b"RIFF"
    assert read_head(tmp_path) == read_head(tmp_path / "missing") == b""
