"""Build the model from the configuration."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, PretrainedConfig

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import Resize
from toolkit.config import schema as config
from toolkit.model.architectures import IMAGE, SPEECH, Architecture, find_architecture
from toolkit.model.retrieval import SpeechImageConfig, SpeechImageModel
from toolkit.model.trunk import PartlyFrozen, read_weights
from toolkit.model.trunk_inputs import check_spectrogram, picture_inputs, waveform_epsilon

INPUTS = ("waveform_epsilon", "final_norm", "mean", "std")  # encoder arguments that depend on the trunk's source


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
    model = _with_architectures(model)
    speech_entry, image_entry = SPEECH[model.speech.architecture], IMAGE[model.image.architecture]
    speech_trunk = _load(speech_entry, model.speech.trunk) if model.speech.trunk else None
    vision = _load_vision(model) if model.image.trunk else None
    speech_config = speech_trunk.config if speech_trunk else _trunk_config(speech_entry, model.speech.config)
    vision_config = vision.config if vision else _trunk_config(image_entry, model.image.config)
    _check_heads(model, speech_config, vision_config)
    speech_inputs = _inputs(exported, "speech", lambda: _speech_inputs(model.speech, speech_config))
    image_inputs = _inputs(exported, "image", lambda: _image_inputs(model.image, resize))
    speech_values = _changed_values(speech_config) | dict(speech_entry.fixed)
    vision_values = _changed_values(vision_config) | _vision_options(model.image)
    architecture = SpeechImageConfig(
        embed_dim=model.embed_dim,
        speech={**_encoder_arguments(model.speech), **speech_inputs, "trunk": speech_values},
        image={**_encoder_arguments(model.image), **image_inputs, "trunk": vision_values},
        fusion=dict(vars(model.fusion)),
        contrastive={
            "initial": contrastive.temperature,
            "minimum": contrastive.min_temperature,
            "maximum": contrastive.max_temperature,
            "learned": contrastive.learn_temperature,
        },
    )
    built = SpeechImageModel(architecture, speech_trunk, vision)
    projection = getattr(vision, "visual_projection", None)
    if projection is not None:
        built.image.init_projection(projection.weight)
    _add_lora(model.speech, built.speech, speech_entry)
    _add_lora(model.image, built.image, image_entry)
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


def _with_architectures(model: config.Model) -> config.Model:
    """Return a copy whose architectures are those of the folders; random weights have the configured ones."""
    speech, image = model.speech, model.image
    if speech.trunk:
        name = find_architecture(speech.trunk, SPEECH, speech.architecture)
        speech = replace(speech, architecture=cast(Any, name))
    if image.trunk:
        name = find_architecture(image.trunk, IMAGE, image.architecture)
        image = replace(image, architecture=cast(Any, name))
    return replace(model, speech=speech, image=image)


def _load(architecture: Architecture, source: str, cls: Any = None, **options: Any) -> Any:
    options = {**architecture.fixed, "attn_implementation": architecture.attention, **options}
    load = (cls or architecture.model).from_pretrained
    return read_weights(load, source, architecture.kind, dtype=torch.float32, **options)


def _load_vision(model: config.Model) -> Any:
    """Load a vision trunk, with CLIP's projection if the head can be initialized with it."""
    image, architecture = model.image, IMAGE[model.image.architecture]
    assert image.trunk
    projected = image.architecture == "clip" and not image.head_layers and image.pool == "class"
    if image.freeze_projection and not projected:
        raise UserError(
            f"model.image.freeze_projection: {image.trunk} holds {architecture.kind.name}; only CLIP has a projection"
        )
    if not projected:
        vision = _load(architecture, image.trunk, **_vision_options(image))
        if (
            not architecture.class_token
            and _pools(image)
            and not hasattr(getattr(vision, "vision_model", vision), "head")
        ):
            raise UserError(f"model.image.trunk: {image.trunk} has no attention pooling: set --model.image.pool mean")
        return vision
    named = {"optional": ("visual_projection",), "projection_dim": model.embed_dim}
    vision = _load(architecture, image.trunk, CLIPVisionModelWithProjection, **named)
    if vision.visual_projection is None and image.freeze_projection:
        raise UserError(
            f"model.image.freeze_projection: {image.trunk} has no visual_projection of {model.embed_dim} values "
            "(model.embed_dim): pass the folder of a complete CLIPModel, and set model.embed_dim to its projection_dim"
        )
    return vision


