"""Detects the type of a file from its first bytes, for messages about files that cannot be decoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["audio", "picture"]

HEAD_BYTES = 512  # enough for every signature below

_CONVERT_AUDIO = ", which libsndfile does not read: convert it, e.g. ffmpeg -i X.{suffix} X.flac"
_CONVERT_PICTURE = ", which Pillow does not read here: convert it to JPEG"
_UNPACK = ": unpack it"


@dataclass(frozen=True)
class _Content:
    """A file format."""

    name: str  # name of the format and medium
    kind: Kind | None = None  # whether it is audio or a picture; None if neither
    fix: str = ""  # how to make it readable; empty if libsndfile or Pillow reads it


def _audio(name: str, suffix: str = "") -> _Content:
    return _Content(name, "audio", _CONVERT_AUDIO.format(suffix=suffix) if suffix else "")


def _picture(name: str, fix: str = "") -> _Content:
    return _Content(name, "picture", fix)


# Offset, signature and format. The first match counts.
_SIGNATURES: tuple[tuple[int, bytes, _Content], ...] = (
    (0, b"\xff\xd8\xff", _picture("a JPEG picture")),
    (0, b"\x89PNG\r\n\x1a\n", _picture("a PNG picture")),
    (0, b"GIF8", _picture("a GIF picture")),
    (0, b"II*\0\x10\0\0\0CR", _picture("a raw photograph (Canon CR2)", _CONVERT_PICTURE)),
    (0, b"II*\0", _picture("a TIFF picture")),
    (0, b"MM\0*", _picture("a TIFF picture")),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", _picture("a JPEG 2000 picture")),
    (0, b"\xff\x4f\xff\x51", _picture("a JPEG 2000 picture")),
    (0, b"8BPS", _picture("a Photoshop picture")),
    (0, b"\xff\x0a", _picture("a JPEG XL picture", _CONVERT_PICTURE)),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", _picture("a JPEG XL picture", _CONVERT_PICTURE)),
    (0, b"v/1\1", _picture("an OpenEXR picture", _CONVERT_PICTURE)),
    (0, b"#?RADIANCE", _picture("a Radiance HDR picture", _CONVERT_PICTURE)),
    (0, b"\x49\x49\xbc\x01", _picture("a JPEG XR picture", _CONVERT_PICTURE)),
    (0, b"FUJIFILMCCD-RAW", _picture("a raw photograph (Fuji RAF)", _CONVERT_PICTURE)),
    (0, b"IIRO", _picture("a raw photograph (Olympus ORF)", _CONVERT_PICTURE)),
    (0, b"IIU\0", _picture("a raw photograph (Panasonic RW2)", _CONVERT_PICTURE)),
    (0, b"%!PS", _picture("a PostScript drawing", ": convert it to PNG")),
    (0, b"\xc5\xd0\xd3\xc6", _picture("a PostScript drawing", ": convert it to PNG")),
    (0, b"fLaC", _audio("FLAC audio")),
    (0, b"ID3", _audio("MP3 audio")),
    (0, b".snd", _audio("AU audio")),
    (0, b"riff\x2e\x91\xcf\x11", _audio("Wave64 audio")),
    (0, b"RF64", _audio("RF64 audio")),
    (0, b"ajkg", _audio("Shorten audio", "shn")),
    (0, b"#!AMR", _audio("AMR audio", "amr")),
    (0, b"#!SILK", _audio("SILK audio", "silk")),
    (1, b"#!SILK", _audio("SILK audio", "silk")),
    (0, b"MAC ", _audio("Monkey's Audio", "ape")),
    (0, b"wvpk", _audio("WavPack audio", "wv")),
    (0, b"MPCK", _audio("Musepack audio", "mpc")),
    (0, b"MP+", _audio("Musepack audio", "mpc")),
    (0, b"TTA1", _audio("True Audio", "tta")),
    (0, b"OFR ", _audio("OptimFROG audio", "ofr")),
    (0, b"DSD ", _audio("DSD audio", "dsf")),
    (0, b"FRM8", _audio("DSD audio", "dff")),
    (0, b"ADIF", _audio("AAC in ADIF", "aac")),
    (0, b"\x0b\x77", _audio("AC-3 audio", "ac3")),
    (0, b"\x7f\xfe\x80\x01", _audio("DTS audio", "dts")),
    (0, b".ra\xfd", _audio("RealAudio", "ra")),
    (0, b".RMF", _audio("RealMedia", "rm")),
    (0, b"MThd", _Content("a MIDI file, which has notes and no audio")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _audio("Windows Media (WMA or WMV in ASF)", "wma")),
    (0, b"FLV\1", _audio("Flash video", "flv")),
    (0, b"\0\0\1\xba", _audio("an MPEG video", "mpg")),
    (0, b"\0\0\1\xb3", _audio("an MPEG video", "mpg")),
    (
        0,
        b"\0\5\x16\7",
        _Content("macOS metadata (AppleDouble), not the file itself: delete it and name the file without ._"),
    ),
    (0, b"%PDF", _Content("a PDF document: extract its pictures, e.g. pdfimages -all X.pdf X")),
    (0, b"PK\3\4", _Content("a zip archive" + _UNPACK)),
    (0, b"PK\5\6", _Content("an empty zip archive")),
    (0, b"\x1f\x8b", _Content("gzip-compressed" + _UNPACK + ", e.g. gunzip X.gz")),
    (0, b"BZh", _Content("bzip2-compressed" + _UNPACK)),
    (0, b"\xfd7zXZ\0", _Content("xz-compressed" + _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", _Content("zstd-compressed" + _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", _Content("a 7z archive" + _UNPACK)),
    (0, b"Rar!\x1a\7", _Content("a RAR archive" + _UNPACK)),
    (257, b"ustar", _Content("a tar archive" + _UNPACK)),
    (0, b"\x93NUMPY", _Content("a NumPy array: save it as a picture or an audio file")),
    (0, b"\x89HDF\r\n\x1a\n", _Content("an HDF5 file: save its contents as pictures or audio files")),
)

# Brands of the ISO base media format, whose first box is "ftyp".
_BRANDS: tuple[tuple[tuple[bytes, ...], _Content], ...] = (
    ((b"avif", b"avis"), _picture("an AVIF picture", _CONVERT_PICTURE)),
    (
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2"),
        _picture("a HEIC picture", _CONVERT_PICTURE),
    ),
    ((b"crx ",), _picture("a raw photograph (Canon CR3)", _CONVERT_PICTURE)),
    ((b"M4A ", b"M4B ", b"M4P ", b"F4A "), _audio("AAC in MP4", "m4a")),
    ((b"3gp", b"3g2"), _audio("AMR or AAC in 3GP", "3gp")),
    ((b"qt  ",), _audio("a QuickTime video", "mov")),
)
_ANY_BRAND = _audio("AAC or a video in MP4", "mp4")

# WAV format tags that libsndfile does not support.
_IN_WAV = {
    0x0022: "TrueSpeech", 0x0042: "G.723.1", 0x0045: "G.726", 0x0050: "MPEG audio", 0x0055: "MP3", 0x0083: "G.729",
    0x00FF: "AAC", 0x0130: "ACELP", 0x0160: "Windows Media", 0x0161: "Windows Media", 0x0162: "Windows Media",
    0x1610: "AAC", 0x2000: "AC-3", 0x674F: "Vorbis", 0x6750: "Vorbis", 0x6751: "Vorbis", 0xA109: "Speex",
}  # fmt: skip

_POINTERS = (
    (b"version https://git-lfs.", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (b"version https://hawser.", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (b"annex/objects/", "a git-annex pointer, not the file itself: run git annex get"),
)


def describe_content(head: bytes, wanted: Kind | None = None) -> str | None:
    """Describe in one clause what an undecodable file is and how to fix it, from its first bytes.

    Args:
        head: The first bytes of the file, up to `HEAD_BYTES` of them.
        wanted: Expected kind. The other kind is then described as unexpected, and formats that the decoder supports
            return None, since such a file is damaged.

    Returns:
        A clause such as "AAC in MP4, which libsndfile does not read: convert it, e.g. ffmpeg -i X.m4a X.flac", to
        follow the file's name; None if the type is unknown.
    """
    head = head[:HEAD_BYTES]
    if not head:
        return "empty file (0 bytes)"
    content = _binary(head) or _text(head)
    if content is None or (content.kind == wanted and content.kind and not content.fix):
        return None
    if wanted and content.kind and content.kind != wanted:
        expected = "audio" if wanted == "audio" else "a picture"
        return f"{content.name}, where {expected} is expected: check the columns or paths"
    return content.name + content.fix


def read_head(source: Path | bytes) -> bytes:
    """Read the first bytes of a file for `describe_content`; empty if it cannot be read."""
    if isinstance(source, bytes):
        return source[:HEAD_BYTES]
    try:
        with open(source, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _binary(head: bytes) -> _Content | None:
    for offset, magic, content in _SIGNATURES:
        if head.startswith(magic, offset):
            return content
    for probe in (_iso_media, _riff, _aiff, _ogg, _caf, _sphere, _matroska, _mpeg_audio, _transport_stream, _bitmap):
        if detected := probe(head):
            return detected
    if len(head) >= 16 and not head.strip(b"\0"):
        return _Content("only zero bytes: the copy or download is incomplete, fetch it again")
    return None


def _iso_media(head: bytes) -> _Content | None:
    if head[4:8] != b"ftyp":
        # Old QuickTime files start with another box.
        return _audio("a QuickTime video", "mov") if head[4:8] in (b"moov", b"mdat", b"wide") else None
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
    # An AVIF file also lists HEIF's general brands, so the table's order decides.
    return next((content for known, content in _BRANDS if any(brand.startswith(known) for brand in brands)), _ANY_BRAND)


def _riff(head: bytes) -> _Content | None:
    if head[:4] not in (b"RIFF", b"RIFX"):
        return None
    form = head[8:12]
    if form == b"WEBP":
        return _picture("a WebP picture")
    if form == b"AVI ":
        return _audio("an AVI video", "avi")
    if form != b"WAVE":
        return None
    at = head.find(b"fmt ", 12)
    tag = int.from_bytes(head[at + 8 : at + 10], "little" if head[:4] == b"RIFF" else "big") if at > 0 else 0
    return _audio(f"{_IN_WAV[tag]} in WAV", "wav") if tag in _IN_WAV else _audio("WAV audio")


def _aiff(head: bytes) -> _Content | None:
    if head[:4] != b"FORM":
        return None
    return {b"AIFF": _audio("AIFF audio"), b"AIFC": _audio("AIFF audio"), b"ILBM": _picture("an IFF picture")}.get(
        head[8:12]
    )


def _ogg(head: bytes) -> _Content | None:
    if head[:4] != b"OggS":
        return None
    for magic, name in ((b"Speex   ", "Speex in Ogg"), (b"\x80theora", "a Theora video in Ogg")):
        if magic in head[:64]:
            return _audio(name, "ogg")
    return _audio("Ogg audio")


def _caf(head: bytes) -> _Content | None:
    if head[:4] != b"caff":
        return None
    codec = head[28:32].rstrip(b"\0 ")
    if codec in (b"lpcm", b"alaw", b"ulaw", b"alac", b""):
        return _audio("CAF audio")
    return _audio(f"{_printable(codec).upper().strip('.')} in CAF", "caf")


def _sphere(head: bytes) -> _Content | None:
    if not head.startswith(b"NIST_1A"):
        return None
    if b"shorten" in head:
        fix = ", which libsndfile does not read: convert it, e.g. sph2pipe -f wav X.sph X.wav"
        return _Content("NIST SPHERE audio compressed by shorten", "audio", fix)
    return _audio("NIST SPHERE audio")


def _matroska(head: bytes) -> _Content | None:
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return None
    return _audio("Matroska (MKA or MKV)", "mkv") if b"matroska" in head else _audio("WebM", "webm")


def _mpeg_audio(head: bytes) -> _Content | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    layer, version = head[1] >> 1 & 3, head[1] >> 3 & 3
    if head[1] >= 0xF0 and layer == 0 and head[2] >> 2 & 15 < 13:
        return _audio("AAC in ADTS", "aac")
    return _audio("MP3 audio") if layer in (1, 2) and version != 1 and head[2] >> 4 != 15 else None


def _transport_stream(head: bytes) -> _Content | None:
    return _audio("an MPEG transport stream", "ts") if head[:1] == b"G" and head[188:189] == b"G" else None


def _bitmap(head: bytes) -> _Content | None:
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return _picture("a BMP picture")
    if head[:4] == b"\0\0\1\0" and int.from_bytes(head[18:22], "little") == 6 + 16 * int.from_bytes(
        head[4:6], "little"
    ):
        return _picture("an icon (ICO)")
    if head[:2] == b"PF" and head[2:3].isspace():
        return _picture("a color PFM picture", ", which Pillow does not read: convert it to PNG or TIFF of 16 bits")
    return _picture("a PNM picture") if head[:1] == b"P" and head[1:2] in b"1234567f" and head[2:3].isspace() else None


def _text(head: bytes) -> _Content | None:
    text = _decoded(head)
    if text is None:
        return None
    for magic, clause in _POINTERS:
        if magic in head.split(b"\n", 1)[0]:
            return _Content(clause)
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body", "<script")) or "<html" in start:
        return _Content("an HTML page, as a server sends for a missing or forbidden file: fetch it again")
    if "<svg" in start:
        return _picture("an SVG drawing", ": convert it to PNG")
    if start.startswith(("<?xml", "<error")):
        return _Content("XML text, as a server sends for a missing or forbidden file: fetch it again")
    return _Content(f"text that begins {_printable(text.strip()[:40])!r}: check the columns or paths")


def _decoded(head: bytes) -> str | None:
    """Decode the bytes if they are text without control characters; None otherwise."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head[: len(head) & ~1].decode("utf-16", "replace")
    else:
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if len(head) - error.start > 3:  # not just a character that is cut at the end
                return None
            text = head[: error.start].decode("utf-8-sig", "replace")
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else None


def _printable(text: str | bytes) -> str:
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
