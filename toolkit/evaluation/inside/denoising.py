"""How well CMD's denoiser reconstructs noised tokens, by the ratio of noise and by what it sees of the other modality.

The loss is the run's own (`objectives.denoising.loss`) over the noised tokens, at ratio 0 over all tokens, against the
model's own clean tokens. In training the clean tokens are those of `objectives.denoising.target`, by default of the
momentum encoder. A pair without noised tokens is left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.config.schema import Denoising
from toolkit.model.outputs import Encoded
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import add_noise, denoising_loss

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
_CURVES = ("noised", "right", "other", "none")  # noised tokens, and those reconstructed with each context


@torch.no_grad()
def denoising_curves(
    denoisers: Mapping[str, Any],
    batches: Iterable[tuple[Encoded, Encoded, Tensor]],
    settings: Denoising,
) -> dict[str, Any]:
    """Measure the loss by ratio of noise.

    Args:
        denoisers: Denoiser in evaluation mode, float32, by the modality that it reconstructs.
        batches: Encoded speech and images of pairs of different pictures, and their sample numbers int64 [B], B > 1.
        settings: Kind of noise, and loss; the ratio is not used.

    Returns:
        For each modality {"loss": its name, "ratio": `RATIOS`, "noised": loss of the noised tokens themselves, "right":
        of the reconstructed tokens given the other modality of the same pair, "other": of another pair, "none": without
        it}; {"reason"} if there are no batches.
    """
    sums = {side: torch.zeros(len(_CURVES), len(RATIOS), dtype=torch.float64) for side in denoisers}
    counts = {side: torch.zeros(len(RATIOS), dtype=torch.float64) for side in denoisers}
    row = 0
    for speech, image, ids in batches:
        random = CounterRNG(0, torch.arange(row, row + len(ids), device=ids.device))
        row += len(ids)
        speech, image = (Encoded(each.embedding, each.tokens.float(), each.mask) for each in (speech, image))
        for side, denoiser in denoisers.items():
            clean, context = (speech, image) if side == "speech" else (image, speech)
            for column, ratio in enumerate(RATIOS):
                losses, count = _losses(denoiser, clean, context, ids, ratio, side, settings, random)
                sums[side][:, column] += losses
                counts[side][column] += count
    if not row:
        return {"reason": "there are no captions of two pictures"}
    curves: dict[str, Any] = {}
    for side in denoisers:
        means = (sums[side] / counts[side].clamp(min=1)).tolist()
        curves[side] = {"loss": settings.loss, "ratio": list(RATIOS), **dict(zip(_CURVES, means, strict=True))}
    return curves


def _losses(
    denoiser: Any,
    clean: Encoded,
    context: Encoded,
    ids: Tensor,
    ratio: float,
    side: str,
    settings: Denoising,
    random: CounterRNG,
) -> tuple[Tensor, int]:
    """Sum of the pairs' losses, float64 [4] in the order of `_CURVES`, and the number of pairs with noised tokens."""
    span = settings.span if side == "speech" else 1  # as in training
    noise = (settings.noise, ratio, span, settings.snr_db, random, settings.swap_group)
    noised = add_noise(clean.tokens, clean.mask, ids, *noise)
    counted = noised.positions if ratio else clean.mask
    other = context[torch.arange(len(ids), device=ids.device).roll(1)]
    compared = [
        noised.tokens,
        denoiser(noised.tokens, clean.mask, context.tokens, context.mask),
        denoiser(noised.tokens, clean.mask, other.tokens, other.mask),
        denoiser(noised.tokens, clean.mask, None),
    ]
    rows = counted.any(dim=1)
    if not rows.any():
        return torch.zeros(len(_CURVES), dtype=torch.float64), 0
    target = (clean.tokens[rows], counted[rows], clean.mask[rows], settings.loss, settings.token_temperature)
    losses = torch.stack([denoising_loss(tokens[rows], *target) for tokens in compared])
    return losses.double().cpu() * int(rows.sum()), int(rows.sum())
