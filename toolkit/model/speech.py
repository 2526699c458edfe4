"""Speech encoder: trunk, softmax-weighted mix of its hidden states, and head."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.length_groups import group_by_length
from toolkit.model.architectures import TRUNKS, SpeechArchitecture
from toolkit.model.layers import Head
from toolkit.model.outputs import Encoded, Features, concatenate
from toolkit.model.speech_trunks import Parts
from toolkit.model.trunk import PartlyFrozen, trained_layers

THIRDS = 3


class LayerMix(nn.Module):
    """Sum of hidden states weighted by the softmax of learned weights, initialized to zero (as in SpeechCLIP)."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Mix n states [B, L, H] into one."""
        weights = self.weights.float().softmax(dim=0).to(states[0].dtype)
        mixed = states[0] * weights[0]
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed = mixed + state * weight
        return mixed


class SpeechEncoder(PartlyFrozen):
    """Encode utterances as one embedding and a sequence of frame features each.

    The waveform of a layer-norm trunk (HuBERT-large) is normalized to zero mean and unit variance per utterance, and
    its hidden states are layer-normed before the mix, as in SpeechCLIP large (arXiv 2210.00705). The encoding of an
    utterance does not depend on the others in its batch: padding is excluded from the waveform's statistics, the group
    norm of HuBERT-base (see `toolkit/model/masked_group_norm.py`), the positional convolution, attention and pooling.

    Args:
        trunk: A model of `architectures.SPEECH`; its parts are called one by one, never its `forward`.
        embed_dim: Size of the embedding.
        train: "none", "all" or the number of top layers that are trained. Frozen parts stay in eval mode.
        head_layers: Transformer layers of the head; 0: pooling and a linear projection.
        head_heads: Attention heads of the head's layers.
        dropout: Dropout of the head.
        groups: Number of groups of similar length that a batch is encoded in.
        pool: Pooling without head layers: the "mean" of the frames, or the concatenated means over the "thirds" of an
            utterance, so that the embedding keeps coarse word order.
        waveform_epsilon: Added to the variance when the waveform is normalized; None: the waveform is not normalized,
            as always for HuBERT-base.
        mel_bins: Convolve a log-mel spectrogram of so many bins in place of the waveform; 0: the waveform.
        final_norm: Apply the final norm of a layer-norm trunk to its last state, before the norm that all states get.
            False as in SpeechCLIP: the final norm is not used.
    """

    def __init__(
        self,
        trunk: nn.Module,
        embed_dim: int,
        train: str,
        head_layers: int,
        head_heads: int,
        dropout: float,
        groups: int = 1,
        pool: str = "mean",
        waveform_epsilon: float | None = 1e-7,
        final_norm: bool = True,
        mel_bins: int = 0,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        config = self.trunk.config
        architecture = TRUNKS[config.model_type]
        assert isinstance(architecture, SpeechArchitecture)
        self.calls = architecture.parts(trunk, mel_bins) if mel_bins else architecture.parts(trunk)
        self.groups = groups
        self.normed = self.calls.normed
        self.epsilon = waveform_epsilon if self.normed or architecture.norm_waveform is not None else None
        self.final_norm = final_norm and self.calls.pre_norm
        self.layers = len(self.parts.layers)
        trained = trained_layers(train, self.layers, "model.speech.train")
        self.frozen_layers = None if trained is None else self.layers - trained
        self.mix = LayerMix(self.layers + 1)
        self.pool = pool
        segments = THIRDS if pool == "thirds" else 1
        self.head = Head(config.hidden_size, embed_dim, head_layers, head_heads, dropout, segments)
        self.freeze()

    @property
    def token_dim(self) -> int:
        """Size of a frame feature."""
        return self.trunk.config.hidden_size

    @property
    def parts(self) -> Parts:
        """The trunk's modules."""
        return self.calls.parts(self.trunk)

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that are never trained, from the input up."""
        parts = self.parts
        yield from parts.fixed
        if parts.norm is not None and not self.final_norm:  # not used
            yield parts.norm
        if self.frozen_layers is None:
            return
        yield from parts.inputs
        if parts.norm is not None and self.frozen_layers == self.layers:
            yield parts.norm
        yield from parts.layers[: self.frozen_layers]

    def inputs_and_layers(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList]:
        """Return the trunk's modules before its layers, and its layers."""
        return self.parts.inputs, self.parts.layers

    def shared_modules(self) -> Iterator[nn.Module]:
        """Yield modules with frozen weights only that the trained part calls, which student and teacher share."""
        yield from super().shared_modules()
        for module in (*self.parts.fixed, *self.parts.everywhere):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                yield module

    @torch.no_grad()
    def frozen_features(
        self, waveforms: Tensor, lengths: Tensor, host_lengths: Sequence[int] | None = None
    ) -> tuple[Features, ...]:
        """Run the frozen part of the trunk; if nothing is frozen, only normalize the waveforms.

        Args:
            waveforms: [B, T] in [-1, 1], 16 kHz, zero-padded.
            lengths: Int64 [B], in samples.
            host_lengths: The lengths as ints, by which the batch is split into `groups` of similar length, each padded
                to its own longest utterance (see `shards/length_groups.py`); None: one group.

        Returns:
            Features of each group.
        """
        if self.groups == 1 or host_lengths is None:
            return (self._frozen(waveforms, lengths),)
        grouped = group_by_length(host_lengths, self.groups)
        # One asynchronous copy to the device.
        order = torch.from_numpy(np.concatenate(grouped))
        order = order.pin_memory().to(lengths.device, non_blocking=True) if lengths.is_cuda else order
        parts = []
        for rows, host_rows in zip(order.split([len(group) for group in grouped]), grouped, strict=True):
            waves = waveforms[rows, : host_lengths[int(host_rows[-1])]]
            parts.append(replace(self._frozen(waves, lengths[rows]), rows=rows))
        return tuple(parts)

    def _frozen(self, waveforms: Tensor, lengths: Tensor) -> Features:
        inputs, mask = self.calls.prepare(waveforms, lengths, self.epsilon)
        if self.frozen_layers is None:
            return Features(inputs, mask)
        hidden, mask = self._embed(inputs, mask)
        states = self.calls.run(self.trunk, hidden, mask, 0, self.frozen_layers)
        return Features(states[-1], mask, self._for_mix(states, mask, last=self.frozen_layers == self.layers))

    def forward(self, features: tuple[Features, ...]) -> Encoded:
        """Run the trained part of the trunk, the layer mix and the head, and concatenate the groups in batch order."""
        encoded = [self._encode(part) for part in features]
        if len(encoded) == 1 and features[0].rows is None:
            return encoded[0]
        order = torch.cat([part.rows for part in features if part.rows is not None]).argsort()
        return concatenate(encoded)[order]

    def _encode(self, features: Features) -> Encoded:
        hidden, mask = features.hidden, features.mask
        assert mask is not None
        if self.frozen_layers is None:
            hidden, mask = self._embed(hidden, mask)
            states = self.calls.run(self.trunk, hidden, mask, 0, self.layers)
        else:
            states = self.calls.run(self.trunk, hidden, mask, self.frozen_layers, self.layers)[1:]
        mixed = self.mix(features.states + self._for_mix(states, mask, last=True))
        embedding, tokens = self.head(mixed, mask, thirds(mixed, mask) if self.pool == "thirds" else None)
        return Encoded(embedding, tokens, mask)

    def _embed(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.calls.embed(self.trunk, inputs, mask, self.head.project.weight.dtype)

    def _for_mix(self, states: list[Tensor], mask: Tensor, last: bool) -> tuple[Tensor, ...]:
        """Normalize states for the mix; `last`: the last of them is the trunk's last state, which has a final norm."""
        states = [self.calls.aligned(state, mask) for state in states]
        norm = self.parts.norm
        if last and self.final_norm and norm is not None and states:
            states = [*states[:-1], norm(states[-1])]
        return tuple(F.layer_norm(state, state.shape[-1:]) if self.normed else state for state in states)


def thirds(frames: Tensor, mask: Tensor) -> Tensor:
    """Means over the beginning, the middle and the end of utterances: [B, 3 * H].

    The parts overlap: a frame's weight falls linearly from the center of a part to 0 at the centers of its neighbors.

    Args:
        frames: [B, L, H].
        mask: Bool [B, L], False on padding; at least one True per row.
    """
    position = (torch.arange(mask.shape[1], device=mask.device) + 0.5) / mask.sum(dim=1, keepdim=True)
    centers = (torch.arange(THIRDS, device=mask.device) + 0.5) / THIRDS
    weight = (1 - THIRDS * (position[:, None] - centers[:, None]).abs()).clamp(min=0) * mask[:, None]
    # With a single frame, the outer parts have no weight up to rounding: their means stay zero.
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-3)
    return (weight.to(frames.dtype) @ frames.masked_fill(~mask.unsqueeze(-1), 0)).flatten(1)
