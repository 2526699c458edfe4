import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.media.picture import decode_picture, read_picture
from shards.media.picture_metadata import without_metadata
from tests.shards.media import picture_files as files
from tests.shards.media.picture_files import EXIF, chunk, exif, jpeg_with, picture, png_with, webp_with

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the odd values

UPRIGHT = np.asarray(picture().transpose(Image.Transpose.ROTATE_270)).astype(int)  # by orientation 6


def stored(tmp_path, data, name="a.jpg"):
    (tmp_path / name).write_bytes(data)
    return read_picture(tmp_path / name, 256, 95)


def is_upright(data):
    pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    return pixels.shape == UPRIGHT.shape and np.abs(pixels - UPRIGHT).mean() < 5


def tiff(entries, order="<", orientation=6):
    short = struct.pack(order + "H", orientation)
    return files.tiff(np.asarray(picture()), 1, 2, order, more=[(274, 3, 1, short), *entries])


def raw_profile(block):
    text = b"Raw profile type exif\0\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    return png_with(chunk(b"tEXt", text))


HOLDERS = {  # of an EXIF block with these entries and this orientation
    "JPEG": lambda entries, turn=6: jpeg_with((0xE1, EXIF + exif(entries, turn))),
    "JPEG, big-endian": lambda entries, turn=6: jpeg_with((0xE1, EXIF + exif(entries, turn, ">"))),
    "PNG": lambda entries, turn=6: png_with(chunk(b"eXIf", exif(entries, turn))),
    "PNG, behind the pixels": lambda entries, turn=6: png_with(chunk(b"eXIf", exif(entries, turn)), last=True),
    "PNG, as text": lambda entries, turn=6: raw_profile(exif(entries, turn)),
    "WebP": lambda entries, turn=6: webp_with((b"EXIF", exif(entries, turn))),
    "TIFF": lambda entries, turn=6: tiff(entries, "<", turn),
    "TIFF, big-endian": lambda entries, turn=6: tiff(entries, ">", turn),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 65535])
def test_pictures_become_upright(tmp_path, holder, orientation):
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
            7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)  # fmt: skip
    expected = np.asarray(picture().transpose(Image.Transpose[turn]) if turn else picture()).astype(int)
    for entries in ([], [(282, 10, 1, struct.pack("<ii", -1, 0)), (283, 2, 2, b"a\0")]):  # with odd ones beside it
        data = stored(tmp_path, HOLDERS[holder](entries, orientation))
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < 5


TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 14: 4, 0: 4, 99: 4}


def odd_values(kind):
    """Values of a type that a reader may stumble over: count and bytes."""
    size, nan = TYPES[kind], {4: struct.pack("<f", np.nan), 8: struct.pack("<d", np.inf)}
    return [(1, b"\xff" * size), (1, bytes(size)), (0, b""), (7, b"\x80" * 7 * size), (0xFFFFFFFF, b"\x20\0\0\0"),
            (1000, b"\xff\xff\xff\x7f"), (1, nan.get(size, b"\1" * size))]  # fmt: skip


# Description, make, resolutions, unit, software, time, artist, copyright, pointers to EXIF, GPS and interoperability,
# MakerNote, XMP, IPTC, ICC profile, Photoshop, Windows' title, rating, a tag of no standard.
TAGS = [270, 271, 282, 283, 296, 305, 306, 315, 33432, 34665, 34853, 40965, 37500, 700, 33723, 34675, 34377, 40091,
        18246, 60000]  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_damaged_exif_does_not_prevent_decoding(tmp_path, holder):
    cases = [(tag, kind, *value) for kind in TYPES for value in odd_values(kind) for tag in TAGS]
    offset = list(HOLDERS).index(holder)
    for case in cases[offset :: 3 * len(HOLDERS) + 1]:  # a share of the 2,240, another for each holder
        assert is_upright(stored(tmp_path, HOLDERS[holder]([case]))), case


@pytest.mark.parametrize("block", [b"", b"\0", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"no TIFF at all", EXIF * 3])
def test_invalid_exif_is_ignored(tmp_path, block):
    for data in (
        jpeg_with((0xE1, EXIF + block)),
        png_with(chunk(b"eXIf", block)),
        png_with(chunk(b"eXIf", block, right=False)),
        raw_profile(block),
        png_with(chunk(b"tEXt", b"Raw profile type exif\0not hexadecimal")),
        webp_with((b"EXIF", block)),
    ):
        assert Image.open(io.BytesIO(stored(tmp_path, data))).size == (64, 48)


MULTI = struct.pack("<I", 2), b"\xff" * 32  # number of pictures in a file, and where they are


