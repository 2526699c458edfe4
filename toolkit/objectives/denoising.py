r"""CMD, cross-modal denoising: noise tokens of one modality, reconstruct them by attending to the other.

With reconstructed tokens :math:`\hat x_{bl}`, clean tokens :math:`x_{bl}` (no gradient) and the counted positions
:math:`P_b` of row b:

.. math:: L = \frac{1}{B} \sum_b \frac{1}{|P_b|} \sum_{l \in P_b} d_{bl}

- cosine: :math:`d = 1 - \cos(\hat x_{bl}, x_{bl})`
- mse: :math:`d` = mean square of :math:`LN(\hat x_{bl}) - LN(x_{bl})`, LN the layer normalization without affine part
- infonce: :math:`d = -\log [ e^{\cos(\hat x_{bl}, x_{bl}) / \tau} / \sum_k e^{\cos(\hat x_{bl}, x_{bk}) / \tau} ]`,
  over the tokens k of the same row, without padding

Source: the task is arXiv 2408.13705's; that patches are replaced by patches of other images in the batch is what
second-hand descriptions of it report. The ratio, spans of speech frames, the other noises and all three distances are
our reading.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.objectives.counter_rng import CounterRNG

Noise = Literal["swap", "gaussian", "mask"]
Loss = Literal["cosine", "mse", "infonce"]

# Streams of random numbers; the normal distribution uses two.
_OFFSET, _CHOSEN, _ROW, _PLACE, _WHITE = range(5)


@dataclass
class Noised:
    """Noised sequences.

    Attributes:
        tokens: [B, L, H], equal to the clean tokens where `positions` is False.
        positions: Bool [B, L], True on noised tokens; False on padding.
    """

    tokens: Tensor
    positions: Tensor


def add_noise(
    tokens: Tensor,
    mask: Tensor,
    ids: Tensor,
    noise: Noise,
    ratio: float,
    span: int,
    snr_db: float,
    random: CounterRNG,
    swap_group: int,
) -> Noised:
    """Noise a fraction of the tokens in spans, without synchronizing with the device.

    Each row is split into spans at a random offset, and each span is noised with probability `ratio`.

    - swap: the span is replaced by a span of another row, sampled uniformly from the rows of other pictures in its
      group and the positions in that row, without padding (a row shorter than the span is repeated). A row whose group
      has no other picture keeps its tokens, with `positions` False. With span 1, single tokens are swapped.
    - gaussian: white noise is added, at `snr_db` below the mean power of the row's tokens.
    - mask: tokens are replaced by zeros.

    The noise of a row does not depend on how the batch is distributed over ranks, if no swap group is split.

    Args:
        tokens: [B, L, H]; gradients flow through kept and swapped-in tokens.
        mask: Bool [B, L], False on padding.
        ids: Int64 [B], picture ids.
        noise: Kind of noise.
        ratio: Expected fraction of the tokens that are noised.
        span: Length of a span, in tokens.
        snr_db: Signal-to-noise ratio of Gaussian noise, in dB.
        random: Random numbers of the rows.
        swap_group: Rows of the global batch per group: rows 0 to swap_group - 1, and so on.

    Raises:
        ValueError: The noise is unknown, or the span is not positive.
    """
    span_number, within = _split_into_spans(tokens, span, random)
    positions = (_uniform_per_span(random, _CHOSEN, span_number) < ratio) & mask
    if noise == "swap":
        group = random.rows // swap_group
        allowed = (ids[:, None] != ids) & (group[:, None] == group) & mask.any(1)
        replacement, possible = _swapped_tokens(tokens, mask, allowed, span_number, within, span, random)
        positions = positions & possible[:, None]
    elif noise == "gaussian":
        replacement = tokens + _white_noise(tokens, mask, snr_db, random)
    elif noise == "mask":
        replacement = torch.zeros_like(tokens)
    else:
        raise ValueError(f"noise is {noise!r}, expected swap, gaussian or mask")
    return Noised(torch.where(positions[..., None], replacement, tokens), positions)


def _split_into_spans(tokens: Tensor, span: int, random: CounterRNG) -> tuple[Tensor, Tensor]:
    """Split rows into spans at a random offset: the span number of each token, and its position within, [B, L] each."""
    if span < 1:
        raise ValueError(f"span is {span}, expected at least 1")
    offset = (random.uniform(_OFFSET, 1) * span).long()
    shifted = torch.arange(tokens.shape[1], device=tokens.device) + offset
    return shifted // span, shifted % span


def _swapped_tokens(
    tokens: Tensor, mask: Tensor, allowed: Tensor, span_number: Tensor, within: Tensor, span: int, random: CounterRNG
) -> tuple[Tensor, Tensor]:
    """Sample for each span one of the `allowed` [B, B] rows: its tokens [B, L, H], and whether a row has any [B]."""
    choices = allowed.sum(1, keepdim=True)
    row = _indices_of_true(allowed).gather(1, _to_index(choices, _uniform_per_span(random, _ROW, span_number)))
    length = mask.sum(1)[row]  # of the source row, without padding
    start = _to_index(length - span + 1, _uniform_per_span(random, _PLACE, span_number))
    position = _indices_of_true(mask)[row, (start + within) % length.clamp(min=1)]
    return tokens[row, position], choices[:, 0] > 0


def _uniform_per_span(random: CounterRNG, stream: int, span_number: Tensor) -> Tensor:
    """Draw a number in [0, 1) for each span of each row, repeated for its tokens: [B, L]."""
    return random.uniform(stream, span_number.shape[1]).gather(1, span_number)  # L numbers suffice for any span


def _to_index(count: Tensor, uniforms: Tensor) -> Tensor:
    """Map uniforms in [0, 1) to integers in [0, count); 0 where count is not positive."""
    return torch.minimum((uniforms * count).long(), count - 1).clamp(min=0)


def _indices_of_true(mask: Tensor) -> Tensor:
    """Return the index of each row's n-th True, [B, L]; entries after the last one are arbitrary."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _white_noise(tokens: Tensor, mask: Tensor, snr_db: float, random: CounterRNG) -> Tensor:
    """Draw Gaussian noise [B, L, H] of variance P / 10^(snr/10), P the mean square of a row without padding."""
    power = tokens.detach().float().square().mean(-1)
    power = torch.where(mask, power, 0).sum(1) / mask.sum(1).clamp(min=1)
    deviation = (power / 10 ** (snr_db / 10)).sqrt()
    noise = random.normal(_WHITE, *tokens.shape[1:])
    return (noise * deviation[:, None, None]).to(tokens.dtype)


