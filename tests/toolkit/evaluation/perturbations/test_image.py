"""Each perturbation of images does what its level says, and its clean level nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.media.picture import decode_picture
from toolkit.evaluation.perturbations.image import crop_region, jpeg, perturb_image
from toolkit.evaluation.perturbations.kinds import KINDS, generator_of


def image(side=64):
    """A gradient with a bright square."""
    ramp = np.linspace(0, 200, side)
    pixels = np.stack([np.broadcast_to(ramp, (side, side)), np.broadcast_to(ramp[:, None], (side, side))] * 2)[:3]
    pixels = pixels.astype(np.uint8)
    pixels[:, 20:30, 20:30] = 255
    return pixels


def perturbed(kind, level, number=0, seed=0):
    return perturb_image(image(), kind, level, generator_of(seed, kind, number))


@pytest.mark.parametrize("kind", ["jpeg", "blur", "occlusion"])
def test_clean_levels_change_nothing_and_others_are_reproducible(kind):
    before = image()
    assert perturb_image(before, kind, KINDS[kind].clean_level, generator_of(0, kind, 0)) is before
    for level in KINDS[kind].levels:
        once = perturbed(kind, level)
        assert once.shape == before.shape
        assert once.dtype == np.uint8
        assert np.array_equal(once, perturbed(kind, level))
        assert not np.array_equal(once, before)


def test_jpeg_of_lower_quality_is_smaller_and_further_from_the_image():
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    opened = Image.fromarray(pixels.transpose(1, 2, 0))
    sizes = [len(jpeg(opened, quality)) for quality in KINDS["jpeg"].levels]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]
    errors = [np.abs(perturbed("jpeg", level).astype(int) - image()).mean() for level in KINDS["jpeg"].levels]
    assert errors == sorted(errors)
    stored = Image.open(io.BytesIO(jpeg(Image.fromarray(image().transpose(1, 2, 0)), 10)))
    assert np.array_equal(perturbed("jpeg", 10.0), np.asarray(stored).transpose(2, 0, 1))


def test_blur_spreads_a_point_by_its_standard_deviation():
    point = np.zeros((3, 101, 101), np.uint8)
    point[:, 46:55, 46:55] = 255
    percent = 5.0
    blurred = perturb_image(point, "blur", percent, generator_of(0, "blur", 0))[0].astype(float)
    places = np.arange(101) - 50
    variance = (blurred.sum(0) * places**2).sum() / blurred.sum()
    assert np.sqrt(variance - (9**2 - 1) / 12) == pytest.approx(101 * percent / 100, rel=0.1)


@pytest.mark.parametrize("percent", [10.0, 25.0, 100.0])
def test_occlusion_covers_its_area(percent):
    covered = (perturbed("occlusion", percent) == 128).all(axis=0)
    assert covered.mean() == pytest.approx(percent / 100, abs=0.02)
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    assert len(rows) == len(columns)
    assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_occlusion_is_elsewhere_in_another_picture_and_with_another_seed():
    here = perturbed("occlusion", 10.0)
    assert not np.array_equal(here, perturbed("occlusion", 10.0, number=1))
    assert not np.array_equal(here, perturbed("occlusion", 10.0, seed=1))


def test_crop_keeps_its_share_of_the_largest_square():
    for percent in (75.0, 25.0):
        region = crop_region(percent, 0, 3, "crop")
        left, top, right, bottom = region(200, 100)
        assert (right - left) * 200 == pytest.approx((bottom - top) * 100)
        assert (right - left) * 200 * (bottom - top) * 100 == pytest.approx(percent / 100 * 100 * 100)
        assert region(200, 100) == crop_region(percent, 0, 3, "crop")(200, 100)
        assert region(200, 100) != crop_region(percent, 0, 4, "crop")(200, 100)
    left, top, right, bottom = crop_region(25.0, 0, 3, "squash")(200, 100)
    assert (right - left, bottom - top) == pytest.approx((0.5, 0.5))


def test_uncropped_is_clean():
    assert crop_region(100, 0, 0, "crop") is None
    stored = jpeg(Image.fromarray(image().transpose(1, 2, 0)), 95)
    clean = decode_picture(stored, 32)
    assert np.array_equal(decode_picture(stored, 32, region=crop_region(100, 0, 0, "crop")), clean)
    assert not np.array_equal(decode_picture(stored, 32, region=crop_region(50, 0, 0, "crop")), clean)


def test_what_is_not_a_perturbation_of_images_is_refused():
    with pytest.raises(ValueError, match="white is not a perturbation of an image"):
        perturbed("white", 10)
