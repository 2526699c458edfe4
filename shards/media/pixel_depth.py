"""Conversion of pictures of any bit depth and transparency to 8-bit RGB on white."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import UserError

_STRIP = 1 << 20  # pixels scaled at a time: bounds the memory that floats take
_DARK = 16  # a picture with values below full scale / 16 only would be stored almost black
_FULL_SCALES = (255.0, 4095.0, 65535.0)  # of 8, 12 and 16 bits

_SWAPPED = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}
_NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;32B": "I;32N", "I;16BS": "I;16NS"}
_GRAY_LEVELS = {"1": 1, "L;2": 3, "L;4": 15}  # Pillow scales pixels to 0 to 255, but not the transparent level

Rows = Callable[[int, int], np.ndarray]  # values [rows, width] or [rows, width, 3] of a range of rows


def to_rgb(image: Image.Image, reopen: Callable[[], Image.Image] | None = None) -> Image.Image:
    """Convert a picture to 8-bit RGB; transparent pixels become white.

    Values of more than 8 bits (16- and 32-bit integers, floats) are scaled by their range, since most formats do not
    define black and white: 0 is black, and white is the smallest of 1 (floats only), 255, 4095, 65,535 and the type's
    largest value that no pixel exceeds. If that would leave all pixels below 1/16 of white, the brightest pixel becomes
    white. If there are values well below 0, the smallest becomes black and the largest white; slightly negative values,
    which resampling causes, become black.

    Args:
        image: A picture in any mode of Pillow.
        reopen: Reopens the picture to read the lower bytes of 16-bit colors, of which Pillow keeps only the upper.

    Raises:
        UserError: Values are not finite, or 16-bit colors would be almost black and cannot be scaled.
    """
    _use_native_order(image)
    raw = _raw_mode(image)
    image.load()  # may update the transparency
    transparent = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_values(*_gray_rows(image), image.size, transparent, white_is_zero=_tag(image, 262) == 0)
    if raw.startswith(("RGB", "LA")) and ";16" in raw and (transparent is not None or _is_dark(image)):
        rows, fulls = _color_rows(image, raw, reopen)
        return _from_values(rows, fulls, image.size, transparent, alpha=_alpha(image))
    if raw in _GRAY_LEVELS and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // _GRAY_LEVELS[raw]
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or "transparency" in image.info:  # hidden colors are arbitrary: use white
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _from_values(
    rows: Rows,
    fulls: tuple[float, ...],
    size: tuple[int, int],
    transparent: Any = None,
    *,
    white_is_zero: bool = False,
    alpha: Image.Image | None = None,
) -> Image.Image:
    """Scale values to bytes (see `to_rgb`); a transparent level or color becomes white."""
    low, high = _range(rows, size, transparent)
    black, white = _limits(low, high, fulls)
    parts = []
    for top, bottom in _strips(size):
        values = rows(top, bottom)
        shares = (values.astype(np.float64) - black) / ((white - black) or 1.0)
        scaled = np.clip(np.rint(255 * (1 - shares if white_is_zero else shares)), 0, 255).astype(np.uint8)
        scaled[_is_transparent(values, transparent)] = 255
        parts.append(scaled)
    image = Image.fromarray(np.concatenate(parts)).convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return _on_white(image)


def _limits(low: float, high: float, fulls: tuple[float, ...]) -> tuple[float, float]:
    """Return the values that become black and white."""
    if low < 0 and -low > high / _DARK:
        return low, high
    full = next((full for full in fulls if high <= full), high)
    return 0.0, high if low < high < full / _DARK else full


def _range(rows: Rows, size: tuple[int, int], transparent: Any) -> tuple[float, float]:
    """Return smallest and largest value of the opaque pixels; zeros if there are none."""
    extremes = []
    for top, bottom in _strips(size):
        values = rows(top, bottom)
        if not np.isfinite(values).all():
            raise UserError("has pixels that are not finite numbers: save it with 8 or 16 bits a channel")
        if transparent is not None:
            values = values[~_is_transparent(values, transparent)]
        if values.size:
            extremes += [float(values.min()), float(values.max())]
    return min(extremes, default=0.0), max(extremes, default=0.0)


def _is_transparent(values: np.ndarray, transparent: Any) -> np.ndarray:
    """Return a mask [rows, width] of pixels with the transparent level (an int) or color (three ints)."""
    if values.ndim == 3 and isinstance(transparent, tuple):
        return (values == np.asarray(transparent)).all(axis=2)
    if values.ndim == 2 and isinstance(transparent, int):
        return values == transparent
    return np.zeros(values.shape[:2], bool)


def _gray_rows(image: Image.Image) -> tuple[Rows, tuple[float, ...]]:
    """Return the values of a picture in mode F, I or I;16, and the candidates for white."""
    bits, kind = _tag(image, 258), _tag(image, 339)  # TIFF's BitsPerSample and SampleFormat

    def rows(top: int, bottom: int) -> np.ndarray:
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        # Pillow has no unsigned 32-bit mode: values of 2^31 and more become negative.
        return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values

    unsigned = image.mode == "I" and bits == 32 and kind in (None, 1)
    if image.mode == "F":
        return rows, (1.0, *_FULL_SCALES)
    largest = 2.0 ** (bits if isinstance(bits, int) else 16 if image.mode != "I" else 31) - 1
    if isinstance(bits, int) and kind == 2:
        largest = 2.0 ** (bits - 1) - 1
    elif image.mode == "I" and bits == 32 and not unsigned:
        largest = 2.0**31 - 1
    return rows, (*(full for full in _FULL_SCALES if full < largest), largest)


def _color_rows(
    image: Image.Image, raw: str, reopen: Callable[[], Image.Image] | None
) -> tuple[Rows, tuple[float, ...]]:
    """Return 16-bit colors; the lower bytes are read by reopening the picture in the wrong byte order."""
    if reopen is None or not raw.startswith(("RGB;", "RGBA;", "RGBX;")):
        raise UserError("its 16-bit values are almost all black in 8 bits: save it with 8 bits a channel")
    low: Any = reopen()
    low.tile = [_with_raw_mode(tile, raw[:-3] + _SWAPPED[raw[-3:]]) for tile in low.tile]
    low.load()

    def rows(top: int, bottom: int) -> np.ndarray:
        upper, lower = (
            np.asarray(part.crop((0, top, part.width, bottom)))[..., :3].astype(np.uint16) for part in (image, low)
        )
        return upper << 8 | lower

    return rows, _FULL_SCALES


def _use_native_order(image: Any) -> None:
    """Fix compressed big-endian 32-bit TIFF files, whose bytes Pillow swaps although libtiff has done so."""
    tiles = getattr(image, "tile", None)
    if tiles and tiles[0][0] == "libtiff" and (native := _NATIVE.get(_raw_mode(image))):
        image.tile = [_with_raw_mode(tile, native) for tile in tiles]


def _with_raw_mode(tile: Any, raw: str) -> Any:
    """Return one of Pillow's tiles with another raw mode in the decoder's arguments."""
    arguments = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.getchannel("A") if "A" in image.getbands() else None


def _is_dark(image: Image.Image) -> bool:
    """Whether all colors are in the darkest sixteenth of the range."""
    extrema: Any = image.getextrema()
    return max(high for _, high in extrema[:3]) < 256 // _DARK


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield first row and last row + 1 of strips of bounded size."""
    width, height = size
    step = max(1, _STRIP // width)
    return ((top, min(top + step, height)) for top in range(0, height, step))


def _raw_mode(image: Image.Image) -> str:
    """Return the file's pixel packing in Pillow's notation; empty without a file or once loaded."""
    tiles = getattr(image, "tile", None) or [(None, None, None, "")]
    arguments = tiles[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _tag(image: Image.Image, number: int) -> Any:
    """Return the first value of a TIFF tag; None in other formats."""
    try:
        value = image.tag_v2.get(number)  # type: ignore[attr-defined]
        return value[0] if isinstance(value, tuple) else value
    except (AttributeError, IndexError):
        return None
