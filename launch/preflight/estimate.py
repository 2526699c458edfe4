"""Estimate of a run's memory and disk from the configuration, without torch: every submission is checked by it.

The parameters are counted exactly. To build the model on torch's meta device instead takes 4 s and 390 MB for imports
alone, a submission 0.4 s and 45 MB. Activations, which depend on the lengths of the captions, and the libraries'
buffers are not in the estimate.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolkit.config.schema import Config, Image, Model, Speech

CONV_STRIDE = [5, 2, 2, 2, 2, 2, 2]  # of HuBERT's convolutions
THIRDS, GRID = 3, 16  # positions that a head without layers pools
# Defaults of transformers.
HUBERT: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_bias": False, "feat_extract_norm": "group",
    "do_stable_layer_norm": False, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
}  # fmt: skip
SPEECH: dict[str, dict[str, Any]] = {
    "hubert": HUBERT | {"feat_proj_layer_norm": True},
    "wav2vec2": HUBERT,
    "wavlm": HUBERT | {"num_buckets": 320},
    "whisper": {
        "d_model": 384, "encoder_layers": 4, "encoder_ffn_dim": 1536, "num_mel_bins": 80, "max_source_positions": 1500,
    },
}  # fmt: skip
_VIT: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "image_size": 224}
VISION: dict[str, dict[str, Any]] = {
    "clip": _VIT | {"patch_size": 32},
    "blip2": {
        "hidden_size": 1408, "num_hidden_layers": 39, "intermediate_size": 6144, "image_size": 224, "patch_size": 14,
        "qkv_bias": True,
    },
    "siglip": _VIT | {"patch_size": 16, "vision_use_head": True},
    "dinov2": {
        "hidden_size": 768, "num_hidden_layers": 12, "mlp_ratio": 4, "use_swiglu_ffn": False, "qkv_bias": True,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip
# Inputs and outputs of a layer's linear layers by name, for LoRA: w as many as a token's, i as the feed-forward's.
LINEAR = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "query", "key", "value", "projection"), "ww"),
    **dict.fromkeys(("fc1", "intermediate_dense", "gate_proj", "up_proj"), "wi"),
    **dict.fromkeys(("fc2", "output_dense", "down_proj"), "iw"),
    "qkv": "wwww",
}
# Published trunks by their hub id, so that they are counted before they are downloaded.
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
KNOWN: dict[str, dict[str, Any]] = {
    "facebook/hubert-base-ls960": {},
    "facebook/hubert-large-ll60k": {
        **_LARGE, "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True
    },
    "openai/clip-vit-base-patch32": {},
    "openai/clip-vit-base-patch16": {"patch_size": 16},
    "openai/clip-vit-large-patch14": {**_LARGE, "patch_size": 14},
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    total: int
    trained: int
    encoders: int  # trained parameters of the two encoders, which the teacher averages


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank during training, and of a checkpoint."""

    weights: float
    gradients: float
    optimizer: float  # float32 weights, if they are kept in addition to the model's, and two moments
    teacher: float
    queue: float
    checkpoint: float
    export: float

    @property
    def rank(self) -> float:
        """Sum of a rank's parts."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.queue


def count(config: Config) -> Counts | None:
    """Count the parameters; None if a trunk is neither on this machine nor a known one."""
    speech, image = trunk_values(config.model.speech), trunk_values(config.model.image)
    if speech is None or image is None:
        return None
    encoders = [*_speech(config.model, speech), *_image(config.model, image)]
    widths = {"speech": speech["hidden_size"], "image": image["hidden_size"]}
    rest = [*_fusion_and_denoisers(config, widths), (1, config.objectives.contrastive.learn_temperature)]
    return Counts(
        total=sum(size for size, _ in encoders + rest),
        trained=sum(size for size, trained in encoders + rest if trained),
        encoders=sum(size for size, trained in encoders if trained),
    )


def estimate(config: Config, counts: Counts, ranks: int) -> Memory:
    """Estimate bytes by part, for the configuration's ZeRO stage and precision."""
    training, stage = config.training, config.training.zero_stage
    width = 2 if training.precision == "bf16" else 4
    sharded = ranks if stage >= 1 else 1
    own_masters = training.precision == "bf16" or stage >= 1  # in float32 at stage 0 the weights themselves
    teacher = 0.0
    averages = 4 * counts.encoders if config.objectives.momentum.enabled else 0
    if averages:
        teacher = averages / sharded + (width * counts.encoders if own_masters else 0)
    queue = config.objectives.contrastive.queue * (2 * 4 * config.model.embed_dim + 8)
    keys, tokens = _token_queue(config, width)
    on_device = tokens / ranks if config.objectives.matching.queue_on == "device" else 0
    return Memory(
        weights=width * counts.total / (ranks if stage == 3 else 1),
        gradients=width * counts.trained / (ranks if stage >= 2 else 1),
        optimizer=(4 * own_masters + 8) * counts.trained / sharded,
        teacher=teacher,
        queue=queue + keys + on_device,
        checkpoint=12 * counts.trained + averages + queue + keys + tokens,
        export=width * counts.total,
    )


