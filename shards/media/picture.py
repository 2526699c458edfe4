"""Picture encoding and decoding: files that Pillow reads become RGB JPEGs in shards, and square arrays on loading."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.errors import UserError
from shards.media.media_type import describe_content, read_head
from shards.media.picture_metadata import upright, without_metadata
from shards.media.pixel_depth import to_rgb

Resize = Literal["crop", "squash"]  # how a picture is made square
# From width and height of a picture to left, top, right and bottom of a region, as shares of width and height.
Region = Callable[[int, int], tuple[float, float, float, float]]

MAX_PIXELS = 178_000_000  # checked in the header, before memory is allocated
MAX_STORED_PIXELS = 50_000_000  # of a picture in a shard; bounds the memory of workers
_MAX_SIDE = 65_500  # limit of JPEG
_MAX_FILE = 1 << 30  # largest file in bytes that is read to remove its metadata
_IN_SHARDS = ("JPEG", "PNG", "WEBP")  # Pillow's other decoders are not hardened against untrusted data

_Result = TypeVar("_Result")

# Pillow warns about large pictures, which the limit above covers, and about broken EXIF, which is ignored.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _DecodingError(UserError):
    """The picture cannot be decoded as stored."""


@dataclass(frozen=True)
class _Source:
    """Source of a picture."""

    content: Path | bytes | Image.Image  # a file, the bytes of one, or a Pillow image
    max_pixels: int = MAX_PIXELS  # largest number of pixels allowed
    formats: tuple[str, ...] | None = None  # Pillow's decoders to try; None for all
    exif: bytes | None = None  # the EXIF block that was removed from the content

    def open(self) -> Image.Image:
        """Open the picture; its pixels are not decoded yet."""
        if isinstance(self.content, Image.Image):
            return self.content
        content = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        return Image.open(content, formats=self.formats)

    def reopener(self) -> Callable[[], Image.Image] | None:
        """Return a function that reopens the picture; None for a Pillow image."""
        return None if isinstance(self.content, Image.Image) else self.open

    def bare(self) -> "_Source | None":
        """Return a copy without metadata; None if there is none to remove."""
        content = self.content
        if isinstance(content, Path):
            content = content.read_bytes() if content.is_file() and content.stat().st_size <= _MAX_FILE else b""
        parts = without_metadata(content) if isinstance(content, bytes) else None
        return replace(self, content=parts[0], exif=parts[1]) if parts else None


def read_picture(source: Path | bytes | Image.Image, short_side: int, quality: int) -> bytes:
    """Encode a picture as an upright RGB JPEG, with its short side reduced to `short_side` pixels.

    Smaller pictures keep their size. Values of more than 8 bits are scaled and transparent pixels become white (see
    `shards/media/pixel_depth.py`). Only pixels are stored: no EXIF, comments or color profile.

    Raises:
        UserError: The file is missing, empty or not decodable, or the picture is too large to decode or to store.
    """

    def encode(image: Image.Image, source: _Source) -> bytes:
        # libjpeg scales by 1/2, 1/4 or 1/8 while decoding; twice the final size leaves the rest to a better filter.
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
        raise UserError(f"{size} are too long for a JPEG: crop it")
    if image.width * image.height > MAX_STORED_PIXELS:
        raise UserError(f"{size} are more than the {MAX_STORED_PIXELS:,} allowed in a shard: lower --short-side")
    buffer = io.BytesIO()
    image = image.copy()
    image.info.clear()  # Pillow would write comments from it, and some releases XMP
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode_picture(
    data: bytes, size: int, max_pixels: int = MAX_PIXELS, resize: Resize = "crop", region: Region | None = None
) -> np.ndarray:
    """Decode a picture of a shard to a square array.

    Args:
        data: An encoded picture.
        size: Side of the square in pixels.
        max_pixels: Largest number of pixels that the picture may have.
        resize: "crop" resizes the short side to `size` and crops the center, as CLIP's image processor does with
            Pillow; "squash" resizes both sides to `size`, ignoring the aspect ratio, as BLIP-2's does. Both are
            bicubic.
        region: Chooses the region that is resized, in place of `resize`.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        UserError: The picture is not decodable, not in a format of shards, or has more than `max_pixels` pixels.
    """

    def decode(image: Image.Image, source: _Source) -> np.ndarray:
        stored, short_side = image.size, size
        if region:
            left, top, right, bottom = region(*stored)
            sides = stored[0] * (right - left), stored[1] * (bottom - top)
            short_side = math.ceil(size * min(stored) / max(1.0, min(sides)))  # of a picture with `size` in the region
        else:
            left, top, right, bottom = _central(*stored, size) if resize == "crop" else (0.0, 0.0, 1.0, 1.0)
        width, height = _draft(image, short_side)
        box = (left * width, top * height, right * width, bottom * height)
        square = to_rgb(image, source.reopener()).resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    return _read(_Source(data, max_pixels, _IN_SHARDS), decode)


def open_picture(data: bytes, max_pixels: int = MAX_STORED_PIXELS) -> Image.Image:
    """Open an encoded picture of a shard or a request; its pixels are not decoded yet.

    Raises:
        UserError: The picture is not in a format of shards, or has more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_IN_SHARDS)
    except UnidentifiedImageError:
        raise UserError("not a picture in JPEG, PNG or WebP") from None
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot be decoded as a picture ({error})") from None
    if image.width * image.height > max_pixels:
        raise UserError(f"{image.width} x {image.height} pixels, the limit is {max_pixels:,}")
    return image


def _central(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Return the region of a picture that remains after resizing its short side to `size` and cropping the center.

    Only that region is resized. Pillow's filter also reads the pixels around it, so the result equals a crop after the
    resize.

    Returns:
        Left, top, right and bottom, as shares of width and height.
    """
    short = min(width, height)
    wide, high = size * width // short, size * height // short  # resized, rounded down as in CLIP
    left, top = (wide - size) // 2, (high - size) // 2  # in pixels of the resized picture
    return left / wide, top / high, (left + size) / wide, (top + size) / high


def _draft(image: Image.Image, short_side: int) -> tuple[float, float]:
    """Let libjpeg reduce a picture while decoding it, with a short side of at least `short_side`.

    Returns:
        Width and height of the content in pixels of the decoded picture, whose last row and column may be partly
        padding.
    """
    scale = short_side / min(image.size)
    if scale < 1 and (drafted := image.draft(None, (round(image.width * scale), round(image.height * scale)))):
        return drafted[1][2:]
    return image.size


def _read(source: _Source, use: Callable[[Image.Image, _Source], _Result]) -> _Result:
    """Open a picture and use it; on failure retry without its metadata, which may be the only damaged part."""
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
    """Open a picture, check its size in the header, and convert errors inside the block to `UserError`."""
    content = source.content
    try:
        if isinstance(content, Path) and content.stat().st_size == 0:
            raise UserError("empty file (0 bytes)")
        with source.open() as image:
            if image.format == "EPS":  # Pillow would run it with Ghostscript
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
    except Exception as error:  # Pillow's plugins raise almost any type on damaged files
        raise _DecodingError(f"cannot be decoded as a picture ({error})") from None


def _unidentified(source: _Source) -> str:
    """Describe a file that none of Pillow's decoders accepts."""
    if source.formats:
        return f"not {' or '.join(source.formats)}"
    head = b"" if isinstance(source.content, Image.Image) else read_head(source.content)
    if clause := describe_content(head, "picture"):
        return clause
    if name := describe_content(head):
        return f"{name} that is damaged or of a variant that Pillow does not read: convert it to JPEG or PNG"
    return "not a picture in any format that Pillow reads"
