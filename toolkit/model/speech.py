"""Speech encoder: HuBERT trunk, softmax-weighted mix of its hidden states, head."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HubertModel

from shards.errors import UserError
from shards.length_groups import group_by_length
from toolkit.model import masked_group_norm
from toolkit.model.layers import Head
from toolkit.model.outputs import Encoded, Features
from toolkit.model.trunk import PartlyFrozen, run_layer, trained_layers

# Seen with torch 2.13: the outputs bear no relation to the inputs, while the gradients are right.
NARROW = (
    "model.speech.config: in bf16, CPUs with AMX compute convolutions of 2 to 31 channels wrongly: take fp32, or make "
    "conv_dim, and hidden_size / num_conv_pos_embedding_groups, at least 32"
)
THIRDS = 3


class LayerMix(nn.Module):
    """Sum of hidden states weighted by the softmax of learned weights, which begin at zero (as in SpeechCLIP)."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Mix n states of shape [B, L, H] to one."""
        weights = self.weights.float().softmax(dim=0).to(states[0].dtype)
        mixed = states[0] * weights[0]
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed = mixed + state * weight
        return mixed


class SpeechEncoder(PartlyFrozen):
    """Encode utterances as one embedding and a sequence of frames each.

    The waveform of a layer-norm trunk (HuBERT-large) is normalised to zero mean and unit variance per utterance, and
    its hidden states are layer-normed before the mix, as in SpeechCLIP large (arXiv 2210.00705). An utterance is
    encoded the same whatever it is batched with: padding is kept out of the waveform's statistics, of the group norm
    of HuBERT-base (see `toolkit/model/masked_group_norm.py`), the positional convolution, attention and pooling.

    Args:
        trunk: the HuBERT; its hidden layers are called one by one, never its `forward`.
        embed_dim: length of the embedding.
        train: "none", "all" or the number of top layers that are trained. Whatever is frozen stays in eval mode.
        head_layers: transformer layers of the head; 0: mean over the frames and a projection.
        head_heads: their attention heads.
        dropout: of the head.
        groups: parts that a batch is encoded in, by length.
        pool: what a head without layers projects: the "mean" of the frames, or the means over the "thirds" of an
            utterance, side by side, so that the embedding can say what is said first from the start.
        waveform_epsilon: what is added to a waveform's variance where a layer-norm trunk takes it at unit variance;
            None: the trunk takes it as it is.
        final_norm: of a layer-norm trunk, whether its last state passes the trunk's final norm before the plain norm
            that all states get; SpeechCLIP's does not, and then the final norm is not used at all.
    """

    def __init__(
        self,
        trunk: HubertModel,
        embed_dim: int,
        train: str,
        head_layers: int,
        head_heads: int,
        dropout: float,
        groups: int = 1,
        pool: str = "mean",
        waveform_epsilon: float | None = 1e-7,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        config = trunk.config
        self.trunk = trunk
        self.groups = groups
        self.normed = config.feat_extract_norm == "layer"
        if not self.normed:
            masked_group_norm.install(trunk.feature_extractor.conv_layers[0])
        self.epsilon = waveform_epsilon if self.normed else None
        self.pre_norm = config.do_stable_layer_norm
        self.final_norm = final_norm and self.pre_norm
        self.layers = config.num_hidden_layers
        trained = trained_layers(train, self.layers, "model.speech.train")
        self.frozen_layers = None if trained is None else self.layers - trained
        self.shortest = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.shortest = (self.shortest - 1) * stride + kernel
        widths = (*config.conv_dim[:-1], config.hidden_size // config.num_conv_pos_embedding_groups)
        self.narrow = any(1 < width < 32 for width in widths)
        self.mix = LayerMix(self.layers + 1)
        self.pool = pool
        places = THIRDS if pool == "thirds" else 1
        self.head = Head(config.hidden_size, embed_dim, head_layers, head_heads, dropout, places)
        self.freeze()

    @property
    def token_dim(self) -> int:
        """Size of a frame feature."""
        return self.trunk.config.hidden_size

    def frozen_modules(self) -> Iterator[nn.Module]:
        """The modules that are never trained, from the input up."""
        encoder = self.trunk.encoder
        if self.pre_norm and not self.final_norm:  # it is not used
            yield encoder.layer_norm
        if self.frozen_layers is None:
            return
        yield from (self.trunk.feature_extractor, self.trunk.feature_projection)
        yield from (encoder.pos_conv_embed, encoder.dropout)
        if not self.pre_norm or (self.final_norm and self.frozen_layers == self.layers):
            yield encoder.layer_norm
        yield from encoder.layers[: self.frozen_layers]

    @torch.no_grad()
    def frozen_features(
        self, waveforms: Tensor, lengths: Tensor, host_lengths: Sequence[int] | None = None
    ) -> tuple[Features, ...]:
        """Run the frozen part of the trunk, or, where nothing is frozen, only prepare the waveforms.

        Args:
            waveforms: [B, T] in [-1, 1], 16 kHz, zero-padded.
            lengths: int64 [B], samples.
            host_lengths: the same as numbers: with them the utterances are taken in `groups` of like length
                (see `shards/length_groups.py`), each padded to its own longest only; without, as one.
        """
        if self.groups == 1 or host_lengths is None:
            return (self._frozen(waveforms, lengths),)
        grouped = group_by_length(host_lengths, self.groups)
        # One copy to the device, which the host does not wait for.
        order = torch.from_numpy(np.concatenate(grouped))
        order = order.pin_memory().to(lengths.device, non_blocking=True) if lengths.is_cuda else order
        parts = []
        for rows, places in zip(order.split([len(places) for places in grouped]), grouped, strict=True):
            waves = waveforms[rows, : host_lengths[int(places[-1])]]
            parts.append(replace(self._frozen(waves, lengths[rows]), rows=rows))
        return tuple(parts)

    def _frozen(self, waveforms: Tensor, lengths: Tensor) -> Features:
        waveforms, mask = self._prepare(waveforms, lengths)
        if self.frozen_layers is None:
            return Features(waveforms, mask)
        hidden, mask = self._embed(waveforms, mask)
        states = self._run_layers(hidden, mask, 0, self.frozen_layers)
        return Features(states[-1], mask, self._for_mix(states, last=self.frozen_layers == self.layers))

    def forward(self, features: tuple[Features, ...]) -> Encoded:
        """Run the rest of the trunk, the layer mix and the head, and put the groups together again."""
        encoded = [self._encode(part) for part in features]
        if len(encoded) == 1 and features[0].rows is None:
            return encoded[0]
        place = torch.cat([part.rows for part in features if part.rows is not None]).argsort()
        return Encoded(
            torch.cat([part.embedding for part in encoded])[place],
            _padded([part.tokens for part in encoded])[place],
            _padded([part.mask for part in encoded])[place],
        )

    def _encode(self, features: Features) -> Encoded:
        hidden, mask = features.hidden, features.mask
        assert mask is not None
        if self.frozen_layers is None:
            hidden, mask = self._embed(hidden, mask)
            states = self._run_layers(hidden, mask, 0, self.layers)
        else:
            states = self._run_layers(hidden, mask, self.frozen_layers, self.layers)[1:]
        mixed = self.mix(features.states + self._for_mix(states, last=True))
        embedding, tokens = self.head(mixed, mask, thirds(mixed, mask) if self.pool == "thirds" else None)
        return Encoded(embedding, tokens, mask)

    def _prepare(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms [B, T], normalised if the trunk wants it, one frame long at least; mask bool [B, T] of samples."""
        waveforms = F.pad(waveforms.float(), (0, max(0, self.shortest - waveforms.shape[1])))
        mask = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        if self.epsilon is not None:
            count = lengths[:, None].clamp(min=1)
            centred = (waveforms - waveforms.sum(dim=1, keepdim=True) / count) * mask
            waveforms = centred * (centred.square().sum(dim=1, keepdim=True) / count + self.epsilon).rsqrt()
        return waveforms, mask

    def _embed(self, waveforms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Convolutions, projection and positions: hidden [B, L, H], mask bool [B, L] of real frames (at least one)."""
        hidden = waveforms[:, None].to(self.head.project.weight.dtype)
        if self.narrow and hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            raise UserError(NARROW)
        # What is shorter than a frame is encoded as if it ended in silence.
        samples = mask.sum(dim=1).clamp(min=self.shortest)
        first, *others = self.trunk.feature_extractor.conv_layers
        hidden = first(hidden) if self.normed else masked_group_norm.forward(first, hidden, self._frames(samples, 1))
        for layer in others:
            hidden = layer(hidden)
        hidden = self.trunk.feature_projection(hidden.transpose(1, 2))
        mask = torch.arange(hidden.shape[1], device=hidden.device) < self._frames(samples)[:, None]
        # The positional convolution reads its neighbours: in the padding it must see zeros, as beyond a sequence's end.
        hidden = hidden * mask.unsqueeze(-1)
        encoder = self.trunk.encoder
        hidden = hidden + encoder.pos_conv_embed(hidden)
        return encoder.dropout(hidden if self.pre_norm else encoder.layer_norm(hidden)), mask

    def _frames(self, samples: Tensor, convolutions: int | None = None) -> Tensor:
        """Frames after the first so many convolutions, or all, whose receptive field lies within so many samples."""
        config = self.trunk.config
        for kernel, stride in list(zip(config.conv_kernel, config.conv_stride, strict=True))[:convolutions]:
            samples = (samples - kernel).div(stride, rounding_mode="floor") + 1
        return samples

    def _run_layers(self, hidden: Tensor, mask: Tensor, start: int, stop: int) -> list[Tensor]:
        """The input [B, L, H] of layer `start` and the outputs of the layers from there to before `stop`."""
        states = [hidden]
        for layer in self.trunk.encoder.layers[start:stop]:
            states.append(run_layer(layer, states[-1], mask[:, None, None, :]))
        return states

    def _for_mix(self, states: list[Tensor], last: bool) -> tuple[Tensor, ...]:
        """The states as they are mixed; `last`: at their end is the trunk's last one, for its final norm."""
        if last and self.final_norm and states:
            states = [*states[:-1], self.trunk.encoder.layer_norm(states[-1])]
        return tuple(F.layer_norm(state, state.shape[-1:]) if self.normed else state for state in states)


def thirds(frames: Tensor, mask: Tensor) -> Tensor:
    """Means over the beginning, the middle and the end of utterances, [B, 3 * H].

    The parts overlap: a frame's weight falls linearly from the centre of a part to 0 at the centres of its neighbours.

    Args:
        frames: [B, L, H].
        mask: bool [B, L], True on real frames, of which there is at least one.
    """
    place = (torch.arange(mask.shape[1], device=mask.device) + 0.5) / mask.sum(dim=1, keepdim=True)
    centres = (torch.arange(THIRDS, device=mask.device) + 0.5) / THIRDS
    weight = (1 - THIRDS * (place[:, None] - centres[:, None]).abs()).clamp(min=0) * mask[:, None]
    # A single frame leaves the outer parts without any, up to rounding: they stay zero.
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-3)
    return (weight.to(frames.dtype) @ frames.masked_fill(~mask.unsqueeze(-1), 0)).flatten(1)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors [b, L, ...] behind one another, padded with zeros to the longest L."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts])
