"""Perturbations of an image, uint8 [3, S, S] as the model encodes it, at given levels."""

import io
import math

import numpy as np
from PIL import Image, ImageFilter

from shards.augment.image import draw_crop
from shards.augment.randomness import SampleRandomness
from shards.augment.settings import ImageAugment
from shards.media.picture import Region, Resize
from toolkit.evaluation.perturbations.kinds import KINDS

_GRAY = 128


def crop_region(level: float, seed: int, number: int, resize: Resize) -> Region | None:
    """Region of a picture that becomes the image, at a random place: `level` percent of the largest square's area.

    Args:
        level: Percent; at 100 the usual region.
        seed: Seed of the suite.
        number: Number of the sample.
        resize: How the picture is made square otherwise; "squash" keeps the picture's aspect ratio.
    """
    if level == KINDS["crop"].clean_level:
        return None
    settings = ImageAugment(crop=1.0, crop_area=[level / 100] * 2, crop_aspect=[1.0, 1.0])
    return draw_crop(settings, SampleRandomness(seed, number), resize)


def perturb_image(image: np.ndarray, kind: str, level: float, generator: np.random.Generator) -> np.ndarray:
    """Perturb an image; crops are made when a picture is decoded, by `crop_region`.

    Args:
        image: uint8 [3, S, S], RGB.
        kind: A kind of `KINDS` for images, other than crop.
        level: Its level; at the kind's clean level the result is `image` itself.
        generator: Random numbers of the picture.

    Returns:
        uint8 [3, S, S].

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in ("jpeg", "blur", "occlusion"):
        raise ValueError(f"{kind} is not a perturbation of an image")
    if level == KINDS[kind].clean_level:
        return image
    if kind == "occlusion":
        return occlude(image, level, generator)
    opened = Image.fromarray(image.transpose(1, 2, 0))
    if kind == "jpeg":
        opened = Image.open(io.BytesIO(jpeg(opened, round(level)))).convert("RGB")
    else:
        opened = opened.filter(ImageFilter.GaussianBlur(image.shape[-1] * level / 100))
    return np.ascontiguousarray(np.asarray(opened).transpose(2, 0, 1))


def jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode an image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def occlude(image: np.ndarray, percent: float, generator: np.random.Generator) -> np.ndarray:
    """Cover `percent` of the area by a gray square at a random place."""
    side = round(image.shape[-1] * math.sqrt(percent / 100))
    top, left = generator.integers(0, image.shape[-1] - side, size=2, endpoint=True).tolist()
    changed = image.copy()
    changed[:, top : top + side, left : left + side] = _GRAY
    return changed
