"""Pictures in and out: any file that Pillow decodes becomes an RGB JPEG in the shards, and a square of bytes later."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.media.media_type import describe_content, read_head
from shards.media.picture_metadata import upright, without_metadata
from shards.media.pixel_depth import to_rgb

Resize = Literal["crop", "squash"]  # how a picture becomes a square
# From width and height of a picture to left, top, right and bottom of a region, as shares of width and height.
Region = Callable[[int, int], tuple[float, float, float, float]]

MAX_PIXELS = 178_000_000  # refused from the header, before any memory is taken
MAX_STORED_PIXELS = 50_000_000  # of a picture in a shard: bounds what a worker's memory may grow by
_MAX_SIDE = 65_500  # of a JPEG
_MAX_FILE = 1 << 30  # bytes of a file that is read whole to take its metadata out
_IN_SHARDS = ("JPEG", "PNG", "WEBP")  # Pillow's other decoders are not for data of unknown origin

_Result = TypeVar("_Result")

# Pillow warns of large pictures, which the limit above decides, and of broken EXIF, which is only passed over.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _DecodingError(UserError):
    """The picture cannot be decoded as it is."""


@dataclass(frozen=True)
class _Source:
    """What a picture is read from.

    Attributes:
        content: A file, the bytes of one, or a picture of Pillow.
        max_pixels: Largest number of pixels allowed.
        formats: Pillow's decoders to be tried; None for all.
        exif: The EXIF block that has been taken out of the content.
    """

    content: Path | bytes | Image.Image
    max_pixels: int = MAX_PIXELS
    formats: tuple[str, ...] | None = None
    exif: bytes | None = None

    def open(self) -> Image.Image:
        """Open the picture; its pixels are not decoded yet."""
        if isinstance(self.content, Image.Image):
            return self.content
        content = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        return Image.open(content, formats=self.formats)

    def reopener(self) -> Callable[[], Image.Image] | None:
        """What opens the picture once more, where that is possible."""
        return None if isinstance(self.content, Image.Image) else self.open

    def bare(self) -> "_Source | None":
        """The same without metadata; None where there is nothing to take out."""
        content = self.content
        if isinstance(content, Path):
            content = content.read_bytes() if content.is_file() and content.stat().st_size <= _MAX_FILE else b""
        parts = without_metadata(content) if isinstance(content, bytes) else None
        return replace(self, content=parts[0], exif=parts[1]) if parts else None


def read_picture(source: Path | Image.Image, short_side: int, quality: int) -> bytes:
    """JPEG bytes of a picture: upright by its EXIF orientation, RGB, its short side shrunk to `short_side` pixels.

    Smaller pictures keep their size. Deep pictures are scaled and transparent ones shown on white (see
    `shards/media/pixel_depth.py`). Only pixels are stored: no EXIF, no comment, no colour profile.

    Raises:
        UserError: no such file, empty, not decodable, too many pixels, or too many left for a shard.
    """

    def encode(image: Image.Image, source: _Source) -> bytes:
        # libjpeg scales by 1/2, 1/4 or 1/8 while decoding; twice the wanted size leaves the rest to a good filter.
        _draft(image, 2 * short_side)
        return _encode(upright(to_rgb(image, source.reopener()), source.exif), short_side, quality)

    return _read(_Source(source), encode)


def _encode(image: Image.Image, short_side: int, quality: int) -> bytes:
    scale = short_side / min(image.size)
    if scale < 1:
        width, height = (max(short_side, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    size = f"{image.width} x {image.height} pixels"
    if max(image.size) > _MAX_SIDE:
        raise UserError(f"{size} are too long for a JPEG: cut it")
    if image.width * image.height > MAX_STORED_PIXELS:
        raise UserError(f"{size} are more than the {MAX_STORED_PIXELS:,} that a shard holds: lower --short-side")
    buffer = io.BytesIO()
    image = image.copy()
    image.info.clear()  # of which Pillow would write comments, and some releases XMP
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode_picture(
    data: bytes, size: int, max_pixels: int = MAX_PIXELS, resize: Resize = "crop", region: Region | None = None
) -> np.ndarray:
    """Decode a picture of a shard and bring it to a square.

    Args:
        data: An encoded picture.
        size: Side of the square in pixels.
        max_pixels: Largest number of pixels that the picture may have.
        resize: "crop" resizes the short side to `size` and cuts out the centre, as CLIP's image processor does with
            Pillow; "squash" resizes both sides to `size`, without regard to the aspect, as BLIP-2's does. Both are
            bicubic.
        region: Chooses the region that is resized, in place of `resize`.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        UserError: not decodable, not a format that shards hold, or more than `max_pixels` pixels.
    """

    def decode(image: Image.Image, source: _Source) -> np.ndarray:
        whole, short_side = image.size, size
        if region:
            left, top, right, bottom = region(*whole)
            sides = whole[0] * (right - left), whole[1] * (bottom - top)
            short_side = math.ceil(size * min(whole) / max(1.0, min(sides)))  # of a picture with `size` in the region
        else:
            left, top, right, bottom = _central(*whole, size) if resize == "crop" else (0.0, 0.0, 1.0, 1.0)
        width, height = _draft(image, short_side)
        box = (left * width, top * height, right * width, bottom * height)
        square = to_rgb(image, source.reopener()).resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    return _read(_Source(data, max_pixels, _IN_SHARDS), decode)


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


def _read(source: _Source, use: Callable[[Image.Image, _Source], _Result]) -> _Result:
    """Open a picture and use it; if that fails, once more without its metadata, which may be all that is broken."""
    try:
        try:
            with _opened(source) as image:
                return use(image, source)
        except _DecodingError:
            bare = source.bare()
            if bare is not None:
                with suppress(_DecodingError), _opened(bare) as image:
                    return use(image, bare)
            raise
    except UserError as error:
        name = str(source.content) if isinstance(source.content, Path) else "picture"
        raise UserError(f"{name}: {error}") from None


@contextmanager
def _opened(source: _Source) -> Iterator[Image.Image]:
    """Open a picture, refuse a bomb by its header, and turn whatever goes wrong inside the block into a `UserError`."""
    content = source.content
    try:
        if isinstance(content, Path) and content.stat().st_size == 0:
            raise UserError("empty file (0 bytes)")
        with source.open() as image:
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise UserError(describe_content(b"%!PS") or "")
            if image.width * image.height > source.max_pixels:
                raise UserError(f"{image.width} x {image.height} pixels, the limit is {source.max_pixels:,}")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("no such file") from None
    except IsADirectoryError:
        raise UserError("cannot be decoded as a picture (it is a folder)") from None
    except Image.UnidentifiedImageError:
        raise _DecodingError(_unidentified(source)) from None
    except Image.DecompressionBombError:
        raise UserError(f"more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly any type
        raise _DecodingError(f"cannot be decoded as a picture ({error})") from None


def _unidentified(source: _Source) -> str:
    """What to say of a file that none of Pillow's decoders takes."""
    if source.formats:
        return f"not {' or '.join(source.formats)}"
    head = b"" if isinstance(source.content, Image.Image) else read_head(source.content)
    if clause := describe_content(head, "picture"):
        return clause
    if name := describe_content(head):
        return f"{name} that is damaged or of a kind that Pillow does not read: convert it to JPEG or PNG"
    return "not a picture in any format that Pillow reads"
