"""Build the model from the configuration."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionModelWithProjection,
    HubertConfig,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
)

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import Resize
from toolkit.config import schema as config
from toolkit.model.retrieval import VISION, SpeechImageConfig, SpeechImageModel
from toolkit.model.trunk import OUTSIDE, ModelKind, read_weights
from toolkit.model.trunk_inputs import picture_inputs, waveform_epsilon

# SpecAugment is not used: without it, a trunk has no mask embedding that would never be trained.
NO_SPEC_AUGMENT = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
INPUTS = ("waveform_epsilon", "final_norm", "mean", "std")  # encoder arguments that depend on the trunk's source
HUBERT = ModelKind("HuBERT", "model.speech.trunk", ("hubert",))
VISION_KINDS = {
    "clip": ModelKind(
        "CLIP",
        "model.image.trunk",
        ("clip_vision_model",),
        ("clip",),
        {r"^(?!vision_model\.|visual_projection\.)": OUTSIDE},
    ),
    "blip2": ModelKind(
        "BLIP-2",
        "model.image.trunk",
        ("blip_2_vision_model",),
        ("blip-2",),
        {r"^(?!vision_model\.)": OUTSIDE, r"^vision_model\.": ""},
    ),
}


def build_model(
    model: config.Model,
    contrastive: config.Contrastive | None = None,
    resize: Resize | None = None,
    exported: Mapping[str, Any] | None = None,
) -> SpeechImageModel:
    """Build the retrieval model, with pretrained or randomly initialized trunks.

    Args:
        model: The architecture, and the sources of the trunks.
        contrastive: Settings of the temperature; None: the defaults.
        resize: How the data loader makes pictures square, to be checked against the trunk; None: no check.
        exported: config.json of an earlier export of the run, whose preprocessing is kept; None: a new run.

    Raises:
        UserError: A trunk cannot be loaded, was trained with another `resize`, or a value is invalid.
    """
    contrastive = contrastive or config.Contrastive()
    hubert = vision = None
    if model.speech.trunk:
        hubert = _load(HubertModel, model.speech.trunk, HUBERT, **NO_SPEC_AUGMENT)
    if model.image.trunk:
        vision = _load_vision(model)
    hubert_config = hubert.config if hubert else _trunk_config(HubertConfig, model.speech.config, "model.speech.config")
    vision_class = VISION[model.image.architecture][0]
    vision_config = vision.config if vision else _trunk_config(vision_class, model.image.config, "model.image.config")
    _check_heads(model, hubert_config, vision_config)
    speech_inputs = _inputs(exported, "speech", lambda: _speech_inputs(model.speech, hubert_config))
    image_inputs = _inputs(exported, "image", lambda: _image_inputs(model.image, resize))
    hubert_values, vision_values = _changed_values(hubert_config), _changed_values(vision_config)
    architecture = SpeechImageConfig(
        embed_dim=model.embed_dim,
        speech={**_encoder_arguments(model.speech), **speech_inputs, "trunk": hubert_values | NO_SPEC_AUGMENT},
        image={**_encoder_arguments(model.image), **image_inputs, "trunk": vision_values},
        fusion=dict(vars(model.fusion)),
        contrastive={
            "initial": contrastive.temperature,
            "minimum": contrastive.min_temperature,
            "maximum": contrastive.max_temperature,
            "learned": contrastive.learn_temperature,
        },
    )
    built = SpeechImageModel(architecture, hubert, vision)
    projection = getattr(vision, "visual_projection", None)
    if projection is not None:
        built.image.init_projection(projection.weight)
    if model.speech.filterbank and not model.speech.trunk:
        set_mel_filters(built.speech.trunk.feature_extractor.get_parameter("conv_layers.0.conv.weight"))
    return built


@torch.no_grad()
def set_mel_filters(weight: Tensor, low: float = 80.0, high: float = 7600.0) -> None:
    """Initialize a first convolution with windowed cosines and sines at mel-spaced frequencies (the idea of SincNet).

    Training from random weights then needs fewer steps, because the spectrum does not have to be learned first.

    Args:
        weight: [filters, 1, length], for 16 kHz waveforms.
        low: Lowest frequency in Hz.
        high: Highest frequency in Hz.
    """
    filters, _, length = weight.shape
    mel = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), (filters + 1) // 2)
    frequency = (700 * mel.expm1()).repeat_interleave(2)[:filters, None]
    phase = math.pi / 2 * (torch.arange(filters) % 2)[:, None]
    seconds = (torch.arange(length) - length / 2) / SAMPLE_RATE
    waves = torch.cos(2 * math.pi * frequency * seconds + phase) * torch.hann_window(length)
    weight.copy_((waves / waves.norm(dim=1, keepdim=True))[:, None])


def _load(cls: type[PreTrainedModel], source: str, kind: ModelKind, **options: Any) -> Any:
    return read_weights(cls.from_pretrained, source, kind, dtype=torch.float32, attn_implementation="sdpa", **options)


def _load_vision(model: config.Model) -> Any:
    """Load a vision trunk, with CLIP's projection if the head can be initialized with it."""
    image, kind = model.image, VISION_KINDS[model.image.architecture]
    assert image.trunk
    if image.architecture != "clip" or image.head_layers or image.pool != "class":
        return _load(VISION[image.architecture][1], image.trunk, kind)
    named = {"optional": ("visual_projection",), "projection_dim": model.embed_dim}
    vision = _load(CLIPVisionModelWithProjection, image.trunk, kind, **named)
    if vision.visual_projection is None and image.freeze_projection:
        raise UserError(
            f"model.image.freeze_projection: {image.trunk} has no visual_projection of {model.embed_dim} values "
            "(model.embed_dim): pass the folder of a complete CLIPModel, and set model.embed_dim to its projection_dim"
        )
    return vision


