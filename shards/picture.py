"""Pictures in and out: any file that Pillow decodes becomes an RGB JPEG in the shards, and a square of bytes later."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from shards.errors import UserError

Resize = Literal["crop", "squash"]  # how a picture becomes a square

MAX_PIXELS = 178_000_000  # refused from the header, before any memory is taken
MAX_STORED_PIXELS = 50_000_000  # of a picture in a shard: bounds what a worker's memory may grow by
_MAX_SIDE = 65_500  # of a JPEG
_IN_SHARDS = ("JPEG", "PNG", "WEBP")  # Pillow's other decoders are not for data of unknown origin

# Pillow warns of large pictures, which the limit above decides, and of broken EXIF, which is only passed over.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(source: Path | Image.Image, short_side: int, quality: int) -> bytes:
    """JPEG bytes of a picture: upright by its EXIF orientation, RGB, its short side shrunk to `short_side` pixels.

    Smaller pictures keep their size.

    Raises:
        UserError: no such file, empty, not decodable, too many pixels, or too many left for a shard.
    """
    with _opened(source) as image:
        # libjpeg scales by 1/2, 1/4 or 1/8 while decoding; twice the wanted size leaves the rest to a good filter.
        _draft(image, 2 * short_side)
        return _encode(image, short_side, quality, _name(source))


def _encode(image: Image.Image, short_side: int, quality: int, name: str) -> bytes:
    upright = _to_rgb(ImageOps.exif_transpose(image))
    scale = short_side / min(upright.size)
    if scale < 1:
        width, height = (max(short_side, round(side * scale)) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    size = f"{name}: {upright.width} x {upright.height} pixels"
    if max(upright.size) > _MAX_SIDE:
        raise UserError(f"{size} are too long for a JPEG: cut it")
    if upright.width * upright.height > MAX_STORED_PIXELS:
        raise UserError(f"{size} are more than the {MAX_STORED_PIXELS:,} that a shard holds: lower --short-side")
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip rather than scale
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # what lies under it is arbitrary: show white
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def decode_picture(data: bytes, size: int, max_pixels: int = MAX_PIXELS, resize: Resize = "crop") -> np.ndarray:
    """Decode a picture of a shard and bring it to a square.

    Args:
        data: An encoded picture.
        size: Side of the square in pixels.
        max_pixels: Largest number of pixels that the picture may have.
        resize: "crop" resizes the short side to `size` and cuts out the centre, as CLIP's image processor does with
            Pillow; "squash" resizes both sides to `size`, without regard to the aspect, as BLIP-2's does. Both are
            bicubic.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        UserError: not decodable, not a format that shards hold, or more than `max_pixels` pixels.
    """
    with _opened(data, max_pixels, _IN_SHARDS) as image:
        whole = image.size
        width, height = _draft(image, size)
        left, top, right, bottom = _central(*whole, size) if resize == "crop" else (0.0, 0.0, 1.0, 1.0)
        box = (left * width, top * height, right * width, bottom * height)
        square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _central(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The part of a picture that is left of it when its short side is resized to `size` and its centre cut out.

    Only that part is resized. Pillow's filter also sees what is next to it, so the pixels are those of a crop after
    the resize.

    Returns:
        Left, top, right and bottom, as shares of width and height.
    """
    short = min(width, height)
    wide, high = size * width // short, size * height // short  # of the resized picture, rounded down as CLIP's is
    left, top = (wide - size) // 2, (high - size) // 2  # whole pixels of it
    return left / wide, top / high, (left + size) / wide, (top + size) / high


def _draft(image: Image.Image, short_side: int) -> tuple[float, float]:
    """Let libjpeg shrink a picture while decoding it, to no less than a short side.

    Returns:
        Width and height of what it shows, in pixels of the decoded picture: its last row and column may be partly
        padding.
    """
    scale = short_side / min(image.size)
    if scale < 1 and (drafted := image.draft(None, (round(image.width * scale), round(image.height * scale)))):
        return drafted[1][2:]
    return image.size


@contextmanager
def _opened(
    source: Path | bytes | Image.Image, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open a picture, refuse a bomb by its header, and turn whatever goes wrong inside the block into a `UserError`."""
    name = _name(source)
    try:
        if isinstance(source, Path) and source.stat().st_size == 0:
            raise UserError(f"{name}: empty file (0 bytes)")
        with _open(source, formats) as image:
            if image.width * image.height > max_pixels:
                raise UserError(f"{name}: {image.width} x {image.height} pixels, the limit is {max_pixels:,}")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        kinds = f"not {' or '.join(formats)}" if formats else "not a picture in any format that Pillow reads"
        raise UserError(f"{name}: {kinds}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly any type
        raise UserError(f"{name}: cannot be decoded as a picture ({error})") from None


def _name(source: Path | bytes | Image.Image) -> str:
    return str(source) if isinstance(source, Path) else "picture"


def _open(source: Path | bytes | Image.Image, formats: tuple[str, ...] | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
