r"""Group norm after HuBERT-base's first convolution, computed without padding.

The norm uses mean and variance of each channel over time. In transformers these include the padding, so the features of
an utterance depend on the others in its batch. The statistics without padding need no pass over the convolution's
output, the largest tensor of the model, because the convolution is linear: with :math:`x_t` the K samples under the
kernel at frame t, channel c is :math:`w_c \cdot x_t + b_c`, so its mean is :math:`w_c \cdot \bar x + b_c` and its
variance :math:`w_c^\top \mathrm{Cov}(x) w_c`, from a K-vector and a K x K matrix per utterance. They are computed in
float64: most of the energy of speech lies at low frequencies, and in float32 the variance of a high-frequency filter
would lose most of its precision.

Both classes have the parameters of the transformers modules that they replace, and without the additional arguments the
same output. Each uses its weights in its own `forward`, as ZeRO-3 requires.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ConvWithMoments(nn.Conv1d):
    """Convolution of one input channel, without padding or dilation, that can also return moments of its output."""

    def forward(self, waveforms: Tensor, frames: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Convolve [B, 1, T] to [B, C, L].

        Args:
            waveforms: Of any floating dtype.
            frames: Int64 [B], number of frames without padding, at least one; None: return the output only.

        Returns:
            The output; mean and biased variance of each channel over these frames, float64 [B, C] each.
        """
        output = super().forward(waveforms)
        return output if frames is None else (output, *self._moments(waveforms, frames))

    def _moments(self, waveforms: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        windows = waveforms[:, 0].double().unfold(1, self.kernel_size[0], self.stride[0])
        mask = torch.arange(windows.shape[1], device=frames.device) < frames[:, None]
        count, mask = frames[:, None].double(), mask.unsqueeze(-1)
        mean = (windows * mask).sum(dim=1) / count
        centered = (windows - mean[:, None]) * mask
        covariance = centered.transpose(1, 2) @ centered / count.unsqueeze(-1)
        weight = self.weight[:, 0].double()
        mean = mean @ weight.T
        if self.bias is not None:
            mean = mean + self.bias.double()
        return mean, ((weight @ covariance) * weight).sum(dim=-1)


class GroupNormFromMoments(nn.GroupNorm):
    """Group norm with one channel per group, and optionally with given moments."""

    def forward(self, hidden: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        """Normalize [B, C, L] by mean and variance [B, C]; default: those over all L frames."""
        if mean is None or variance is None:
            return super().forward(hidden)
        scale = self.weight.double() * (variance.clamp(min=0) + self.eps).rsqrt()
        shift = self.bias.double() - mean * scale
        return torch.addcmul(shift.to(hidden.dtype).unsqueeze(-1), hidden, scale.to(hidden.dtype).unsqueeze(-1))


def install(layer: Any) -> None:
    """Replace the classes of a HubertGroupNormConvLayer's modules, as `forward` needs; parameters are kept."""
    layer.conv.__class__ = ConvWithMoments
    layer.layer_norm.__class__ = GroupNormFromMoments


def forward(layer: Any, waveforms: Tensor, frames: Tensor) -> Tensor:
    """Call such a layer on waveforms [B, 1, T], with the norm over the first `frames`, int64 [B], of each row only."""
    hidden, mean, variance = layer.conv(waveforms, frames)
    return layer.activation(layer.layer_norm(hidden, mean, variance))
