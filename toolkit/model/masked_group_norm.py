r"""The group norm after HuBERT-base's first convolution, over an utterance's own frames only.

The norm takes mean and variance of each channel over time, and transformers takes them over the padding too: what an
utterance is batched with then changes all its features. The statistics of the real frames alone need no pass over the
convolution's output, the largest tensor of the model. The convolution is linear: with :math:`x_t` the K samples under
the kernel at frame t, channel c is :math:`w_c \cdot x_t + b_c`, so its mean is :math:`w_c \cdot \bar x + b_c` and its
variance :math:`w_c^\top \mathrm{Cov}(x) w_c`, from a K-vector and a K x K matrix an utterance. They are float64: speech
has most of its energy where a high filter lets next to none through, and float32 would leave such a variance few
digits.

Both classes are transformers' modules with the same weights under the same names, and without the second argument they
do the same. Each uses its weights in its own `forward`, as ZeRO-3 wants it.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ConvWithMoments(nn.Conv1d):
    """A convolution of one channel, without padding or dilation, that can tell its output's moments."""

    def forward(self, waveforms: Tensor, frames: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Convolve [B, 1, T] to [B, C, L].

        Args:
            waveforms: of any precision.
            frames: int64 [B], the real frames of L, at least one; None: give the output alone.

        Returns:
            The output; mean and biased variance of each channel over the real frames, float64 [B, C].
        """
        output = super().forward(waveforms)
        return output if frames is None else (output, *self._moments(waveforms, frames))

    def _moments(self, waveforms: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        windows = waveforms[:, 0].double().unfold(1, self.kernel_size[0], self.stride[0])
        mask = torch.arange(windows.shape[1], device=frames.device) < frames[:, None]
        count, mask = frames[:, None].double(), mask.unsqueeze(-1)
        mean = (windows * mask).sum(dim=1) / count
        centred = (windows - mean[:, None]) * mask
        covariance = centred.transpose(1, 2) @ centred / count.unsqueeze(-1)
        weight = self.weight[:, 0].double()
        mean = mean @ weight.T
        if self.bias is not None:
            mean = mean + self.bias.double()
        return mean, ((weight @ covariance) * weight).sum(dim=-1)


class GroupNormFromMoments(nn.GroupNorm):
    """A group norm, a channel a group, by moments that are given."""

    def forward(self, hidden: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        """Normalise [B, C, L] by mean and variance [B, C]; without them by those over all of L."""
        if mean is None or variance is None:
            return super().forward(hidden)
        scale = self.weight.double() * (variance.clamp(min=0) + self.eps).rsqrt()
        shift = self.bias.double() - mean * scale
        return torch.addcmul(shift.to(hidden.dtype).unsqueeze(-1), hidden, scale.to(hidden.dtype).unsqueeze(-1))


def install(layer: Any) -> None:
    """Make `run` possible on a HubertGroupNormConvLayer of transformers; its parameters stay the same objects."""
    layer.conv.__class__ = ConvWithMoments
    layer.layer_norm.__class__ = GroupNormFromMoments


def forward(layer: Any, waveforms: Tensor, frames: Tensor) -> Tensor:
    """Call such a layer on [B, 1, T], the norm over the real frames only, of which each row has so many."""
    hidden, mean, variance = layer.conv(waveforms, frames)
    return layer.activation(layer.layer_norm(hidden, mean, variance))
