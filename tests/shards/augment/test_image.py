"""Augmented pictures: crops and colors in range, never a mirror image."""

import numpy as np
import pytest
from PIL import Image

from shards.augment.image import augment_colors, change_colors, draw_crop
from shards.augment.randomness import SampleRandomness
from shards.augment.settings import IMAGE_KINDS, ImageAugment
from shards.media.picture import Resize, decode_picture
from tests.shards.media.picture_files import saved

SIZES = [(640, 480), (300, 900), (500, 500), (1200, 100)]


def ramp(width: int, height: int) -> np.ndarray:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


def noise(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, (3, size, size), dtype=np.uint8)


def test_off_by_default_and_the_same_picture() -> None:
    image = noise()
    assert all(getattr(ImageAugment(), kind) == 0 for kind in IMAGE_KINDS)
    assert draw_crop(ImageAugment(), SampleRandomness(0, 0)) is None
    assert augment_colors(image, ImageAugment(), SampleRandomness(0, 0)) is image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_area_and_aspect_are_in_range(size: tuple[int, int], resize: Resize) -> None:
    width, height = size
    settings = ImageAugment(crop=1.0, crop_area=[0.4, 0.9], crop_aspect=[0.8, 1.25])
    areas, aspects, lefts = [], [], []
    for position in range(200):
        region = draw_crop(settings, SampleRandomness(1, position), resize)
        assert region is not None
        left, top, right, bottom = region(width, height)
        assert 0 <= left < right <= 1 + 1e-9
        assert 0 <= top < bottom <= 1 + 1e-9
        wide, high = (right - left) * width, (bottom - top) * height
        base = 1 if resize == "crop" else width / height
        aspects.append(wide / high / base)
        largest = min(width, height * wide / high) * min(height, width * high / wide)
        areas.append(wide * high / largest)
        lefts.append(left / (1 - (right - left)) if right - left < 1 else 0)
    assert 0.4 - 1e-6 <= min(areas) < 0.45
    assert 0.85 < max(areas) <= 0.9 + 1e-6
    assert 0.8 - 1e-6 <= min(aspects) < 0.85
    assert 1.2 < max(aspects) <= 1.25 + 1e-6
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", SIZES)
def test_a_crop_is_where_it_was_drawn_and_never_mirrored(size: tuple[int, int], kind: str) -> None:
    data = saved(kind, Image.fromarray(ramp(*size)))
    settings = ImageAugment(crop=1.0, crop_area=[0.2, 1.0], crop_aspect=[0.7, 1.4])
    for position in range(12):
        region = draw_crop(settings, SampleRandomness(2, position))
        assert region is not None
        left, top, right, bottom = region(*size)
        image = decode_picture(data, 24, region=region).astype(float)
        red, green = image[0].mean(axis=0), image[1].mean(axis=1)
        step = 255 * (right - left) / 24
        assert red[3:-3].mean() == pytest.approx(255 * (left + right) / 2, abs=4)
        assert green[3:-3].mean() == pytest.approx(255 * (top + bottom) / 2, abs=4)
        assert red[-4] - red[3] == pytest.approx(17 * step, abs=5)
        assert red[-4] > red[3]
        assert green[-4] > green[3]


def test_the_largest_crop_of_a_square_is_the_picture() -> None:
    data = saved("PNG", Image.fromarray(np.ascontiguousarray(noise(3, 64).transpose(1, 2, 0))))
    same = ImageAugment(crop=1.0, crop_area=[1.0, 1.0], crop_aspect=[1.0, 1.0])
    region = draw_crop(same, SampleRandomness(0, 0))
    assert np.array_equal(decode_picture(data, 32, region=region), decode_picture(data, 32))


def test_colors_are_a_function_of_seed_and_position() -> None:
    image, settings = noise(), ImageAugment(color=1.0)
    before = image.copy()
    results = [augment_colors(image, settings, SampleRandomness(seed, p)) for seed, p in ((1, 5), (1, 6), (2, 5))]
    assert np.array_equal(image, before), "the input was changed"
    assert np.array_equal(results[0], augment_colors(image, settings, SampleRandomness(1, 5)))
    assert not any(np.array_equal(results[0], other) for other in (*results[1:], image))
    assert results[0].dtype == np.uint8
    assert results[0].shape == image.shape


def test_each_color_change_does_what_its_name_says() -> None:
    image = noise(4)
    values = image.astype(float)
    luminance = np.tensordot([0.299, 0.587, 0.114], values, axes=1)
    assert np.array_equal(change_colors(image, 1, 1, 1, 0), image)
    assert change_colors(image, 0.5, 1, 1, 0) == pytest.approx(0.5 * values, abs=0.51)
    mean = luminance.mean()
    assert change_colors(image, 1, 0.5, 1, 0) == pytest.approx(mean + 0.5 * (values - mean), abs=0.6)
    gray = change_colors(image, 1, 1, 0, 0)
    assert np.ptp(gray.astype(int), axis=0).max() <= 1
    assert gray[0] == pytest.approx(luminance, abs=1)
    red = np.zeros((3, 2, 2), np.uint8)
    red[0] = 120
    turned = change_colors(red, 1, 1, 1, 0.02).astype(int)[:, 0, 0]
    assert turned.argmax() == 0, "a small rotation changes the name of the color"
    assert np.tensordot([0.299, 0.587, 0.114], turned, axes=1) == pytest.approx(0.299 * 120, abs=6)


def test_brightness_is_in_range() -> None:
    image = np.full((3, 4, 4), 100, np.uint8)
    settings = ImageAugment(color=1.0, brightness=[0.8, 1.1])
    result = [augment_colors(image, settings, SampleRandomness(0, p)).mean() for p in range(60)]
    assert 79 <= min(result) < 84
    assert 106 < max(result) <= 111


def test_extreme_colors_stay_in_bytes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    changed = change_colors(image, 3, 3, 3, 0.3)
    assert changed.min() == 0
    assert changed.max() == 255
