"""Group norm without padding, against the moments of the convolution's output and transformers' layer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertGroupNormConvLayer

from toolkit.model import masked_group_norm

KERNEL, STRIDE = 10, 5


def make_layer(bias: bool = False, channels: int = 24) -> HubertGroupNormConvLayer:
    torch.manual_seed(0)
    layer = HubertGroupNormConvLayer(
        HubertConfig(conv_dim=[channels], conv_kernel=[KERNEL], conv_stride=[STRIDE], conv_bias=bias)
    )
    nn.init.normal_(layer.layer_norm.weight)
    nn.init.normal_(layer.layer_norm.bias)
    return layer


def measured(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    masked_group_norm.install(layer)
    return layer


def frames_of(lengths: Tensor) -> Tensor:
    return (lengths - KERNEL) // STRIDE + 1


def make_waves(*lengths: int, scale: float = 0.1, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    waves = [offset + scale * torch.randn(length, generator=generator) for length in lengths]
    return nn.utils.rnn.pad_sequence(waves, batch_first=True)[:, None], torch.tensor(lengths)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "offset"), [(0.1, 0.0), (0.1, 0.5), (1e-3, 0.0), (0.0, 0.0)])
def test_each_row_equals_transformers_layer_on_that_row(bias: bool, scale: float, offset: float) -> None:
    layer = make_layer(bias)
    waves, lengths = make_waves(4000, 1203, 10, 2999, scale=scale, offset=offset)
    frames = frames_of(lengths)
    got = masked_group_norm.forward(measured(layer), waves, frames)
    for row, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        if count > 1:  # the variance of one value is 0, and both return rounding errors times 1 / sqrt(eps)
            wanted = layer(waves[row : row + 1, :, :length])
            torch.testing.assert_close(got[row, :, :count], wanted[0], atol=2e-5, rtol=1e-4)
    assert got.isfinite().all()


def test_without_padding_gradients_are_those_of_transformers() -> None:
    layer = make_layer(bias=True)
    ours = measured(layer)
    waves, lengths = make_waves(3000, 3000)
    weight = torch.randn(1, 24, 1)  # the norm removes the mean of a gradient
    layer(waves).square().mul(weight).mean().backward()
    masked_group_norm.forward(ours, waves, frames_of(lengths)).square().mul(weight).mean().backward()
    for (name, parameter), (_, mine) in zip(layer.named_parameters(), ours.named_parameters(), strict=True):
        assert parameter.grad is not None
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_variance_of_a_high_frequency_filter_is_precise() -> None:
    """If all energy is at low frequencies, a high-frequency filter reduces the variance to 1e-9."""
    layer = measured(make_layer(channels=1))
    time = torch.arange(8000, dtype=torch.float64)
    wave = (torch.sin(0.02 * time) + 1e-4 * torch.sin(3.0 * time)).float()[None, None]
    high = torch.hann_window(KERNEL) * (-1.0) ** torch.arange(KERNEL)
    with torch.no_grad():
        layer.conv.weight.copy_(high - high.mean())
        _, mean, variance = layer.conv(wave, frames_of(torch.tensor([8000])))
        output = nn.functional.conv1d(wave.double(), layer.conv.weight.double(), stride=STRIDE)
    assert variance.item() < 1e-6
    torch.testing.assert_close(variance[0, 0], output.var(unbiased=False), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[0, 0], output.mean(), rtol=1e-6, atol=1e-12)


def test_without_moments_both_modules_equal_those_of_transformers() -> None:
    layer = make_layer()
    waves, _ = make_waves(2000, 1000)
    assert torch.equal(measured(layer)(waves), layer(waves))
    assert measured(layer).state_dict().keys() == layer.state_dict().keys()
