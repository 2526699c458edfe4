"""Counts of a micro-batch: pairs, speech, tokens and model FLOPs, computed from the lengths of its utterances alone.

Model FLOPs are counted as usual for utilization (PaLM, arXiv 2204.02311, appendix B): two for each multiply-add of
matrix products, convolutions and attention. Trained layers count three times, forward once and backward twice; frozen
layers and the teacher count once. Padding does not count (each utterance has its own length), and neither do
recomputation (activation checkpointing, the first forward pass with cached gradients) and the controls of a logged
step.
"""

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
from toolkit.training.learner import Learner

TRAINED = 3  # forward once, backward twice


@dataclass
class BatchStats:
    """Counts of one or more micro-batches of one rank.

    Attributes:
        pairs: Speech-image pairs.
        seconds: Seconds of speech, without padding.
        padded_seconds: Seconds of speech, with padding.
        frames: Speech frames, without padding.
        patches: Image patches.
        flops: Model FLOPs by part of the step, see this module.
    """

    pairs: int = 0
    seconds: float = 0.0
    padded_seconds: float = 0.0
    frames: int = 0
    patches: int = 0
    flops: dict[str, float] = field(default_factory=dict)

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
        """Read the sizes.

        Args:
            learner: The module that is trained.
            config: Configuration of the run.
            world_size: Number of ranks: keys and negatives come from all.
        """
        self.learner, self.objectives = learner, config.objectives
        micro_batches = config.training.accumulation if config.training.grad_cache else 1
        batch_keys = world_size * micro_batch(config, world_size) * micro_batches
        self.num_keys = batch_keys + config.objectives.contrastive.queue

    def count(self, batch: Batch, coarse: bool = False) -> BatchStats:
        """Count a micro-batch of this rank.

        Args:
            batch: The micro-batch.
            coarse: It trains SIC alone.
        """
        width = batch.waveforms.shape[1]
        host_lengths = batch.host_lengths or (width,) * len(batch.ids)
        lengths = np.array(host_lengths, dtype=np.int64)
        frames = count_frames(self.learner.model.speech, lengths)
        patches = count_patches(self.learner.model.image, batch.images.shape[-1])
        return BatchStats(
            pairs=len(lengths),
            seconds=float(lengths.sum()) / SAMPLE_RATE,
            padded_seconds=padded_length(host_lengths, self.learner.model.speech.groups) / SAMPLE_RATE,
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
        similarities = 2 * 2.0 * rows * self.num_keys * model.config.embed_dim
        teacher = objectives.momentum.enabled and not coarse
        soft_targets = bool(teacher and objectives.contrastive.alpha)
        parts = {
            "frozen trunks": frozen_speech + rows * frozen_image,
            "encoders": TRAINED * trained,
            "teacher": trained * teacher,
            "SIC": similarities * (TRAINED + soft_targets),
        }
        if objectives.matching.weight and not coarse:
            pooled = -(-frames // model.fusion.pool)
            once = float(fusion_flops(model.fusion, pooled, patches).sum()) + rows * 2.0 * model.fusion.width * 2
            parts["SIM"] = TRAINED * 3 * once  # the matching pair, a wrong picture, a wrong utterance
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
    config = encoder.trunk.config
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return lengths.clip(min=1)


def count_patches(encoder: ImageEncoder, image_size: int) -> int:
    """Count the patches of a square picture."""
    return (image_size // encoder.trunk.config.patch_size) ** 2


def speech_flops(encoder: SpeechEncoder, lengths: np.ndarray) -> tuple[float, float]:
    """Count the FLOPs of one forward pass over utterances without padding: of frozen and of trained layers."""
    config = encoder.trunk.config
    width, first = config.hidden_size, 1
    samples, embedding = lengths, np.zeros(len(lengths))
    for kernel, stride, size in zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True):
        samples = ((samples - kernel) // stride + 1).clip(min=1)
        embedding += 2.0 * samples * first * size * kernel
        first = size
    taps = config.num_conv_pos_embeddings
    shifted = samples + (taps % 2 == 0)  # an even kernel returns one more, which is cut off
    embedding += 2.0 * samples * first * width
    embedding += 2.0 * shifted * width * (width // config.num_conv_pos_embedding_groups) * taps
    layers = encoder.frozen_layers if encoder.frozen_layers is not None else 0
    each = float(_layer(config, samples).sum())
    frozen = 0.0 if encoder.frozen_layers is None else float(embedding.sum()) + layers * each
    trained = float(embedding.sum()) + config.num_hidden_layers * each - frozen
    return frozen, trained + float(_head(encoder.head, samples).sum())


def image_flops(encoder: ImageEncoder, patches: int) -> tuple[float, float]:
    """Count the FLOPs of one forward pass over a picture: of frozen and of trained layers."""
    config = encoder.trunk.config
    embedding = _patch_embedding(encoder, patches)
    layers, each = len(encoder.trunk.encoder.layers), float(_layer(config, patches + 1))
    frozen = 0.0 if encoder.frozen_layers is None else embedding + encoder.frozen_layers * each
    return frozen, embedding + layers * each - frozen + float(_head(encoder.head, patches))


def _patch_embedding(encoder: ImageEncoder, patches: int) -> float:
    stem, config = encoder.trunk.embeddings.patch_embedding, encoder.trunk.config
    if not isinstance(stem, ConvolutionalStem):
        return 2.0 * patches * config.hidden_size * 3 * config.patch_size**2
    convolutions = [module for module in stem if isinstance(module, nn.Conv2d)]
    places = [patches * 4**above for above in reversed(range(len(convolutions)))]
    return sum(2.0 * count * module.weight.numel() for count, module in zip(places, convolutions, strict=True))


def fusion_flops(encoder: FusionEncoder, queries: Any, context: Any) -> Any:
    """Count the FLOPs of one forward pass over query tokens and context tokens; 0 of the latter: without context."""
    width = encoder.width
    into, other = encoder.query_input[0].in_features, encoder.context_input[0].in_features
    total = 2.0 * width * (queries * into + context * other)
    tokens = queries + (encoder.class_token is not None)
    for depth in range(1, len(encoder.layers) + 1):
        last = encoder.class_token is not None and depth == len(encoder.layers)
        kept = 1 if last else tokens  # of the last layer only the class token is used
        attended = _attention(width, kept, tokens) + np.where(context, _attention(width, kept, context), 0)
        total = total + attended + 2.0 * kept * 8 * width**2
    return total


def _layer(config: Any, tokens: Any) -> Any:
    """FLOPs of a layer of a trunk: self-attention and feed-forward."""
    width = config.hidden_size
    return _attention(width, tokens, tokens) + 2.0 * tokens * 2 * width * config.intermediate_size


def _head(head: Head, tokens: Any) -> Any:
    """FLOPs of transformer layers with a class token, and of the projection."""
    width, tokens = head.project.in_features, tokens + 1
    projection = 2.0 * width * head.project.out_features
    return len(head.layers) * (_attention(width, tokens, tokens) + 2.0 * tokens * 8 * width**2) + projection


def _attention(width: int, queries: Any, keys: Any) -> Any:
    """FLOPs of the projections of queries, output, keys and values, and of the two products between them."""
    return 2.0 * width**2 * (2 * queries + 2 * keys) + 2 * 2.0 * queries * keys * width
