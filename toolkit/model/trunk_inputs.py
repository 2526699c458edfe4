"""Preprocessing that a pretrained trunk was trained with, read from the folder of its weights.

Older folders have it in preprocessor_config.json, newer ones in a section of processor_config.json. If both are
missing, the values that the architecture was published with are used.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import Resize
from toolkit.model.image import MEAN, STD
from toolkit.model.speech_trunks import FFT, HOP
from toolkit.model.trunk import quiet

FILES = ("preprocessor_config.json", "processor_config.json")
FAIRSEQ_EPSILON = 1e-5  # of the layer norm by which fairseq normalizes HuBERT-large's waveforms


@dataclass(frozen=True)
class PictureInputs:
    """Preprocessing of a vision trunk's pictures.

    Attributes:
        resize: How pictures are made square (see `shards.media.picture.decode_picture`).
        mean: Mean of red, green and blue, subtracted from values in [0, 1].
        std: Standard deviation of red, green and blue, by which the result is divided.
    """

    resize: Resize
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


PUBLISHED = {
    "clip": PictureInputs("crop"),
    "blip2": PictureInputs("squash"),
    "siglip": PictureInputs("squash", (0.5,) * 3, (0.5,) * 3),
    "dinov2": PictureInputs("crop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def picture_inputs(source: str, key: str, architecture: str) -> PictureInputs:
    """Read the preprocessing of a vision trunk.

    Args:
        source: Local folder or hub id.
        key: Configuration key of the source, for error messages.
        architecture: Name in `PUBLISHED`, whose values are the defaults.

    Raises:
        UserError: The file is damaged, or its values are invalid.
    """
    settings, published = _read(ImageProcessingMixin.get_image_processor_dict, source, key), PUBLISHED[architecture]
    try:
        # ImageEncoder scales pixels by 1 / 255; another factor is folded into mean and standard deviation.
        scale = 1 / 255 if settings.get("do_rescale", True) else 1.0
        scale = float(settings.get("rescale_factor", scale)) if scale != 1.0 else scale
        normalized = settings.get("do_normalize", True)
        mean = _channels(settings.get("image_mean", published.mean) if normalized else (0.0,) * 3)
        std = _channels(settings.get("image_std", published.std) if normalized else (1.0,) * 3)
        if not scale > 0 or not all(value > 0 for value in std):
            raise ValueError("image_std and rescale_factor must be more than 0")
        if scale != 1 / 255:
            mean, std = (tuple(value / (255 * scale) for value in values) for values in (mean, std))
        return PictureInputs(_resize(settings) or published.resize, mean, std)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{key}: {source}: {FILES[0]} cannot be used: {error}") from None


def waveform_epsilon(source: str, key: str, default: bool = True) -> float | None:
    """Return the epsilon of the normalization of waveforms to zero mean and unit variance.

    Args:
        source: Local folder or hub id.
        key: Configuration key of the source, for error messages.
        default: Whether waveforms are normalized if the folder does not say it.

    Returns:
        The value that fairseq uses, which is not saved in the folder; None if waveforms are not normalized.

    Raises:
        UserError: The file is damaged, or the trunk needs another sampling rate.
    """
    return FAIRSEQ_EPSILON if _speech_settings(source, key).get("do_normalize", default) else None


def check_spectrogram(source: str, key: str, trunk: PretrainedConfig) -> None:
    """Check that a Whisper's log-mel spectrogram is the one that its encoder is given here.

    Args:
        source: Local folder or hub id.
        key: Configuration key of the source, for error messages.
        trunk: The encoder's configuration.

    Raises:
        UserError: The file is damaged, or the trunk needs another sampling rate or spectrogram.
    """
    settings = _speech_settings(source, key)
    window = trunk.max_source_positions * 2 * HOP / SAMPLE_RATE
    expected = {
        "feature_size": trunk.num_mel_bins,
        "hop_length": HOP,
        "n_fft": FFT,
        "chunk_length": window,
        "do_normalize": False,
    }
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise UserError(f"{key}: {source}: {name} is {settings[name]} ({FILES[0]}); only {value:g} is supported")


def _speech_settings(source: str, key: str) -> dict[str, Any]:
    """Read the preprocessing of a speech trunk; the sampling rate must be that of the shards."""
    settings = _read(FeatureExtractionMixin.get_feature_extractor_dict, source, key)
    rate = settings.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(f"{key}: {source} takes speech at {rate} Hz ({FILES[0]}); shards hold {SAMPLE_RATE} Hz")
    return settings


def _read(get: Callable[..., tuple[dict[str, Any], Any]], source: str, key: str) -> dict[str, Any]:
    """Read the values of the file; empty if there is no such file."""
    source = os.path.expanduser(source)
    try:
        with quiet():
            settings = get(source)[0]
        if not isinstance(settings, dict):
            raise TypeError("not a mapping")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        damaged = [name for name in FILES if os.path.isfile(os.path.join(source, name))]
        if damaged:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {source}: {' or '.join(damaged)} cannot be read: {reason}") from None
        return {}
    return settings


def _channels(values: Any) -> tuple[float, ...]:
    """Check and convert a value to three finite numbers."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"expected three numbers for red, green and blue, got {values}")
    return numbers


def _resize(settings: dict[str, Any]) -> Resize | None:
    """Return how pictures are made square; None if the settings do not contain it."""
    size = settings.get("size")
    if not settings.get("do_resize", True) or size is None:
        return None
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return "squash"
    if settings.get("do_center_crop"):
        return "crop"
    return "squash" if isinstance(size, int) else None
