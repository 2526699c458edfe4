"""The architectures of trunks: how each is recognized, built, called and adapted.

Another architecture is another entry; README.md in this folder says what it needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    HubertConfig,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from shards.errors import UserError
from toolkit.model.speech_trunks import WaveformTrunk, WavLMTrunk, WhisperTrunk
from toolkit.model.trunk import OUTSIDE, ModelKind, find_kind


@dataclass(frozen=True)
class Architecture:
    """What both kinds of trunks have.

    Attributes:
        kind: Saved models that it is loaded from.
        config: Class of its configuration.
        model: Class of its model.
        fixed: Values of the configuration that hold whatever a folder or the user says.
        lora: Last parts of the names of the linear layers that LoRA adapts by default.
        attention: Implementation of attention that transformers loads it with.
    """

    kind: ModelKind
    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    lora: tuple[str, ...] = ("q_proj", "v_proj")
    attention: str = "sdpa"


@dataclass(frozen=True)
class SpeechArchitecture(Architecture):
    """A speech trunk.

    Attributes:
        parts: Class that calls it part by part, made from the trunk.
        norm_waveform: Whether waveforms are normalized if the folder does not say it; None: if every convolution has a
            layer norm, and never else, whatever the folder says.
    """

    parts: Callable[..., Any] = WaveformTrunk
    norm_waveform: bool | None = None


@dataclass(frozen=True)
class ImageArchitecture(Architecture):
    """A vision trunk, whose child `embeddings` makes tokens of pixels.

    Attributes:
        layers: Path of the layers.
        final_norm: Name of the norm after the last layer.
        class_token: The first token is a class token; else the child `head` pools the patches.
        patches: Path of the convolution that embeds patches.
        sized: `embeddings` has to be told that positions are to be interpolated.
    """

    layers: str = "encoder.layers"
    final_norm: str = "post_layernorm"
    class_token: bool = True
    patches: str = "embeddings.patch_embedding"
    sized: bool = True


# SpecAugment is not used: without it, a trunk has no mask embedding that would never be trained. Neither is what is
# above the layers.
_NO_SPEC_AUGMENT = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
_WAV2VEC2 = {**_NO_SPEC_AUGMENT, "add_adapter": False}
_ENCODER = r"(model\.)?encoder\."


def _speech(name: str, *types: str) -> ModelKind:
    return ModelKind(name, "model.speech.trunk", types)


def _image(name: str, standalone: str, *containers: str, **more: Any) -> ModelKind:
    return ModelKind(name, "model.image.trunk", (standalone,), containers, **more)


SPEECH: dict[str, SpeechArchitecture] = {
    "hubert": SpeechArchitecture(_speech("HuBERT", "hubert"), HubertConfig, HubertModel, _NO_SPEC_AUGMENT),
    "wav2vec2": SpeechArchitecture(
        _speech("wav2vec 2.0", "wav2vec2"), Wav2Vec2Config, Wav2Vec2Model, _WAV2VEC2, norm_waveform=True
    ),
    "wavlm": SpeechArchitecture(
        _speech("WavLM", "wavlm"), WavLMConfig, WavLMModel, _WAV2VEC2, attention="eager", parts=WavLMTrunk,
        norm_waveform=False,
    ),
    "whisper": SpeechArchitecture(
        ModelKind(
            "Whisper", "model.speech.trunk", (), ("whisper",), {f"^(?!{_ENCODER})": OUTSIDE, f"^{_ENCODER}": ""}
        ),
        WhisperConfig, WhisperEncoder, parts=WhisperTrunk,
    ),
}  # fmt: skip
IMAGE: dict[str, ImageArchitecture] = {
    "clip": ImageArchitecture(
        _image("CLIP", "clip_vision_model", "clip", key_mapping={r"^(?!vision_model\.|visual_projection\.)": OUTSIDE}),
        CLIPVisionConfig, CLIPVisionModel,
    ),
    "blip2": ImageArchitecture(
        _image(
            "BLIP-2", "blip_2_vision_model", "blip-2",
            key_mapping={r"^(?!vision_model\.)": OUTSIDE, r"^vision_model\.": ""},
        ),
        Blip2VisionConfig, Blip2VisionModel, lora=("qkv",),
    ),
    "siglip": ImageArchitecture(
        _image("SigLIP", "siglip_vision_model", "siglip", key_mapping={r"^(?!vision_model\.)": OUTSIDE}),
        SiglipVisionConfig, SiglipVisionModel, class_token=False,
    ),
    "dinov2": ImageArchitecture(
        _image("DINOv2", "dinov2", unused=(".mask_token",)),
        Dinov2Config, Dinov2Model, {"use_mask_token": False}, layers="encoder.layer", final_norm="layernorm",
        lora=("q_proj", "v_proj", "query", "value"), patches="embeddings.patch_embeddings.projection", sized=False,
    ),
}  # fmt: skip
TRUNKS: dict[str, Architecture] = {
    model_type: each for table in (SPEECH, IMAGE) for each in table.values() for model_type in each.kind.types
}

Kind = TypeVar("Kind", bound=Architecture)


def lookup(table: Mapping[str, Kind], name: Any, key: str) -> Kind:
    """Return the entry of a table.

    Args:
        table: `SPEECH` or `IMAGE`.
        name: Name of the architecture.
        key: Where the name was read, for the error message.

    Raises:
        UserError: The table has no such entry.
    """
    if name not in table:
        raise UserError(f"{key}: unknown architecture {name!r}; known are {', '.join(table)}")
    return table[name]


def find_architecture(source: str, table: Mapping[str, Kind], default: str) -> str:
    """Return the name of a saved trunk's architecture.

    Args:
        source: Local folder or hub id.
        table: `SPEECH` or `IMAGE`.
        default: Name of the architecture if config.json does not say it.

    Raises:
        UserError: The source does not exist or is of no architecture of the table.
    """
    kind = find_kind(source, (each.kind for each in table.values()), table[default].kind)
    return next(name for name, each in table.items() if each.kind is kind)