def _inputs(exported: Mapping[str, Any] | None, side: str, fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return encoder arguments of `INPUTS`: from the run's export, which omits defaults, else new ones."""
    if exported is None:
        return fresh()
    return {name: value for name, value in exported.get(side, {}).items() if name in INPUTS}


def _speech_inputs(speech: config.Speech, hubert: PretrainedConfig) -> dict[str, Any]:
    """Return encoder arguments as in the training of a pretrained trunk; empty for random weights."""
    if not speech.trunk:
        return {}
    epsilon = waveform_epsilon(speech.trunk, HUBERT.key)
    large = hubert.feat_extract_norm == "layer" and hubert.do_stable_layer_norm
    return {"waveform_epsilon": epsilon, "final_norm": False} if large else {}


def _image_inputs(image: config.Image, resize: Resize | None) -> dict[str, Any]:
    """Return mean and standard deviation of the pixels as in the training of a pretrained trunk.

    `data.resize` applies to training, evaluation and export alike, so it must equal that of the trunk's training.
    """
    if not image.trunk:
        return {}
    kind = VISION_KINDS[image.architecture]
    inputs = picture_inputs(image.trunk, kind.key, image.architecture)
    if resize not in (None, inputs.resize):
        trained = {"crop": "the central square of pictures", "squash": "complete pictures resized to a square"}
        raise UserError(
            f"{kind.key}: {image.trunk} was trained on {trained[inputs.resize]}, and --data.resize is {resize}: set "
            f"--data.resize {inputs.resize}"
        )
    return {"mean": list(inputs.mean), "std": list(inputs.std)}


def _encoder_arguments(encoder: config.Speech | config.Image) -> dict[str, Any]:
    """Return the values of a section that are arguments of the encoder, without those that define the trunk."""
    return {name: value for name, value in vars(encoder).items() if name not in ("trunk", "config", "filterbank")}


def _trunk_config(cls: type[PretrainedConfig], values: dict[str, Any], key: str) -> PretrainedConfig:
    """Create a transformers configuration from a section's values; unknown values are an error."""
    known = cls().to_dict()
    for name in values:
        if name not in known:
            raise UserError(f"{key}.{name}: no such value in {cls.__name__}")
    try:
        return cls(**values)
    except Exception as error:  # ValueError, TypeError, and errors of its own since transformers 5
        raise UserError(f"{key}: {' '.join(str(error).split())}") from error


def _changed_values(trunk: PretrainedConfig) -> dict[str, Any]:
    """Return the values of a trunk's configuration that differ from transformers' defaults, without file metadata."""
    dropped = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type"}
    return {name: value for name, value in trunk.to_diff_dict().items() if name not in dropped}


def _check_heads(model: config.Model, hubert: PretrainedConfig, vision: PretrainedConfig) -> None:
    """Raise an error if a number of attention heads does not divide its width."""
    for key, width, heads in (
        ("model.speech.config.num_attention_heads", hubert.hidden_size, hubert.num_attention_heads),
        ("model.image.config.num_attention_heads", vision.hidden_size, vision.num_attention_heads),
        ("model.speech.head_heads", hubert.hidden_size, model.speech.head_heads if model.speech.head_layers else 1),
        ("model.image.head_heads", vision.hidden_size, model.image.head_heads if model.image.head_layers else 1),
        ("model.fusion.heads", model.fusion.width, model.fusion.heads),
    ):
        if heads < 1 or width % heads:
            raise UserError(f"{key}: {heads} does not divide the width {width}")
