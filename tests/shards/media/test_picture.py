import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.media.picture import decode_picture, open_picture, read_picture
from tests.shards.media.picture_files import chunk, saved
from tests.shards.media.picture_files import picture as gradient


def opened(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return image


def test_pictures_are_shrunk_to_the_short_side_and_small_ones_are_not_enlarged(tmp_path):
    gradient(1000, 500).save(tmp_path / "a.jpg")
    assert opened(read_picture(tmp_path / "a.jpg", 100, 90)).size == (200, 100)
    gradient(60, 90).save(tmp_path / "b.png")
    assert opened(read_picture(tmp_path / "b.png", 100, 90)).size == (60, 90)
    gradient(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    small = np.asarray(opened(read_picture(tmp_path / "a.jpg", 120, 95))).astype(float)
    assert np.abs(small - np.asarray(gradient(160, 120))).mean() < 3


def test_drawn_pictures_need_no_file():
    data = read_picture(Image.new("RGB", (64, 64), "blue"), 256, 90)
    assert opened(data).size == (64, 64)
    assert data == read_picture(Image.new("RGB", (64, 64), "blue"), 256, 90)


def test_quality(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sizes = [len(read_picture(Image.fromarray(noise), 256, quality)) for quality in (50, 90)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (20, 20), 128), (128, 128, 128)),
        (Image.new("RGBA", (20, 20), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (20, 20), (10, 255)), (10, 10, 10)),
        (Image.new("1", (20, 20), 1), (255, 255, 255)),
        (Image.new("RGB", (20, 20), (0, 0, 255)).quantize(4), (0, 0, 255)),
        (Image.fromarray(np.full((20, 20), 0x8000, np.uint16)), (128, 128, 128)),
    ],
    ids=["gray", "transparent", "gray and alpha", "black and white", "palette", "16 bit"],
)
def test_any_mode_becomes_rgb(tmp_path, image, expected):
    image.save(tmp_path / "a.png")
    result = opened(read_picture(tmp_path / "a.png", 256, 95))
    assert result.mode == "RGB"
    assert result.getpixel((10, 10)) == pytest.approx(expected, abs=3)


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert opened(read_picture(tmp_path / "a.jpg", 256, 95)).getpixel((10, 10)) == pytest.approx((255, 0, 0), abs=4)


def bomb(width, height):
    """A PNG that declares many pixels but has none."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100)))


def test_a_picture_that_no_shard_may_hold_is_refused(tmp_path):
    Image.new("1", (8_000, 6_251)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"a\.png: 8000 x 6251 pixels are more than the 50,000,000 allowed in a shard: lo"
    ):
        read_picture(tmp_path / "a.png", 7_000, 95)
    assert opened(read_picture(tmp_path / "a.png", 256, 95)).height == 256


def bad_files(folder):
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(bomb(19_800, 9_000))
    (folder / "big bomb.png").write_bytes(bomb(60_000, 60_000))
    gradient(200, 200).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    Image.new("L", (66_000, 1)).save(folder / "wide.png")
    (folder / "folder.jpg").mkdir()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jpg", "no such file"),
        ("empty.jpg", r"empty file \(0 bytes\)"),
        ("text.jpg", "not a picture"),
        ("bomb.png", "19800 x 9000 pixels, the limit is 178,000,000"),
        ("big bomb.png", "more pixels than the limit"),
        ("cut.jpg", "cannot be decoded as a picture .*truncated"),
        ("wide.png", "wide.png: 66000 x 1 pixels are too long for a JPEG"),
        ("folder.jpg", "cannot be decoded as a picture"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, reason):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        read_picture(tmp_path / name, 256, 90)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (200, 300), (40, 400)])
def test_decoded_square_is_the_center(size):
    square = decode_picture(read_picture(gradient(*size), 500, 95), 64)
    assert square.shape == (3, 64, 64)
    assert square.dtype == np.uint8
    assert square.flags["C_CONTIGUOUS"]
    red, green, blue = square.astype(float)
    assert red.mean() == pytest.approx(127, abs=4)
    assert green.mean() == pytest.approx(127, abs=4)
    assert blue.mean() == pytest.approx(60, abs=4)
    share = min(size) / size[0]  # of the width that is seen
    assert red[:, -1].mean() - red[:, 0].mean() == pytest.approx(255 * share, abs=8)


def textured(width, height):
    """Random, with more energy in low frequencies, as in photographs."""
    rng = np.random.default_rng(width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width))) / np.maximum(frequency, 1 / max(width, height))
    values = np.fft.ifft2(spectrum).real
    values = (values - values.min()) / np.ptp(values) * 255
    return Image.fromarray(values.transpose(1, 2, 0).astype(np.uint8))


def psnr(one, other):
    """Peak signal-to-noise ratio of two arrays of bytes, in dB."""
    error = ((one.astype(float) - other) ** 2).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


def processed(name, data, **size):
    """Pixels of an image processor of transformers with Pillow: [3, S, S]."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    processor = kind(do_normalize=False, do_rescale=False, **size)
    return np.asarray(processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0])


