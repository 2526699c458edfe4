import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.media import pixel_depth
from shards.media.picture import decode_picture, read_picture
from tests.shards.media.picture_files import png, tiff

LEVELS = [52, 87, 130, 240]
GRAY = np.kron(np.array(LEVELS).reshape(2, 2), np.ones((16, 16), int))
COLOUR = np.stack([GRAY] * 3, axis=2)
WHITE = [52, 255, 130, 240]  # where the second level is transparent
OPACITY = np.where(GRAY == 87, 0, 65535)[..., None]
SEEN = np.where(GRAY == 87, 0, GRAY)
BRIGHTEST = [55, 92, 138, 255]  # where the brightest is taken for white
STRETCHED = [0, 47, 106, 255]


def levels(data):
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    return [pixels[8, 8], pixels[8, 24], pixels[24, 8], pixels[24, 24]]


def stored(tmp_path: Path, data: bytes) -> list[int]:
    (tmp_path / "a.tif").write_bytes(data)
    return levels(read_picture(tmp_path / "a.tif", 256, 100))


TIFFS = {  # values, sample format, photometric, extra samples, expected
    "16 bits": (np.uint16(GRAY * 257), 1, 1, None, LEVELS),
    "8 bits in 16": (np.uint16(GRAY), 1, 1, None, LEVELS),
    "12 bits in 16": (np.uint16(GRAY * 16), 1, 1, None, LEVELS),
    "signed 16 bits": (np.int16(GRAY * 128), 2, 1, None, LEVELS),
    "signed 16 bits below 0": (np.int16(GRAY * 257 - 32768), 2, 1, None, STRETCHED),
    "int32 of 8 bits": (np.int32(GRAY), 2, 1, None, LEVELS),
    "int32 of 16 bits": (np.int32(GRAY * 257), 2, 1, None, LEVELS),
    "int32": (np.int32(GRAY * 8421504), 2, 1, None, LEVELS),
    "float of 1": (np.float32(GRAY / 255), 3, 1, None, LEVELS),
    "float of 255": (np.float32(GRAY), 3, 1, None, LEVELS),
    "float of 65535": (np.float32(GRAY * 257), 3, 1, None, LEVELS),
    "float a little beyond 0 to 1": (np.float32((GRAY - 55) / 184), 3, 1, None, [0, 44, 104, 255]),
    "float of much light": (np.float32(GRAY / 50), 3, 1, None, BRIGHTEST),
    "float of 1e30": (np.float32(GRAY * 1e30), 3, 1, None, BRIGHTEST),
    "float of 1e-9": (np.float32(GRAY * 1e-9), 3, 1, None, BRIGHTEST),
    "float of -1 to 1": (np.float32(GRAY / 127.5 - 1), 3, 1, None, STRETCHED),
    "colours of 16 bits": (np.uint16(COLOUR * 257), 1, 2, None, LEVELS),
    "colours of 12 bits in 16": (np.uint16(COLOUR * 16), 1, 2, None, LEVELS),
    "colours of 8 bits in 16": (np.uint16(COLOUR), 1, 2, None, LEVELS),
    "alpha of 16 bits": (np.uint16(np.dstack([COLOUR * 257, OPACITY])), 1, 2, 2, WHITE),
    "alpha of 16 bits, colours of 12": (np.uint16(np.dstack([COLOUR * 16, OPACITY])), 1, 2, 2, WHITE),
    "alpha multiplied in": (np.uint16(np.dstack([COLOUR * 257 * (OPACITY > 0), OPACITY])), 1, 2, 1, WHITE),
    "alpha of 8 bits multiplied in": (np.uint8(np.dstack([SEEN, SEEN, SEEN, OPACITY // 257])), 1, 2, 1, WHITE),
    "gray with alpha": (np.uint8(np.dstack([GRAY, OPACITY // 257])), 1, 1, 2, WHITE),
    "gray with alpha multiplied in": (np.uint8(np.dstack([SEEN, OPACITY // 257])), 1, 1, 1, WHITE),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("values", "kind", "photometric", "extra", "expected"), TIFFS.values(), ids=TIFFS)
def test_tiff(tmp_path, values, kind, photometric, extra, expected, order, compressed):
    data = tiff(values, kind, photometric, order, compressed, extra)
    assert stored(tmp_path, data) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("compressed", [False, True])
def test_tiff_that_pillow_reads_in_one_byte_order_only(tmp_path, compressed):
    unsigned = (GRAY.astype(np.uint64) * 16843009).astype(np.uint32)  # beyond 2^31 where Pillow's mode is signed
    assert stored(tmp_path, tiff(unsigned, 1, compressed=compressed)) == pytest.approx(LEVELS, abs=2)
    inverted = np.uint16(65535 - GRAY * 257)
    assert stored(tmp_path, tiff(inverted, 1, 0, compressed=compressed)) == pytest.approx(LEVELS, abs=2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_pixels_that_are_not_finite_are_refused(tmp_path, order, compressed):
    for bad in (np.nan, np.inf):
        data = tiff(np.float32(np.where(GRAY == 52, bad, GRAY)), 3, 1, order, compressed)
        with pytest.raises(UserError, match=r"a\.tif: has pixels that are not finite numbers: save it with 8 or 16"):
            stored(tmp_path, data)


@pytest.mark.parametrize("values", [np.float64(GRAY), np.float16(GRAY), np.float32(COLOUR)])
def test_tiff_that_pillow_does_not_read_is_refused(tmp_path, values):
    with pytest.raises(UserError, match="a TIFF picture that is damaged or of a variant that Pillow does not read: c"):
        stored(tmp_path, tiff(values, 3, 2 if values.ndim == 3 else 1))


PNGS = {  # values, bits, colour type, transparent level, expected
    "gray": (GRAY * 257, 16, 0, None, LEVELS),
    "gray, transparent": (GRAY * 257, 16, 0, [87 * 257], WHITE),
    "gray of 12 bits, transparent": (GRAY * 16, 16, 0, [87 * 16], WHITE),
    "gray of 12 bits, white is transparent": (np.where(GRAY == 87, 65535, GRAY * 16), 16, 0, [65535], WHITE),
    "gray of 8 bits, transparent": (GRAY, 8, 0, [87], WHITE),
    "gray of 4 bits, transparent": (GRAY // 16, 4, 0, [5], [51, 255, 136, 255]),
    "gray of 2 bits, transparent": (GRAY // 64, 2, 0, [1], [0, 255, 170, 255]),
    "black and white, black is transparent": (GRAY // 128, 1, 0, [0], [255] * 4),
    "black and white, white is transparent": (GRAY // 128, 1, 0, [1], [0, 0, 255, 255]),
    "colours": (COLOUR * 257, 16, 2, None, LEVELS),
    "colours of 12 bits": (COLOUR * 16, 16, 2, None, LEVELS),
    "colours, transparent": (COLOUR * 257, 16, 2, [87 * 257] * 3, WHITE),
    "colours, upper bytes as the transparent one's": (
        np.where(COLOUR == 87, 130 * 257 + 1, COLOUR * 257), 16, 2, [130 * 257 + 1] * 3, WHITE),
    "colours of 8 bits, transparent": (COLOUR, 8, 2, [87] * 3, WHITE),
    "alpha": (np.dstack([COLOUR * 257, OPACITY]), 16, 6, None, WHITE),
    "alpha, colours of 12 bits": (np.dstack([COLOUR * 16, OPACITY]), 16, 6, None, WHITE),
    "gray with alpha": (np.dstack([GRAY * 257, OPACITY]), 16, 4, None, WHITE),
}  # fmt: skip


@pytest.mark.parametrize(("values", "bits", "colour", "transparent", "expected"), PNGS.values(), ids=PNGS)
def test_png(tmp_path, values, bits, colour, transparent, expected):
    data = png(values, bits, colour, transparent)
    assert stored(tmp_path, data) == pytest.approx(expected, abs=2)
    red = decode_picture(data, 32)[0].astype(int)  # a shard that holds it shows the same
    assert [red[8, 8], red[8, 24], red[24, 8], red[24, 24]] == pytest.approx(expected, abs=2)


def test_colors_that_cannot_be_scaled_are_refused(tmp_path):
    data = png(np.dstack([GRAY * 16, OPACITY]), 16, 4)
    with pytest.raises(UserError, match=r"a\.tif: its 16-bit values are almost all black in 8 bits: save it with 8"):
        stored(tmp_path, data)


PNMS = {
    "PGM": b"P5 32 32 65535\n" + (GRAY * 257).astype(">u2").tobytes(),
    "PGM of 12 bits": b"P5 32 32 4095\n" + (GRAY * 16).astype(">u2").tobytes(),
    "PPM": b"P6 32 32 65535\n" + (COLOUR * 257).astype(">u2").tobytes(),
    "PPM of 12 bits": b"P6 32 32 4095\n" + (COLOUR * 16).astype(">u2").tobytes(),
    "PFM": b"Pf\n32 32\n-1.0\n" + (GRAY[::-1] / 255).astype("<f4").tobytes(),
    "PFM, big-endian": b"Pf\n32 32\n1.0\n" + (GRAY[::-1] / 255).astype(">f4").tobytes(),
}


@pytest.mark.parametrize("data", PNMS.values(), ids=PNMS)
def test_pnm(tmp_path, data):
    assert stored(tmp_path, data) == pytest.approx(LEVELS, abs=2)


def test_colour_pfm_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="a color PFM picture, which Pillow does not read: convert it to PNG"):
        stored(tmp_path, b"PF\n32 32\n-1.0\n" + (COLOUR / 255).astype("<f4").tobytes())


@pytest.mark.parametrize(
    "values",
    [GRAY.astype(np.uint8), GRAY.astype(np.int32), (GRAY * 257).astype("<u2"), (GRAY * 257).astype(">u2"),
     (GRAY / 255).astype(np.float32)],
    ids=["L", "I", "I;16", "I;16B", "F"],
)  # fmt: skip
def test_pictures_in_memory(values):
    assert levels(read_picture(Image.fromarray(values), 256, 100)) == pytest.approx(LEVELS, abs=2)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_alpha_multiplied_in_is_shown_on_white(mode):
    image = Image.fromarray(np.uint8(np.dstack([COLOUR, OPACITY // 257]))).convert("LA" if mode == "La" else "RGBA")
    assert levels(read_picture(image.convert(mode), 256, 100)) == pytest.approx(WHITE, abs=2)


@pytest.mark.parametrize("level", [0, 1, 255, 256, 4095, 65535])
def test_pictures_of_one_level_are_not_stretched(level):
    data = read_picture(Image.fromarray(np.full((8, 8), level, np.uint16)), 256, 100)
    (result,) = np.unique(Image.open(io.BytesIO(data)))
    full = next(full for full in (255, 4095, 65535) if level <= full)
    assert result == pytest.approx(255 * level / full, abs=1)


def test_scaling_takes_strips(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_depth, "_STRIP", 5 * 32)
    for data in (png(COLOUR * 16, 16, 2), tiff(np.float32(GRAY / 255), 3)):
        assert stored(tmp_path, data) == pytest.approx(LEVELS, abs=2)


def test_eight_bit_pictures_are_not_copied():
    image = Image.new("RGB", (4, 4))
    assert pixel_depth.to_rgb(image) is image