@pytest.mark.parametrize("kind", range(0xE0, 0xF0))
def test_jpeg_segments_do_not_prevent_decoding(tmp_path, kind):
    index = b"II*\0\x08\0\0\0"
    payloads = [b"", b"\0", b"JFIF", b"JFIF\0", b"JFXX\0", b"Adobe", b"MPF\0", b"MPF\0" + index + b"\xff\xff",
                b"MPF\0" + index + files.directory([(0xB002, 7, 32, MULTI[1])], 8),
                b"MPF\0" + index + files.directory([(0xB001, 2, 2, b"x\0"), (0xB002, 7, 32, MULTI[1])], 8),
                b"MPF\0" + index + files.directory([(0xB001, 4, 1, MULTI[0]), (0xB002, 7, 32, MULTI[1])], 8),
                b"ICC_PROFILE\0", b"ICC_PROFILE\0\0\0", b"ICC_PROFILE\0\1\5abc", b"ICC_PROFILE\0\1\1" + b"x" * 5000,
                b"Photoshop 3.0\0", b"Photoshop 3.0\x008BIM\3\xed", b"Photoshop 3.0\x008BIM\3\xed\0\0\xff\xff\xff\xff",
                b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="x"', b"FPXR\0", b"x" * 60_000]  # fmt: skip
    for payload in payloads:
        assert is_upright(stored(tmp_path, jpeg_with((0xE1, EXIF + exif()), (kind, payload)))), payload[:40]


PNG_CHUNKS = ["tEXt", "zTXt", "iTXt", "iCCP", "gAMA", "cHRM", "sRGB", "pHYs", "tIME", "bKGD", "hIST", "sBIT", "sPLT",
              "acTL", "fcTL", "fdAT", "cICP", "prVt"]  # fmt: skip


@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_png_chunks_do_not_prevent_decoding(tmp_path, name):
    bomb = zlib.compress(bytes(3_000_000))
    for load in (b"", b"\0", b"abc", b"key\0\5zz", b"key\0\0" + bomb, b"key\0\1\0\0\0" + bomb, b"\xff" * 40):
        for last, right in ((False, True), (True, True), (False, False), (True, False)):
            extra = chunk(name.encode(), load, right)
            data = png_with(chunk(b"eXIf", exif()), extra, last=last)
            assert is_upright(stored(tmp_path, data)), (load[:20], last, right)


def test_much_text_does_not_prevent_decoding(tmp_path):
    texts = [chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1_000_000)))] * 70  # more than Pillow takes in all
    assert is_upright(stored(tmp_path, png_with(chunk(b"eXIf", exif()), *texts)))


@pytest.mark.parametrize("name", [b"ICCP", b"XMP ", b"EXIF", b"junk"])
@pytest.mark.parametrize("load", [b"", b"x", b"x" * 100_001])
def test_webp_chunks_do_not_prevent_decoding(tmp_path, name, load):
    others = [] if name == b"EXIF" else [(b"EXIF", exif())]
    data = stored(tmp_path, webp_with(*others, (name, load)))
    assert is_upright(data) or name == b"EXIF"


def test_profiles_do_not_change_colours(tmp_path):
    plain = stored(tmp_path, files.saved("PNG"))
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"foreign" * 99):
        assert stored(tmp_path, files.saved("PNG", icc_profile=profile)) == plain


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "bare picture"])
def test_nothing_but_pixels_is_stored(tmp_path, kind):
    image = picture()
    mark = b"no pixel" * 7_000
    image.info.update(comment=mark, icc_profile=mark, exif=mark, xmp=mark, dpi=(300, 300))
    if kind == "bare picture":
        data = read_picture(image, 256, 95)
        assert image.info["comment"] == mark  # the caller's own
    else:
        options = {} if kind == "GIF" else {"exif": EXIF + exif([(270, 2, 8, b"no pixel")]), "icc_profile": mark[:5000]}
        original = files.saved(kind, image, comment=mark, **options)
        assert b"no pixel" in original
        data = stored(tmp_path, original)
    assert b"no pixel" not in data
    assert set(re.findall(rb"\xff[\xe1-\xef\xfe]", data[: data.index(b"\xff\xda")])) == set()
    assert len(data) < 4_000


def test_shards_with_odd_metadata_are_read():
    data = jpeg_with((0xE2, b"ICC_PROFILE\0"))
    assert np.array_equal(decode_picture(data, 16), decode_picture(files.saved("JPEG"), 16))


@pytest.mark.parametrize("holder", HOLDERS)
def test_removed_metadata_leaves_the_pixels(holder):
    data = HOLDERS[holder]([(270, 2, 9, b"no pixel\0")])
    bare, _ = without_metadata(data)
    if holder.startswith("TIFF"):
        assert Image.open(io.BytesIO(bare)).tag_v2.get(270) is None
    else:
        assert b"no pixel" not in bare
        assert np.array_equal(Image.open(io.BytesIO(bare)), Image.open(io.BytesIO(data)))


def test_damaged_files_stay_damaged():
    rng = np.random.default_rng(0)
    for holder in HOLDERS.values():
        data = holder([])
        for end in rng.integers(0, len(data), 40):
            without_metadata(data[:end])  # raises nothing
            broken = bytearray(data)
            broken[end] ^= 0xFF
            without_metadata(bytes(broken))
    assert without_metadata(b"GIF89a") is None
