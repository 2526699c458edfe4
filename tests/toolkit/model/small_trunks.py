"""Small trunks of every architecture with random weights, as transformers writes them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from tests.tiny import HUBERT, VIT, tiny_model
from toolkit.config import schema as config

BASE = {**HUBERT, "feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
WHISPER: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
WHISPER |= {"num_mel_bins": 32, "max_source_positions": 50}  # windows of one second
DECODER: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "vocab_size": 60}
DECODER |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}

SPEECH = {
    "wav2vec2-base": ("wav2vec2", lambda: Wav2Vec2Model(Wav2Vec2Config(**BASE))),
    "wav2vec2-large": ("wav2vec2", lambda: Wav2Vec2Model(Wav2Vec2Config(**HUBERT))),
    "wav2vec2-ctc": ("wav2vec2", lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**HUBERT, vocab_size=12))),
    "wavlm-base": ("wavlm", lambda: WavLMModel(WavLMConfig(**BASE, num_buckets=8, max_bucket_distance=20))),
    "wavlm-large": ("wavlm", lambda: WavLMModel(WavLMConfig(**HUBERT))),
    "whisper": ("whisper", lambda: WhisperModel(WhisperConfig(**WHISPER, **DECODER))),
    "whisper-generation": ("whisper", lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER, **DECODER))),
}
IMAGE = {
    "siglip-vision": ("siglip", lambda: SiglipVisionModel(SiglipVisionConfig(**VIT))),
    "siglip": ("siglip", lambda: SiglipModel(SiglipConfig(vision_config=VIT, text_config=TEXT))),
    "dinov2": ("dinov2", lambda: Dinov2Model(Dinov2Config(**DINO, layerscale_value=0.5))),
    "dinov2-swiglu": ("dinov2", lambda: Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=True))),
    "dinov2-classes": ("dinov2", lambda: Dinov2ForImageClassification(Dinov2Config(**DINO))),
}
RANDOM = {  # configuration of random weights by architecture
    "wav2vec2": HUBERT, "wavlm": HUBERT, "whisper": WHISPER, "siglip": VIT, "dinov2": DINO,
}  # fmt: skip


def side_of(name: str) -> str:
    return "speech" if name in SPEECH or name.startswith("hubert") else "image"


def write_trunk(name: str, folder: Path) -> PreTrainedModel:
    """Save a model; its biases are random, since zeros would hide how inputs are scaled."""
    torch.manual_seed(5)
    model = (SPEECH | IMAGE)[name][1]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "gru_rel_pos_const", "cls_token")):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def with_trunk(name: str, folder: Path, train: str = "none") -> config.Model:
    """A tiny model with one of these trunks."""
    settings = tiny_model()
    side = getattr(settings, side_of(name))
    side.trunk, side.train, side.config = str(folder), train, {}
    return settings


def with_random(architecture: str, train: str = "all") -> config.Model:
    """A tiny model with an architecture and random weights."""
    settings = tiny_model()
    side: Any = settings.image if architecture in ("siglip", "dinov2") else settings.speech
    side.architecture, side.config, side.train = architecture, dict(RANDOM[architecture]), train
    return settings