SHARDED = [(256, 256), (341, 256), (256, 341), (385, 257), (200, 150), (447, 300), (60, 400)]
SHRUNK_BY_LIBJPEG = [(640, 480), (500, 500), (501, 501), (900, 601)]  # to half size, which costs some dB


@pytest.mark.parametrize("size", SHARDED + SHRUNK_BY_LIBJPEG)
def test_crop_gives_the_pixels_of_clips_own_processor(size):
    data = saved("JPEG", textured(*size), quality=90)
    expected = processed("CLIP", data, size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    assert psnr(decode_picture(data, 224), expected) > (50 if size in SHARDED else 36)


@pytest.mark.parametrize("size", SHARDED + SHRUNK_BY_LIBJPEG)
def test_squash_gives_the_pixels_of_blips_own_processor(size):
    data = saved("JPEG", textured(*size), quality=90)
    expected = processed("Blip", data, size={"height": 224, "width": 224})
    assert psnr(decode_picture(data, 224, resize="squash"), expected) > (90 if size in SHARDED else 36)


def test_squash_shows_the_complete_picture():
    square = decode_picture(saved("JPEG", gradient(300, 100), quality=90), 64, resize="squash").astype(float)
    assert square[0][:, -1].mean() - square[0][:, 0].mean() > 245
    assert square[1][-1].mean() - square[1][0].mean() > 245


def test_decoding_at_half_size_agrees_with_decoding_at_full_size():
    data = read_picture(gradient(512, 512), 512, 95)
    complete = Image.open(io.BytesIO(data)).resize((100, 100), Image.Resampling.BICUBIC)
    difference = np.abs(decode_picture(data, 100).transpose(1, 2, 0).astype(int) - np.asarray(complete))
    assert difference.mean() < 2


@pytest.mark.parametrize("data", [b"", b"junk", read_picture(Image.new("RGB", (50, 50)), 50, 90)[:300]])
def test_damaged_member(data):
    with pytest.raises(UserError):
        decode_picture(data, 32)


def test_large_member_is_refused():
    with pytest.raises(UserError, match="the limit is"):
        decode_picture(bomb(19_800, 9_000), 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in JPEG, PNG or WebP"),
        (b"", "not a picture in JPEG, PNG or WebP"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(4), "cannot be decoded as a picture|not a picture"),
    ],
)
def test_open_picture_refuses_what_shards_do_not_hold(data, message):
    with pytest.raises(UserError, match=message):
        open_picture(data)


def test_open_picture_checks_the_size_in_the_header():
    content = saved("PNG", Image.new("RGB", (30, 20)))
    assert open_picture(content, max_pixels=600).size == (30, 20)
    with pytest.raises(UserError, match="30 x 20 pixels, the limit is 599"):
        open_picture(content, max_pixels=599)
