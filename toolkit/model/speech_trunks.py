"""Speech trunks part by part: from waveforms to the input of the first layer, and through the layers.

A trunk's `forward` is never called, because frozen layers run once for student and teacher, every layer's output is
mixed, and padding must not change an utterance's encoding. The classes here hold sizes only; the modules are arguments.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE
from toolkit.model import masked_group_norm
from toolkit.model.trunk import masks_of, run_layer

# Observed with torch 2.13: the outputs are wrong, while the gradients are correct.
NARROW_CONVOLUTION = (
    "model.speech.config: in bf16, CPUs with AMX compute convolutions of 2 to 31 channels wrongly: use fp32, or set {} "
    "to at least 32"
)
HOP, FFT = 160, 400  # samples, of log-mel spectrograms
MEL_FLOOR = 1e-2  # power of a waveform of unit variance that counts as silence; speech reaches 1e4


@dataclass(frozen=True)
class Parts:
    """Modules of a trunk.

    Attributes:
        inputs: Those before the layers.
        layers: The layers.
        norm: Norm after the last layer; None: there is none.
        fixed: Those that are never trained.
        everywhere: Those that every layer needs, frozen or not.
    """

    inputs: tuple[nn.Module, ...]
    layers: nn.ModuleList
    norm: nn.Module | None
    fixed: tuple[nn.Module, ...] = ()
    everywhere: tuple[nn.Module, ...] = ()


class BlockConvolution(nn.Conv1d):
    """Convolution whose stride divides its kernel; on a CPU in float32, products of blocks of a stride's inputs.

    Without AVX-512 its gradients take half as long as those of a convolution. The layer norm around a convolution of
    the "large" models transposes, so that the blocks are views.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Convolve [B, C, T] to [B, O, L]."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or self.in_channels == 1:
            return super().forward(hidden)
        count = (hidden.shape[2] - kernel) // stride + 1
        blocks = hidden.transpose(1, 2)[:, : (count - 1) * stride + kernel].unflatten(1, (-1, stride)).flatten(2)
        weights = self.weight.permute(2, 1, 0).reshape(kernel // stride, -1, self.out_channels)
        products = [blocks[:, number : number + count] @ weight for number, weight in enumerate(weights)]
        output = sum(products[1:], start=products[0])
        return (output if self.bias is None else output + self.bias).transpose(1, 2)


class WaveformTrunk:
    """HuBERT and wav2vec 2.0: convolutions over the waveform, a positional convolution, transformer layers.

    Args:
        trunk: The model.
        mel_bins: Bins of a log-mel spectrogram that takes the waveform's place; the convolutions then have its bins as
            input channels, and kernels and strides in its frames of 10 ms. 0: the waveform.

    Attributes:
        normed: Every convolution has a layer norm ("large" models): the waveform and the states of the mix are
            normalized, too; else the first convolution has a group norm.
        pre_norm: The layers are pre-norm, with a norm after the last of them.
    """

    def __init__(self, trunk: Any, mel_bins: int = 0) -> None:
        config = trunk.config
        self.normed = config.feat_extract_norm == "layer"
        self.pre_norm = config.do_stable_layer_norm
        self.mel_bins = mel_bins
        self.convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        if mel_bins:
            first = trunk.feature_extractor.conv_layers[0].conv
            sizes = first.out_channels, first.kernel_size[0], first.stride[0]
            trunk.feature_extractor.conv_layers[0].conv = nn.Conv1d(mel_bins, *sizes, bias=first.bias is not None)
            self.convolutions.insert(0, (FFT, HOP))
        self.shortest = 1
        for kernel, stride in reversed(self.convolutions):
            self.shortest = (self.shortest - 1) * stride + kernel
        widths = (mel_bins, *config.conv_dim[:-1], config.hidden_size // config.num_conv_pos_embedding_groups)
        self.narrow = any(1 < width < 32 for width in widths)
        if not self.normed:
            masked_group_norm.install(trunk.feature_extractor.conv_layers[0])
            return
        for layer in trunk.feature_extractor.conv_layers:
            if layer.conv.kernel_size[0] % layer.conv.stride[0] == 0:
                layer.conv.__class__ = BlockConvolution

    def parts(self, trunk: Any) -> Parts:
        """Return the modules."""
        encoder = trunk.encoder
        inputs = (trunk.feature_extractor, trunk.feature_projection, encoder.pos_conv_embed, encoder.dropout)
        if self.pre_norm:
            return Parts(inputs, encoder.layers, encoder.layer_norm)
        return Parts((*inputs, encoder.layer_norm), encoder.layers, None)

    def frames(self, samples: Any, start: int = 0, stop: int | None = None) -> Any:
        """Number of frames after convolutions `start` to `stop` - 1 whose receptive field lies in `samples` inputs.

        The first one is the window of the spectrogram, if the trunk has one.
        """
        for kernel, stride in self.convolutions[start:stop]:
            samples = (samples - kernel) // stride + 1
        return samples

    def prepare(self, waveforms: Tensor, lengths: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
        """Pad waveforms to at least one frame and normalize them; with `mel_bins` also compute their spectrograms.

        Args:
            waveforms: [B, T], zero-padded.
            lengths: Int64 [B], in samples.
            epsilon: Added to the variance; None: waveforms are not normalized.

        Returns:
            Float32 [B, T] or spectrograms [B, bins, L]; mask of samples or of spectrogram frames, bool [B, T or L].
        """
        waveforms = F.pad(waveforms.float(), (0, max(0, self.shortest - waveforms.shape[1])))
        mask = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        if epsilon is not None:
            count = lengths[:, None].clamp(min=1)
            centered = (waveforms - waveforms.sum(dim=1, keepdim=True) / count) * mask
            waveforms = centered * (centered.square().sum(dim=1, keepdim=True) / count + epsilon).rsqrt()
        if not self.mel_bins:
            return waveforms, mask
        frames = self.frames(lengths.clamp(min=self.shortest), stop=1)
        longest = self.frames(waveforms.shape[1], stop=1)
        mask = torch.arange(longest, device=waveforms.device) < frames[:, None]
        return normalized_log_mel(waveforms, mask, self.mel_bins), mask

    def embed(self, trunk: Any, inputs: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Apply convolutions, projection and positions: hidden [B, L, H], mask bool [B, L] (at least one frame)."""
        hidden = inputs.to(dtype) if self.mel_bins else inputs[:, None].to(dtype)
        if self.narrow and dtype == torch.bfloat16 and hidden.device.type == "cpu":
            widths = "conv_dim, and hidden_size / num_conv_pos_embedding_groups,"
            raise UserError(NARROW_CONVOLUTION.format(widths))
        # An utterance shorter than a frame is encoded as if followed by silence.
        samples = mask.sum(dim=1) if self.mel_bins else mask.sum(dim=1).clamp(min=self.shortest)
        frames = self.frames(samples, start=int(self.mel_bins > 0))
        first, *others = trunk.feature_extractor.conv_layers
        hidden = (
            first(hidden) if self.normed else masked_group_norm.forward(first, hidden, self.frames(samples, stop=1))
        )
        for layer in others:
            hidden = layer(hidden)
        hidden = run_layer(trunk.feature_projection, hidden.transpose(1, 2))
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        # The positional convolution reads neighboring frames: padding must be zero, like beyond the end of a sequence.
        hidden = hidden * mask.unsqueeze(-1)
        encoder = trunk.encoder
        hidden = hidden + encoder.pos_conv_embed(hidden)
        return encoder.dropout(hidden if self.pre_norm else encoder.layer_norm(hidden)), mask

    def run(self, trunk: Any, hidden: Tensor, mask: Tensor, start: int, stop: int) -> list[Tensor]:
        """Return `hidden` [B, L, H], the input of layer `start`, and the outputs of layers `start` to `stop` - 1."""
        states = [hidden]
        more = self._more_inputs(trunk, hidden) if start < stop else ()
        for layer in self.parts(trunk).layers[start:stop]:
            states.append(run_layer(layer, states[-1], mask[:, None, None, :], *more))
        return states

    def aligned(self, state: Tensor, mask: Tensor) -> Tensor:
        """Return the frames [B, L, H] of a state that `mask`, bool [B, L], is of."""
        return state

    def _more_inputs(self, trunk: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return further inputs of every layer, after the hidden states and the mask."""
        return ()


class WavLMTrunk(WaveformTrunk):
    """WavLM: as HuBERT, with a relative position bias that the first layer owns and every layer gates."""

    def __init__(self, trunk: Any, mel_bins: int = 0) -> None:
        super().__init__(trunk, mel_bins)
        for layer in trunk.encoder.layers:
            layer.attention.__class__ = GatedAttention

    def parts(self, trunk: Any) -> Parts:
        """Return the modules."""
        return replace(super().parts(trunk), everywhere=(trunk.encoder.layers[0].attention.rel_attn_embed,))

    def _more_inputs(self, trunk: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        return (trunk.encoder.layers[0].attention.compute_bias(hidden.shape[1], hidden.shape[1]),)


class GatedAttention(WavLMAttention):
    """WavLM's attention, with every weight used in the `forward` of the module that owns it.

    transformers' class reads the weights of its linear layers without calling them, which bypasses ZeRO-3's hooks and
    LoRA, and averages attention weights that nothing uses.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor, position_bias: Tensor, **options: Any
    ) -> tuple[Tensor, None, Tensor]:
        """Attend among frames [B, L, H].

        Args:
            hidden_states: [B, L, H].
            attention_mask: Bool [B, 1, 1, L], False on padding.
            position_bias: [heads, L, L], result of the first layer's `compute_bias`.
            options: Not used.

        Returns:
            [B, L, H]; None; the position bias.
        """
        heads = hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        gates = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid()
        gate_a, gate_b = gates.chunk(2, dim=-1)  # [B, heads, L, 1]
        bias = (gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0) * position_bias
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = bias.masked_fill(~attention_mask, -torch.inf).to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None, position_bias


class WhisperTrunk:
    """Whisper's encoder: a log-mel spectrogram of a window of fixed length, 30 s, whatever the utterance's.

    As in Whisper's training, silence fills the window and is attended to. Only frames with samples of the utterance
    leave the trunk. Longer utterances are encoded in consecutive windows.

    Attributes:
        window: Samples of a window.
    """

    normed = pre_norm = True

    def __init__(self, trunk: Any) -> None:
        self.window = 2 * HOP * trunk.config.max_source_positions
        self.bins = trunk.config.num_mel_bins
        self.narrow = min(self.bins, trunk.config.d_model) < 32
        self.no_masks = masks_of(trunk.layers[0])

    def parts(self, trunk: Any) -> Parts:
        """Return the modules; the positions are sinusoids, which are never trained."""
        inputs = (trunk.conv1, trunk.conv2, trunk.embed_positions)
        return Parts(inputs, trunk.layers, trunk.layer_norm, fixed=(trunk.embed_positions,))

    def frames(self, samples: Any) -> Any:
        """Number of frames that begin within `samples`: 50 a second."""
        return (samples + 2 * HOP - 1) // (2 * HOP)

    def prepare(self, waveforms: Tensor, lengths: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
        """Compute log-mel spectrograms as `WhisperFeatureExtractor` does.

        Args:
            waveforms: [B, T], zero-padded.
            lengths: Int64 [B], in samples.
            epsilon: Not used.

        Returns:
            Float32 [B * windows, bins, window / 160]; mask of frames, bool [B, L], at least one in a row.
        """
        missing = -waveforms.shape[1] % self.window if waveforms.shape[1] else self.window
        windows = F.pad(waveforms.float(), (0, missing)).reshape(-1, self.window)
        logs = mel_power(windows, self.bins, centered=True).clamp(min=1e-10).log10()
        logs = torch.maximum(logs, logs.amax(dim=(1, 2), keepdim=True) - 8.0)
        longest = self.frames(max(1, waveforms.shape[1]))
        mask = torch.arange(longest, device=windows.device) < self.frames(lengths.clamp(min=1))[:, None]
        return (logs + 4.0) / 4.0, mask

    def embed(self, trunk: Any, spectrograms: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Apply convolutions and positions: hidden [B * windows, window / 320, H]; the mask is returned unchanged."""
        if self.narrow and dtype == torch.bfloat16 and spectrograms.device.type == "cpu":
            raise UserError(NARROW_CONVOLUTION.format("num_mel_bins and d_model"))
        hidden = F.gelu(trunk.conv2(F.gelu(trunk.conv1(spectrograms.to(dtype))))).transpose(1, 2)
        hidden = hidden + trunk.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
        return F.dropout(hidden, trunk.dropout, training=trunk.conv1.training), mask

    def run(self, trunk: Any, hidden: Tensor, mask: Tensor, start: int, stop: int) -> list[Tensor]:
        """Return `hidden`, the input of layer `start`, and the outputs of layers `start` to `stop` - 1."""
        states = [hidden]
        for layer in trunk.layers[start:stop]:
            states.append(run_layer(layer, states[-1], *self.no_masks))
        return states

    def aligned(self, state: Tensor, mask: Tensor) -> Tensor:
        """Join an utterance's windows, and return its frames [B, L, H] that `mask`, bool [B, L], is of."""
        return state.reshape(len(mask), -1, state.shape[-1])[:, : mask.shape[1]]


def mel_power(waveforms: Tensor, bins: int, centered: bool) -> Tensor:
    """Power [B, bins, L] in mel bands of waveforms [B, T]: windows of 25 ms, every 10 ms.

    Args:
        waveforms: At 16 kHz.
        bins: Number of bands up to 8 kHz, of equal area as Slaney's.
        centered: As Whisper's: the first window is centered on the first sample, the waveform is reflected at its ends,
            and the last window is left out; else all windows lie in the waveform.
    """
    hann = torch.hann_window(FFT, device=waveforms.device)
    spectrum = torch.view_as_real(torch.stft(waveforms, FFT, HOP, window=hann, center=centered, return_complex=True))
    filters = torch.from_numpy(_mel_filters(bins)).to(waveforms.device)
    power = spectrum.square().sum(dim=-1)
    return filters.T @ (power[..., :-1] if centered else power)


def normalized_log_mel(waveforms: Tensor, mask: Tensor, bins: int) -> Tensor:
    """Log-mel spectrograms [B, bins, L], each bin of zero mean and unit variance over an utterance; zero on padding.

    That removes most of what differs between voices and microphones and not between words.

    Args:
        waveforms: [B, T], of unit variance.
        mask: Bool [B, L], False on padding.
        bins: Number of mel bands.
    """
    logs = (mel_power(waveforms, bins, centered=False) + MEL_FLOOR).log()
    weight = mask[:, None] / mask.sum(dim=1)[:, None, None]
    logs = (logs - (logs * weight).sum(dim=2, keepdim=True)) * mask[:, None]
    return logs * ((logs.square() * weight).sum(dim=2, keepdim=True) + MEL_FLOOR).rsqrt()


@cache
def _mel_filters(bins: int) -> Any:
    """Whisper's mel filters, float32 [201, bins]."""
    filters = mel_filter_bank(1 + FFT // 2, bins, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return filters.astype("float32")
