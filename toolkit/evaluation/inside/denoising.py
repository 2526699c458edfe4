"""How well the denoiser of CMD rebuilds noised tokens, by the ratio of noise and by what it sees of the other modality.

The distance is 1 - cosine of a token and the model's own clean token, a mean over the noised tokens; at ratio 0 over
all tokens. In training the clean tokens are those of `objectives.denoising.target`, by default of the momentum encoder.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.config.schema import Denoising
from toolkit.model.outputs import Encoded
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import add_noise

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
_SEEN = ("noised", "right", "other", "none")  # the noised tokens themselves, and the contexts of the denoiser


@torch.no_grad()
def denoising_curves(
    denoisers: Mapping[str, Any],
    batches: Iterable[tuple[Encoded, Encoded, Tensor]],
    settings: Denoising,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the distance from clean tokens by ratio of noise.

    Args:
        denoisers: Denoiser in evaluation mode, float32, by the modality that it rebuilds.
        batches: Encoded speech and images of pairs of different pictures, and their sample numbers int64 [B], B > 1.
        settings: The kind of noise; its ratio is not used.
        seed: Seed of the noise.

    Returns:
        For each modality {"ratio": `RATIOS`, "noised": distance of the noised tokens, "right": of the rebuilt tokens
        given the other modality of the same pair, "other": of another pair, "none": without it};
        {"reason"} if there are no batches.
    """
    sums = {side: torch.zeros(len(_SEEN), len(RATIOS), dtype=torch.float64) for side in denoisers}
    counts = {side: torch.zeros(len(RATIOS), dtype=torch.float64) for side in denoisers}
    row = 0
    for speech, image, ids in batches:
        random = CounterRNG(seed, torch.arange(row, row + len(ids), device=ids.device))
        row += len(ids)
        speech, image = (Encoded(each.embedding, each.tokens.float(), each.mask) for each in (speech, image))
        for side, denoiser in denoisers.items():
            clean, context = (speech, image) if side == "speech" else (image, speech)
            for column, ratio in enumerate(RATIOS):
                distances, count = _distances(denoiser, clean, context, ids, ratio, side, settings, random)
                sums[side][:, column] += distances
                counts[side][column] += count
    if not row:
        return {"reason": "there are no captions of two pictures"}
    curves: dict[str, Any] = {}
    for side in denoisers:
        means = (sums[side] / counts[side].clamp(min=1)).tolist()
        curves[side] = {"ratio": list(RATIOS), **dict(zip(_SEEN, means, strict=True))}
    return curves


def _distances(
    denoiser: Any,
    clean: Encoded,
    context: Encoded,
    ids: Tensor,
    ratio: float,
    side: str,
    settings: Denoising,
    random: CounterRNG,
) -> tuple[Tensor, float]:
    """Sum of the distances of the counted tokens, float64 [4] in the order of `_SEEN`, and their number."""
    span = settings.span if side == "speech" else 1  # as in training
    noise = (settings.noise, ratio, span, settings.snr_db, random, settings.swap_group)
    noised = add_noise(clean.tokens, clean.mask, ids, *noise)
    counted = noised.positions if ratio else clean.mask
    other = context[torch.arange(len(ids), device=ids.device).roll(1)]
    rebuilt = [
        noised.tokens,
        denoiser(noised.tokens, clean.mask, context.tokens, context.mask),
        denoiser(noised.tokens, clean.mask, other.tokens, other.mask),
        denoiser(noised.tokens, clean.mask, None),
    ]
    distances = [1 - F.cosine_similarity(tokens.float(), clean.tokens.float(), dim=-1) for tokens in rebuilt]
    sums = [torch.where(counted, distance, 0).sum(dtype=torch.float64) for distance in distances]
    return torch.stack(sums).cpu(), float(counted.sum())