def _pools(image: config.Image) -> bool:
    """Whether the embedding is made of the trunk's own pooled output."""
    return image.pool == "class" and not image.head_layers


def _vision_options(image: config.Image) -> dict[str, Any]:
    """Return values of a vision trunk's configuration that hold whatever a folder says."""
    fixed = IMAGE[image.architecture].fixed
    return {**fixed, "vision_use_head": False} if image.architecture == "siglip" and not _pools(image) else dict(fixed)


def _add_lora(section: config.Speech | config.Image, encoder: PartlyFrozen, architecture: Architecture) -> None:
    """Adapt an encoder's trunk if the section says so."""
    if section.lora_rank:
        key = architecture.kind.key.replace(".trunk", ".lora_targets")
        names = {name.rpartition(".")[2] for name, _ in encoder.trunk.named_modules()}
        targets = section.lora_targets or [name for name in architecture.lora if name in names]
        encoder.add_lora(section.lora_rank, section.lora_alpha, targets, key)


def _inputs(exported: Mapping[str, Any] | None, side: str, fresh: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return encoder arguments of `INPUTS`: from the run's export, which omits defaults, else new ones."""
    if exported is None:
        return fresh()
    return {name: value for name, value in exported.get(side, {}).items() if name in INPUTS}


def _speech_inputs(speech: config.Speech, trunk: PretrainedConfig) -> dict[str, Any]:
    """Return encoder arguments as in the training of a pretrained trunk; empty for random weights."""
    if not speech.trunk:
        return {}
    key, default = SPEECH[speech.architecture].kind.key, SPEECH[speech.architecture].norm_waveform
    if speech.architecture == "whisper":
        check_spectrogram(speech.trunk, key, trunk)
        return {}
    large = trunk.feat_extract_norm == "layer" and trunk.do_stable_layer_norm
    epsilon = waveform_epsilon(speech.trunk, key, large or default is not False)
    final_norm = {"final_norm": False} if large else {}
    return {"waveform_epsilon": epsilon, **final_norm} if large or default is not None else {}


def _image_inputs(image: config.Image, resize: Resize | None) -> dict[str, Any]:
    """Return mean and standard deviation of the pixels as in the training of a pretrained trunk.

    `data.resize` applies to training, evaluation and export alike, so it must equal that of the trunk's training.
    """
    if not image.trunk:
        return {}
    kind = IMAGE[image.architecture].kind
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
    without = ("trunk", "config", "filterbank", "lora_rank", "lora_alpha", "lora_targets")
    return {name: value for name, value in vars(encoder).items() if name not in without}


def _trunk_config(architecture: Architecture, values: dict[str, Any]) -> PretrainedConfig:
    """Create a transformers configuration from a section's values; unknown values are an error."""
    cls, key = architecture.config, architecture.kind.key.replace(".trunk", ".config")
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


def _check_heads(model: config.Model, speech: PretrainedConfig, vision: PretrainedConfig) -> None:
    """Raise an error if a number of attention heads does not divide its width."""
    for key, width, heads in (
        ("model.speech.config.num_attention_heads", speech.hidden_size, speech.num_attention_heads),
        ("model.image.config.num_attention_heads", vision.hidden_size, vision.num_attention_heads),
        ("model.speech.head_heads", speech.hidden_size, model.speech.head_heads if model.speech.head_layers else 1),
        ("model.image.head_heads", vision.hidden_size, model.image.head_heads if model.image.head_layers else 1),
        ("model.fusion.heads", model.fusion.width, model.fusion.heads),
    ):
        if heads < 1 or width % heads:
            raise UserError(f"{key}: {heads} does not divide the width {width}")
