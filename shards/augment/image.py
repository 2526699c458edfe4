"""Augmentation of a picture: a random crop in place of the central one, and other colors; never a mirror image."""

import numpy as np

from shards.augment.randomness import SampleRandomness, uniform
from shards.augment.settings import ImageAugment
from shards.media.picture import Region, Resize

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)
# To luminance and two chromatic coordinates (YIQ), in whose plane the hue is an angle.
_TO_YIQ = np.array([_LUMINANCE, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def draw_crop(settings: ImageAugment, randomness: SampleRandomness, resize: Resize = "crop") -> Region | None:
    """Draw the region of a picture that becomes the square; None: the usual one.

    The largest region of the drawn aspect ratio that fits is scaled by the drawn area and placed at random, so every
    draw is valid and the number of draws does not depend on the picture.

    Args:
        settings: Probability and ranges.
        randomness: Random numbers of the sample.
        resize: Aspect ratios are relative to the square ("crop"), or to the picture's ("squash").

    Returns:
        A function from width and height of a picture to the region.
    """
    generator = randomness.draw("crop", settings.crop)
    if generator is None:
        return None
    area, aspect = uniform(generator, settings.crop_area), uniform(generator, settings.crop_aspect)
    x, y = generator.random(2).tolist()
    randomness.note("crop", area)

    def region(width: int, height: int) -> tuple[float, float, float, float]:
        ratio = aspect if resize == "squash" else aspect * height / width  # of the shares
        wide, high = min(1.0, ratio) * area**0.5, min(1.0, 1 / ratio) * area**0.5
        left, top = x * (1 - wide), y * (1 - high)
        return left, top, left + wide, top + high

    return region


def augment_colors(image: np.ndarray, settings: ImageAugment, randomness: SampleRandomness) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of a picture.

    Args:
        image: uint8 [3, H, W], RGB.
        settings: Probability and ranges.
        randomness: Random numbers of the sample.

    Returns:
        uint8 [3, H, W]; `image` itself if nothing is applied.
    """
    generator = randomness.draw("color", settings.color)
    if generator is None:
        return image
    names = ("brightness", "contrast", "saturation", "hue")
    brightness, contrast, saturation, hue = (uniform(generator, getattr(settings, name)) for name in names)
    randomness.note("color", brightness, contrast, saturation, hue)
    return change_colors(image, brightness, contrast, saturation, hue)


def change_colors(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Change the colors of uint8 [3, H, W], in one affine map of RGB.

    Args:
        image: The picture.
        brightness: Factor of the values.
        contrast: Factor of the distance from the mean luminance.
        saturation: Factor of the distance from gray.
        hue: Rotation of the hue in turns.
    """
    angle = 2 * np.pi * hue
    chroma = saturation * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = np.eye(3)
    turn[1:, 1:] = chroma
    matrix = brightness * contrast * (np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ)
    red, green, blue = image.astype(np.float32)
    mean = float(_LUMINANCE @ image.reshape(3, -1).mean(axis=1))
    offset = brightness * (1 - contrast) * mean
    changed = np.empty(image.shape, np.float32)
    for channel, (r, g, b) in zip(changed, matrix.astype(np.float32), strict=True):
        np.add(r * red + g * green, b * blue + np.float32(offset), out=channel)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)
