"""Counts of a micro-batch: pairs, speech, tokens and model FLOPs, computed from the lengths of its utterances alone.

Model FLOPs are counted as usual for utilization (PaLM, arXiv 2204.02311, appendix B): two for each multiply-add of
matrix products, convolutions and attention. Trained layers count three times, forward once and backward twice; frozen
layers and the teacher count once. The weights that LoRA adapts count twice, because they have no gradient. Padding does
not count (each utterance has its own length; Whisper's window does), and neither do
recomputation (activation checkpointing, the first forward pass with cached gradients) and the controls of a logged
step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from shards.length_groups import padded_length
from shards.media.audio import SAMPLE_RATE
from shards.reading.dataset import Batch
from toolkit.config.schema import Config, micro_batch
from toolkit.model.fusion import Denoiser, FusionEncoder
from toolkit.model.image import ConvolutionalStem, ImageEncoder
from toolkit.model.layers import Head
from toolkit.model.speech import SpeechEncoder
from toolkit.model.speech_trunks import WhisperTrunk
from toolkit.training.learner import Learner

TRAINED = 3  # forward once, backward twice


@dataclass
class BatchStats:
    """Counts of one or more micro-batches of one rank."""

    pairs: int = 0  # speech-image pairs
    seconds: float = 0.0  # seconds of speech, without padding
    padded_seconds: float = 0.0  # seconds of speech, with padding
    frames: int = 0  # speech frames, without padding
    patches: int = 0  # image patches
    flops: dict[str, float] = field(default_factory=dict)  # model FLOPs by part of the step, see this module

    def add(self, other: "BatchStats") -> None:
        """Add the counts of other micro-batches."""
        self.pairs += other.pairs
        self.seconds += other.seconds
        self.padded_seconds += other.padded_seconds
        self.frames += other.frames
        self.patches += other.patches
        for part, flops in other.flops.items():
            self.flops[part] = self.flops.get(part, 0.0) + flops

    @property
    def tokens(self) -> int:
        """Speech frames and patches."""
        return self.frames + self.patches

    @property
    def total_flops(self) -> float:
        """Model FLOPs of all parts."""
        return sum(self.flops.values())


class FlopCounter:
    """Counts micro-batches, on the host; about a quarter of a millisecond each."""

    def __init__(self, learner: Learner, config: Config, world_size: int) -> None:
        """Read the sizes; keys and negatives come from all ranks."""
        self.learner, self.objectives = learner, config.objectives
        micro_batches = config.training.accumulation if config.training.grad_cache else 1
        batch_keys = world_size * micro_batch(config, world_size) * micro_batches
        self.num_keys = batch_keys + config.objectives.contrastive.queue

    def count(self, batch: Batch, coarse: bool = False) -> BatchStats:
        """Count a micro-batch of this rank; a coarse one trains SIC alone."""
        width = batch.waveforms.shape[1]
        host_lengths = batch.host_lengths or (width,) * len(batch.ids)
        lengths = np.array(host_lengths, dtype=np.int64)
        frames = count_frames(self.learner.model.speech, lengths)
        patches = count_patches(self.learner.model.image, batch.images.shape[-1])
        return BatchStats(
            pairs=len(lengths),
            seconds=float(lengths.sum()) / SAMPLE_RATE,
            padded_seconds=_padded_samples(self.learner.model.speech, host_lengths) / SAMPLE_RATE,
            frames=int(frames.sum()),
            patches=patches * len(lengths),
            flops=self.flops(lengths, patches, coarse),
        )

    def flops(self, lengths: np.ndarray, patches: int, coarse: bool = False) -> dict[str, float]:
        """Count model FLOPs by part of the step.

        Args:
            lengths: int64 [B], samples of the utterances.
            patches: Patches of a picture.
            coarse: The step trains SIC alone.
        """
        model, objectives = self.learner.model, self.objectives
        rows, frames = len(lengths), count_frames(model.speech, lengths)
        frozen_speech, speech = speech_flops(model.speech, lengths)
        frozen_image, image = image_flops(model.image, patches)
        trained = speech + rows * image
        unneeded_gradients = adapted_flops(model.speech, _trunk_tokens(model.speech, lengths).sum())
        unneeded_gradients += adapted_flops(model.image, rows * (patches + model.image.architecture.class_token))
        similarities = 2 * 2.0 * rows * self.num_keys * model.config.embed_dim
        teacher = objectives.momentum.enabled and not coarse
        soft_targets = bool(teacher and objectives.contrastive.alpha)
        parts = {
            "frozen trunks": frozen_speech + rows * frozen_image,
            "encoders": TRAINED * trained - unneeded_gradients,
            "teacher": trained * teacher,
            "SIC": similarities * (TRAINED + soft_targets),
        }
        if objectives.matching.weight and not coarse:
            pooled = -(-frames // model.fusion.pool)
            once = float(fusion_flops(model.fusion, pooled, patches).sum()) + rows * 2.0 * model.fusion.width * 2
            parts["SIM"] = TRAINED * 3 * once  # the matching pair, a negative picture, a negative utterance
        if objectives.denoising.weight and not coarse:
            parts["CMD"] = 0.0
            for side, denoiser in self.learner.denoisers.items():
                assert isinstance(denoiser, Denoiser)
                own, other = (frames, patches) if side == "speech" else (np.full(rows, patches), frames)
                predict = 2.0 * own * denoiser.predict.in_features * denoiser.predict.out_features
                parts["CMD"] += TRAINED * float((fusion_flops(denoiser.fusion, own, other) + predict).sum())
        return {part: flops for part, flops in parts.items() if flops}


def count_frames(encoder: SpeechEncoder, lengths: np.ndarray) -> np.ndarray:
    """Count the frames of utterances, given their samples; int64 [B], at least 1."""
    return encoder.calls.frames(lengths).clip(min=1)


def count_patches(encoder: ImageEncoder, image_size: int) -> int:
    """Count the patches of a square picture."""
    return (image_size // encoder.trunk.config.patch_size) ** 2


def speech_flops(encoder: SpeechEncoder, lengths: np.ndarray) -> tuple[float, float]:
    """Count the FLOPs of one forward pass over utterances without padding: of frozen and of trained layers."""
    width, tokens = encoder.token_dim, _trunk_tokens(encoder, lengths)
    embedding = float(_speech_embedding(encoder, lengths, tokens).sum())
    each = float(_layer(encoder.parts.layers[0], width, tokens).sum())
    frozen = 0.0 if encoder.frozen_layers is None else embedding + encoder.frozen_layers * each
    trained = embedding + encoder.layers * each - frozen
    return frozen, trained + float(_head(encoder.head, count_frames(encoder, lengths)).sum())


def image_flops(encoder: ImageEncoder, patches: int) -> tuple[float, float]:
    """Count the FLOPs of one forward pass over a picture: of frozen and of trained layers."""
    tokens = patches + encoder.architecture.class_token
    embedding, each = _patch_embedding(encoder, patches), float(_layer(encoder.layers[0], encoder.token_dim, tokens))
    frozen = 0.0 if encoder.frozen_layers is None else embedding + encoder.frozen_layers * each
    trained = embedding + len(encoder.layers) * each - frozen + float(_head(encoder.head, patches))
    if not encoder.has_pooling:
        return frozen, trained
    pooling = float(_attention(encoder.token_dim, 1, tokens)) + 2.0 * _linear_weights(encoder.trunk.head.mlp)
    all_frozen = encoder.frozen_layers == len(encoder.layers)
    return (frozen + pooling, trained) if all_frozen else (frozen, trained + pooling)


def adapted_flops(encoder: SpeechEncoder | ImageEncoder, tokens: float) -> float:
    """Count the FLOPs of the weight gradients that frozen layers with LoRA do not need, over some tokens."""
    if not encoder.lora:
        return 0.0
    layers = encoder.parts.layers if isinstance(encoder, SpeechEncoder) else encoder.layers
    return 2.0 * tokens * len(layers) * _linear_weights(layers[0], without="lora_")


def _padded_samples(encoder: SpeechEncoder, lengths: Sequence[int]) -> float:
    if isinstance(encoder.calls, WhisperTrunk):
        window: int = encoder.calls.window
        return len(lengths) * -(-max(lengths) // window) * window
    return padded_length(lengths, encoder.groups)


def _trunk_tokens(encoder: SpeechEncoder, lengths: np.ndarray) -> np.ndarray:
    """Frames that the trunk's layers compute for each utterance; Whisper's are those of a window."""
    if isinstance(encoder.calls, WhisperTrunk):
        return np.full_like(lengths, encoder.trunk.config.max_source_positions)
    return count_frames(encoder, lengths)


def _speech_embedding(encoder: SpeechEncoder, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of what is before the layers, of each utterance."""
    config, width = encoder.trunk.config, encoder.token_dim
    if isinstance(encoder.calls, WhisperTrunk):
        return 2.0 * tokens * 3 * width * (2 * config.num_mel_bins + width)
    first, samples, embedding = 1, lengths, np.zeros(len(lengths))
    if encoder.calls.mel_bins:  # the spectrogram itself is left out
        first, samples = encoder.calls.mel_bins, encoder.calls.frames(lengths, stop=1)
    for kernel, stride, size in zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True):
        samples = ((samples - kernel) // stride + 1).clip(min=1)
        embedding += 2.0 * samples * first * size * kernel
        first = size
    taps = config.num_conv_pos_embeddings
    shifted = samples + (taps % 2 == 0)  # an even kernel returns one more, which is cut off
    embedding += 2.0 * samples * first * width
    return embedding + 2.0 * shifted * width * (width // config.num_conv_pos_embedding_groups) * taps


def _patch_embedding(encoder: ImageEncoder, patches: int) -> float:
    stem, config = encoder.patch_embedding, encoder.trunk.config
    if not isinstance(stem, ConvolutionalStem):
        return 2.0 * patches * config.hidden_size * 3 * config.patch_size**2
    convolutions = [module for module in stem if isinstance(module, nn.Conv2d)]
    counts = [patches * 4**above for above in reversed(range(len(convolutions)))]
    return sum(2.0 * count * module.weight.numel() for count, module in zip(counts, convolutions, strict=True))


def fusion_flops(encoder: FusionEncoder, queries: Any, context: Any) -> Any:
    """Count the FLOPs of one forward pass over query tokens and context tokens; 0 of the latter: without context."""
    width = encoder.width
    query_dim, context_dim = encoder.query_input[0].in_features, encoder.context_input[0].in_features
    total = 2.0 * width * (queries * query_dim + context * context_dim)
    tokens = queries + (encoder.class_token is not None)
    for depth in range(1, len(encoder.layers) + 1):
        last = encoder.class_token is not None and depth == len(encoder.layers)
        kept = 1 if last else tokens  # of the last layer only the class token is used
        attended = _attention(width, kept, tokens) + np.where(context, _attention(width, kept, context), 0)
        total = total + attended + 2.0 * kept * 8 * width**2
    return total


def _layer(layer: nn.Module, width: int, tokens: Any) -> Any:
    """FLOPs of a layer of a trunk, all of which are alike: linear layers, and the two products of self-attention."""
    return 2.0 * tokens * _linear_weights(layer) + 2 * 2.0 * tokens * tokens * width


def _linear_weights(layer: nn.Module, without: str = "") -> int:
    """Weights that a token meets in linear layers; `without`: only those whose names do not contain it."""
    total = 0
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not (without and without in name):
            each = module.in_features * module.out_features
            if name.endswith("gru_rel_pos_linear"):  # WavLM's, which every head of a token meets
                attention: Any = layer.get_submodule("attention")
                each *= attention.num_heads
            total += each
    return total


def _head(head: Head, tokens: Any) -> Any:
    """FLOPs of transformer layers with a class token, and of the projection."""
    width, tokens = head.project.in_features, tokens + 1
    projection = 2.0 * width * head.project.out_features
    return len(head.layers) * (_attention(width, tokens, tokens) + 2.0 * tokens * 8 * width**2) + projection


def _attention(width: int, queries: Any, keys: Any) -> Any:
    """FLOPs of the projections of queries, output, keys and values, and of the two products between them."""
    return 2.0 * width**2 * (2 * queries + 2 * keys) + 2 * 2.0 * queries * keys * width
