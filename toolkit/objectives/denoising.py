r"""CMD, cross-modal denoising: noise one modality's tokens, rebuild them by attending to the other.

With rebuilt tokens :math:`\hat x_{bl}`, clean tokens :math:`x_{bl}` (no gradient) and the counted positions
:math:`P_b` of row b:

.. math:: L = \frac{1}{B} \sum_b \frac{1}{|P_b|} \sum_{l \in P_b} d_{bl}

- cosine: :math:`d = 1 - \cos(\hat x_{bl}, x_{bl})`
- mse: :math:`d` = mean square of :math:`LN(\hat x_{bl}) - LN(x_{bl})`, LN the layer normalisation without affine part
- infonce: :math:`d = -\log [ e^{\cos(\hat x_{bl}, x_{bl}) / \tau} / \sum_k e^{\cos(\hat x_{bl}, x_{bk}) / \tau} ]`,
  over the real tokens k of the same row

Source: the task is arXiv 2408.13705's; that patches are replaced by patches of other images in the batch is what
second-hand descriptions of it report. Share, runs for speech, the other noises and all three distances are our reading.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.objectives.counter_rng import CounterRNG

Noise = Literal["swap", "gaussian", "mask"]
Loss = Literal["cosine", "mse", "infonce"]

# Streams of random numbers. The normal distribution takes two.
_OFFSET, _CHOSEN, _ROW, _PLACE, _WHITE = range(5)


@dataclass
class Noised:
    """Noised sequences.

    Attributes:
        tokens: [B, L, H], as the clean ones where `positions` is False.
        positions: bool [B, L], True where noise was put; never on padding.
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
    mask_token: Tensor | None = None,
) -> Noised:
    """Noise a share of the tokens in runs of `span`, without waiting for the device.

    Each row is cut into runs at a random offset, and each run is noised with probability `ratio`; so is every token.

    - swap: the run becomes one of another row, drawn evenly among its group's rows of other pictures and the places
      in it, real tokens all (a row shorter than the run is read in a circle). A row whose group holds no other picture
      keeps its tokens, its positions False. With span 1 these are single patches.
    - gaussian: white noise is added, `snr_db` below the mean power of the row's real tokens.
    - mask: tokens become zeros or `mask_token`.

    Every row's noise is the same however the batch is cut over ranks, as long as no group of swap is cut.

    Args:
        tokens: [B, L, H]; gradient flows through what is kept and what is swapped in.
        mask: bool [B, L], True = real.
        ids: int64 [B] picture identities.
        noise: What is done to a noised token.
        ratio: Expected share of the real tokens that is noised.
        span: Length of a run, in tokens.
        snr_db: Signal-to-noise ratio of gaussian.
        random: Where all randomness comes from.
        donors: Rows of the global batch in a group: rows 0 to donors - 1, and so on.
        mask_token: [H] for mask; default zeros.

    Raises:
        ValueError: The noise is unknown or the span is not positive.
    """
    run, within = _runs(tokens, span, random)
    positions = (_by_run(random, _CHOSEN, run) < ratio) & mask
    if noise == "swap":
        group = random.rows // swap_group
        allowed = (ids[:, None] != ids) & (group[:, None] == group) & mask.any(1)
        replacement, possible = _other_tokens(tokens, mask, allowed, run, within, span, random)
        positions = positions & possible[:, None]
    elif noise == "gaussian":
        replacement = tokens + _white_noise(tokens, mask, snr_db, random)
    elif noise == "mask":
        replacement = torch.zeros_like(tokens) if mask_token is None else mask_token.to(tokens).expand_as(tokens)
    else:
        raise ValueError(f"noise is {noise!r}, expected swap, gaussian or mask")
    return Noised(torch.where(positions[..., None], replacement, tokens), positions)


def _runs(tokens: Tensor, span: int, random: CounterRNG) -> tuple[Tensor, Tensor]:
    """Cut rows into runs at a random offset: number of each token's run, and its place within, both [B, L]."""
    if span < 1:
        raise ValueError(f"span is {span}, expected at least 1")
    offset = (random.uniform(_OFFSET, 1) * span).long()
    step = torch.arange(tokens.shape[1], device=tokens.device) + offset
    return step // span, step % span


def _other_tokens(
    tokens: Tensor, mask: Tensor, allowed: Tensor, run: Tensor, within: Tensor, span: int, random: CounterRNG
) -> tuple[Tensor, Tensor]:
    """Draw for each run one of the rows allowed [B, B]: tokens [B, L, H], and whether a row has any [B]."""
    choices = allowed.sum(1, keepdim=True)
    row = _nth_true(allowed).gather(1, _below(choices, _by_run(random, _ROW, run)))
    real = mask.sum(1)[row]  # tokens that the source row has
    start = _below(real - span + 1, _by_run(random, _PLACE, run))
    place = _nth_true(mask)[row, (start + within) % real.clamp(min=1)]
    return tokens[row, place], choices[:, 0] > 0


def _by_run(random: CounterRNG, stream: int, run: Tensor) -> Tensor:
    """Draw a number in [0, 1) for each run of each row; every token [B, L] of the run has it."""
    return random.uniform(stream, run.shape[1]).gather(1, run)  # as many as any span and offset need


def _below(count: Tensor, uniforms: Tensor) -> Tensor:
    """Turn uniforms in [0, 1) into integers in [0, count); 0 where count is not positive."""
    return torch.minimum((uniforms * count).long(), count - 1).clamp(min=0)


def _nth_true(mask: Tensor) -> Tensor:
    """Place of each row's n-th True [B, L]; what follows the last one means nothing."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _white_noise(tokens: Tensor, mask: Tensor, snr_db: float, random: CounterRNG) -> Tensor:
    """Gaussian noise [B, L, H] of variance P / 10^(snr/10), P the mean square of each row's real tokens."""
    power = tokens.detach().float().square().mean(-1)
    power = torch.where(mask, power, 0).sum(1) / mask.sum(1).clamp(min=1)
    deviation = (power / 10 ** (snr_db / 10)).sqrt()
    noise = random.normal(_WHITE, *tokens.shape[1:])
    return (noise * deviation[:, None, None]).to(tokens.dtype)


def denoising_loss(
    predicted: Tensor, target: Tensor, positions: Tensor, mask: Tensor, loss: Loss, temperature: float = 0.1
) -> Tensor:
    """Distance of rebuilt tokens from the clean ones: this module's equation.

    Args:
        predicted: [B, L, H].
        target: [B, L, H], taken as a constant.
        positions: bool [B, L], where the distance counts: the noised positions, or the mask for all.
        mask: bool [B, L], True = real; padding never counts.
        loss: The distance.
        temperature: Of infonce.

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
    """Distance [B, L] of each token; it means nothing on padding."""
    if loss == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    if loss == "mse":
        width = predicted.shape[-1:]
        return (F.layer_norm(predicted, width) - F.layer_norm(target, width)).square().mean(-1)
    if loss == "infonce":
        logits = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).mT / temperature  # [B, L, L]
        # The lowest number, not -inf: a row without any real token has to stay finite.
        among = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
        return among.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
    raise ValueError(f"loss is {loss!r}, expected cosine, mse or infonce")