def denoising_loss(
    predicted: Tensor, target: Tensor, positions: Tensor, mask: Tensor, loss: Loss, temperature: float = 0.1
) -> Tensor:
    """Distance of reconstructed from clean tokens: this module's equation.

    Args:
        predicted: [B, L, H].
        target: [B, L, H], detached.
        positions: Bool [B, L], positions that count: the noised ones, or `mask` for all.
        mask: Bool [B, L], False on padding, which never counts.
        loss: The distance.
        temperature: Temperature of infonce.

    Returns:
        Scalar. A row without counted positions adds 0 to the sum and still counts in B, so that the mean over ranks is
        the mean over the global batch.

    Raises:
        ValueError: The loss is unknown.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    predicted, target = predicted.to(dtype), target.detach().to(dtype)
    counted = positions & mask
    with torch.autocast(predicted.device.type, enabled=False):
        distance = _distance(predicted, target, mask, loss, temperature)
        return (torch.where(counted, distance, 0).sum(1) / counted.sum(1).clamp(min=1)).mean()


def _distance(predicted: Tensor, target: Tensor, mask: Tensor, loss: Loss, temperature: float) -> Tensor:
    """Compute the distance of each token, [B, L]; arbitrary on padding."""
    if loss == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    if loss == "mse":
        width = predicted.shape[-1:]
        return (F.layer_norm(predicted, width) - F.layer_norm(target, width)).square().mean(-1)
    if loss == "infonce":
        logits = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).mT / temperature  # [B, L, L]
        # The lowest number instead of -inf: a row of padding only must stay finite.
        masked = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
        return masked.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
    raise ValueError(f"loss is {loss!r}, expected cosine, mse or infonce")