def _token_queue(config: Config, width: int) -> tuple[int, int]:
    """Return the bytes of the keys of SIM's queue, which every rank has, and of its tokens, which the ranks share."""
    from shards.media.audio import SAMPLE_RATE

    matching, micro = config.objectives.matching, config.training.batch_size // config.training.accumulation
    speech, image = trunk_values(config.model.speech), trunk_values(config.model.image)
    if not (matching.weight and matching.queue and speech and image):
        return 0, 0
    frames = int(config.data.max_seconds * SAMPLE_RATE)
    if config.model.speech.mel_bins:
        frames = (frames - 400) // 160 + 1  # windows of 25 ms, every 10 ms
    if speech["architecture"] == "whisper":
        frames = -(-frames // 320)
    else:
        for kernel, stride in zip(speech["conv_kernel"], speech.get("conv_stride", CONV_STRIDE), strict=False):
            frames = (frames - kernel) // stride + 1
    patches = (config.data.image_size // image["patch_size"]) ** 2
    pairs = matching.queue // micro * micro
    tokens = width * (frames * speech["hidden_size"] + patches * image["hidden_size"]) + frames
    return pairs * (2 * 4 * config.model.embed_dim + 8), pairs * tokens


def trunk_values(encoder: Speech | Image) -> dict[str, Any] | None:
    """Return a trunk's configuration with defaults: from ours, a folder's, or that of a known hub id.

    Whisper's sizes have the names of the others', and "architecture" names the architecture.
    """
    table = SPEECH if isinstance(encoder, Speech) else VISION
    if not encoder.trunk:
        return _complete(table, encoder.architecture, encoder.config)
    for folder in (Path(encoder.trunk).expanduser(), *_downloaded(encoder.trunk)):
        try:
            values = json.loads((folder / "config.json").read_text())
            architecture = _architecture(table, str(values.get("model_type"))) or encoder.architecture
            return _complete(table, architecture, values.get("vision_config", values))
        except (OSError, ValueError, AttributeError):
            continue
    known = KNOWN.get(encoder.trunk)
    return None if known is None else _complete(table, encoder.architecture, known)


def _complete(table: dict[str, dict[str, Any]], architecture: str, values: dict[str, Any]) -> dict[str, Any]:
    values = {**table[architecture], **values, "architecture": architecture}
    if architecture == "whisper":
        values |= {"hidden_size": values["d_model"], "num_hidden_layers": values["encoder_layers"]}
        values["intermediate_size"] = values["encoder_ffn_dim"]
    if architecture == "dinov2":
        inner = int(values["hidden_size"] * values["mlp_ratio"])
        swiglu = (int(inner * 2 / 3) + 7) // 8 * 8
        values["intermediate_size"] = swiglu if values["use_swiglu_ffn"] else inner
    return values


def _architecture(table: dict[str, dict[str, Any]], model_type: str) -> str | None:
    """Name of an architecture of the table by `model_type`, such as clip_vision_model or blip-2."""
    plain = model_type.replace("-", "").replace("_", "")
    return next((name for name in table if plain.startswith(name)), None)


def _downloaded(name: str) -> Iterator[Path]:
    """Yield the folders of a model in the hub's cache."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    yield from sorted(cache.glob(f"models--{name.replace('/', '--')}/snapshots/*"))


Sizes = list[tuple[int, bool]]  # numbers of parameters, and whether they are trained


def _speech(model: Model, trunk: dict[str, Any]) -> Sizes:
    speech, width, layers = model.speech, trunk["hidden_size"], trunk["num_hidden_layers"]
    frozen = None if speech.train == "all" else layers - (0 if speech.train == "none" else int(speech.train))
    below = frozen is None
    layer = _layer(width, trunk["intermediate_size"])
    if trunk["architecture"] == "whisper":
        inputs = [(3 * width * (trunk["num_mel_bins"] + width) + 2 * width, below)]
        inputs += [(trunk["max_source_positions"] * width, False)]
        layer -= width  # keys have no bias
        top_norm = frozen != layers
    else:
        inputs = [(_convolutions(trunk, speech.mel_bins or 1), below)]
        large = trunk["do_stable_layer_norm"] and trunk["feat_extract_norm"] == "layer"
        top_norm = below if not trunk["do_stable_layer_norm"] else frozen != layers and not (large and speech.trunk)
    if trunk["architecture"] == "wavlm":
        heads = trunk["num_attention_heads"]
        layer += (0 if speech.lora_rank else heads) + _linear(width // heads, 8)
        inputs += [(trunk["num_buckets"] * heads, below or frozen == 0)]  # of the first layer
    return [
        *inputs,
        (2 * width, top_norm),
        *((layer, below or depth >= (frozen or 0)) for depth in range(layers)),
        (layers * _lora(speech, trunk), True),
        (layers + 1, True),  # the layer mix
        (_head(width, model.embed_dim, speech.head_layers, THIRDS if speech.pool == "thirds" else 1), True),
    ]


def _convolutions(trunk: dict[str, Any], channels_in: int) -> int:
    """Count the convolutions over the waveform or its spectrogram, their projection and the positional convolution."""
    width, kernels, channels = trunk["hidden_size"], trunk["conv_kernel"], trunk["conv_dim"]
    convolutions = sum(
        before * after * kernel + after * bool(trunk["conv_bias"])
        for before, after, kernel in zip([channels_in, *channels], channels, kernels, strict=False)
    )
    norms = 2 * (sum(channels) if trunk["feat_extract_norm"] == "layer" else channels[0])
    projection = _linear(channels[-1], width) + (2 * channels[-1] if trunk.get("feat_proj_layer_norm", True) else 0)
    taps = trunk["num_conv_pos_embeddings"]
    positions = width * (width // trunk["num_conv_pos_embedding_groups"]) * taps + taps + width
    return convolutions + norms + projection + positions


def _image(model: Model, trunk: dict[str, Any]) -> Sizes:
    image, inner = model.image, trunk["intermediate_size"]
    width, layers = trunk["hidden_size"], trunk["num_hidden_layers"]
    frozen = None if image.train == "all" else layers - (0 if image.train == "none" else int(image.train))
    below, architecture = frozen is None, trunk["architecture"]
    clip, class_token, patch = architecture == "clip", architecture != "siglip", trunk["patch_size"]
    places = (trunk["image_size"] // patch) ** 2 + class_token
    projection = 3 * patch * patch * width + (0 if clip else width)
    tokens = class_token * width + places * width
    embeddings = tokens + (_stem(width, patch) if image.stem == "convolutions" else projection)
    layer = _layer(width, inner) - (0 if trunk.get("qkv_bias", True) else 3 * width)
    if architecture == "dinov2":
        layer += 2 * width + (_linear(width, inner) if trunk["use_swiglu_ffn"] else 0)
    pools = architecture == "siglip" and trunk["vision_use_head"] and image.pool == "class" and not image.head_layers
    pooling = width + 4 * _linear(width, width) + 2 * width + _linear(width, inner) + _linear(inner, width)
    return [
        (embeddings + (2 * width if clip else 0), below),
        *((layer, below or depth >= (frozen or 0)) for depth in range(layers)),
        (2 * width, frozen != layers),
        (pooling * pools, frozen != layers or image.lora_rank > 0),
        (layers * _lora(image, trunk), True),
        (_head(width, model.embed_dim, image.head_layers, GRID if image.pool == "grid" else 1), True),
    ]


def _lora(encoder: Speech | Image, trunk: dict[str, Any]) -> int:
    """Count LoRA's weights of a layer; by default it adapts queries and values."""
    targets = encoder.lora_targets or (["qkv"] if trunk["architecture"] == "blip2" else ["q_proj", "v_proj"])
    widths = {"w": trunk["hidden_size"], "i": trunk["intermediate_size"]}
    return encoder.lora_rank * sum(widths[side] for name in targets for side in LINEAR.get(name, ""))


def _stem(width: int, patch: int) -> int:
    """Count convolutions of 3 x 3 whose width doubles from a quarter to the trunk's; all but the last have a norm."""
    widths = [3, *(min(width >> 2 << step, width) for step in range(patch.bit_length() - 2)), width]
    return sum(9 * narrow * wide for narrow, wide in pairwise(widths)) + 2 * sum(widths[1:-1])


def _fusion_and_denoisers(config: Config, widths: dict[str, int]) -> Sizes:
    fusion, denoising = config.model.fusion, config.objectives.denoising
    matching = _fusion(widths["speech"], widths["image"], fusion.width, fusion.layers) + fusion.width
    sizes = [(matching + _linear(fusion.width, 2), True)]
    sides = {"both": ["image", "speech"]}.get(denoising.side, [denoising.side]) if denoising.weight else []
    for side in sides:
        other = "image" if side == "speech" else "speech"
        denoiser = _fusion(widths[side], widths[other], fusion.width, denoising.layers)
        sizes.append((denoiser + _linear(fusion.width, widths[side]), True))
    return sizes


def _linear(before: int, after: int) -> int:
    return before * after + after


def _layer(width: int, inner: int) -> int:
    """Count a transformer layer of a trunk: attention, two linear layers, two norms."""
    return 4 * _linear(width, width) + _linear(width, inner) + _linear(inner, width) + 4 * width


def _head(width: int, embed_dim: int, layers: int, places: int) -> int:
    if not layers:
        return _linear(places * width, embed_dim)
    return width + layers * _layer(width, 4 * width) + 2 * width + _linear(width, embed_dim)


def _fusion(query: int, context: int, width: int, layers: int) -> int:
    """Count a fusion encoder without class token: two inputs with norms, layers with cross-attention, the last norm."""
    layer = _layer(width, 4 * width) + 4 * _linear(width, width) + 2 * width
    return _linear(query, width) + _linear(context, width) + 4 * width + layers * layer + 2 * width
