"""How a trunk's inputs were prepared when it was trained, as the folder of its weights says.

Older folders have it in preprocessor_config.json, newer ones in a section of processor_config.json. A folder without
either says nothing: then the values hold that its kind of model was published with.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import Resize
from toolkit.model.image import MEAN, STD
from toolkit.model.trunk import quiet

FILES = ("preprocessor_config.json", "processor_config.json")
FAIRSEQ_EPSILON = 1e-5  # of the layer norm that fairseq applied to the waveforms of HuBERT-large
PUBLISHED: dict[str, Resize] = {"clip": "crop", "blip2": "squash"}


@dataclass(frozen=True)
class PictureInputs:
    """Pictures as a vision trunk takes them.

    Attributes:
        resize: How they become squares (see `shards.media.picture.decode_picture`).
        mean: Of red, green and blue, subtracted from values in [0, 1].
        std: What they are divided by then.
    """

    resize: Resize
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def picture_inputs(source: str, key: str, architecture: str) -> PictureInputs:
    """Read what a vision trunk takes.

    Args:
        source: Local folder or hub id.
        key: Configuration value that named it, for the messages.
        architecture: "clip" or "blip2", whose published values stand in for what is not said.

    Raises:
        UserError: The file is damaged, or its values make no sense.
    """
    said = _read(ImageProcessingMixin.get_image_processor_dict, source, key)
    try:
        # Bytes are made numbers in [0, 1] by 1 / 255; another factor is one of mean and deviation.
        scale = 1 / 255 if said.get("do_rescale", True) else 1.0
        scale = float(said.get("rescale_factor", scale)) if scale != 1.0 else scale
        normalised = said.get("do_normalize", True)
        mean = _channels(said.get("image_mean", MEAN) if normalised else (0.0,) * 3)
        std = _channels(said.get("image_std", STD) if normalised else (1.0,) * 3)
        if not scale > 0 or not all(value > 0 for value in std):
            raise ValueError("image_std and rescale_factor have to be more than 0")
        if scale != 1 / 255:
            mean, std = (tuple(value / (255 * scale) for value in values) for values in (mean, std))
        return PictureInputs(_resize(said) or PUBLISHED[architecture], mean, std)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{key}: {source}: {FILES[0]} cannot be used: {error}") from None


def waveform_epsilon(source: str, key: str) -> float | None:
    """What is added to the variance of a waveform when a HuBERT of the large kind takes it at unit variance.

    Args:
        source: Local folder or hub id.
        key: Configuration value that named it, for the messages.

    Returns:
        The value that fairseq trained with, which the folder does not say; None if the trunk takes waveforms as they
        are.

    Raises:
        UserError: The file is damaged, or the trunk takes another sampling rate.
    """
    said = _read(FeatureExtractionMixin.get_feature_extractor_dict, source, key)
    rate = said.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(f"{key}: {source} takes speech at {rate} Hz ({FILES[0]}); shards hold {SAMPLE_RATE} Hz")
    return FAIRSEQ_EPSILON if said.get("do_normalize", True) else None


def _read(get: Callable[..., tuple[dict[str, Any], Any]], source: str, key: str) -> dict[str, Any]:
    """Values of the file; none if there is no such file."""
    source = os.path.expanduser(source)
    try:
        with quiet():
            said = get(source)[0]
        if not isinstance(said, dict):
            raise TypeError("not a mapping")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        damaged = [name for name in FILES if os.path.isfile(os.path.join(source, name))]
        if damaged:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {source}: {' or '.join(damaged)} cannot be read: {reason}") from None
        return {}
    return said


def _channels(values: Any) -> tuple[float, ...]:
    """Three finite numbers."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"expected three numbers for red, green and blue, got {values}")
    return numbers


def _resize(said: dict[str, Any]) -> Resize | None:
    """How pictures become squares; None: it is not said."""
    size = said.get("size")
    if not said.get("do_resize", True) or size is None:
        return None
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return "squash"
    if said.get("do_center_crop"):
        return "crop"
    return "squash" if isinstance(size, int) else None
