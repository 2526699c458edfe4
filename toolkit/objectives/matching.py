r"""SIM, speech-image matching: the fine alignment by the fusion encoder, on hard negatives.

Speech i draws a wrong image m among the keys of other pictures, :math:`id_m \ne id_i`, of the batch of all ranks and of
the queue of earlier pairs; image i draws its speech alike:

.. math:: P(m | i) \propto \exp(s_i \cdot v'_m / \tau)

The fusion encoder tells matching pairs from these, with n(i) the draw, p its softmax and H the cross-entropy:

.. math:: L = \frac{1}{3B} \sum_i [ H(1, p(s_i, v_i)) + H(0, p(s_i, v_{n(i)})) + H(0, p(s_{n(i)}, v_i)) ]

Source: matching, and negatives mined by the contrastive similarities in the queue, are arXiv 2408.13119's SIM. How far
back the queue reaches (`objectives.matching.queue`), the softmax as their distribution and one positive with two
negatives a row are our reading, after ALBEF (arXiv 2107.07651, equation 4, section 3.2 and code).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.objectives.contrastive import EMPTY


@dataclass
class Negatives:
    """Hard negatives of B pairs.

    Attributes:
        image: int64 [B], row among the keys of a wrong picture for each speech.
        speech: int64 [B], row among the keys of a wrong speech for each picture.
        valid: bool [2, B], False where the keys hold no other picture; first for `image`, then for `speech`.
    """

    image: Tensor
    speech: Tensor
    valid: Tensor


@torch.no_grad()
def draw_negatives(
    speech: Tensor,
    image: Tensor,
    speech_keys: Tensor,
    image_keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    temperature: Tensor,
    uniforms: Tensor,
) -> Negatives:
    """Draw for each row one wrong picture and one wrong speech, the more similar the more likely.

    All draws are one batched inversion of the cumulative distribution, without waiting for the device. Where the
    weights do not sum to anything finite, every other picture is equally likely.

    Args:
        speech: [B, D] embeddings of this rank's rows.
        image: [B, D] alike.
        speech_keys: [N, D] embeddings to draw from: this rank's batch or all ranks', then the queue's.
        image_keys: [N, D] alike.
        ids: int64 [B] picture identities of the rows.
        key_ids: int64 [N]; -1 is never drawn.
        temperature: Scalar.
        uniforms: [2, B] in [0, 1), one a draw. Cut from one array over the global batch, they make the draws the same
            for any number of ranks.
    """
    with torch.autocast(speech.device.type, enabled=False):
        dtype = torch.promote_types(speech.dtype, torch.float32)
        queries, keys = torch.stack([speech, image]).to(dtype), torch.stack([image_keys, speech_keys]).to(dtype)
        similarity = queries @ keys.mT / temperature  # [2, B, N]
    allowed = (ids[:, None] != key_ids) & (key_ids != EMPTY)
    weights = similarity.masked_fill(~allowed, -torch.inf).softmax(-1)
    mass = weights.sum(-1, keepdim=True)
    weights = torch.where(mass.isfinite() & (mass > 0), weights, allowed.to(dtype))
    index = _invert(weights, uniforms)
    # The mask has the last word: it also stops what rounding in the cumulative sum could let through.
    valid = allowed.expand_as(weights).gather(-1, index[..., None]).squeeze(-1)
    return Negatives(index[0], index[1], valid)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an index [...] from weights [..., N] >= 0: the first whose cumulative weight is above u * total."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    # A uniform that rounds to 1 would ask for the total, which nothing exceeds.
    target = torch.minimum(uniforms[..., None].to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)


def matching_loss(positive: Tensor, negative_image: Tensor, negative_speech: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of match against no match over one positive and two negatives a row: this module's equation.

    Args:
        positive: [B, 2] logits of the matching pairs; index 1 is the match.
        negative_image: [B, 2] logits of each speech with its wrong picture.
        negative_speech: [B, 2] logits of each picture with its wrong speech.
        valid: bool [2, B], as `draw_negatives` gives it; a negative that is not valid adds 0 to the sum.

    Returns:
        Scalar, the sum over 3B.
    """
    logits = torch.cat([positive, negative_image, negative_speech])
    match, counted = _labels(valid)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, match.long(), reduction="none")
        return torch.where(counted, losses, 0).sum() / len(losses)


@torch.no_grad()
def matching_accuracy(positive: Tensor, negative_image: Tensor, negative_speech: Tensor, valid: Tensor) -> Tensor:
    """Share of the pairs that are told right, with matching and other pairs weighted alike: chance is 0.5.

    Args:
        positive: As for `matching_loss`.
        negative_image: Alike.
        negative_speech: Alike.
        valid: Alike.
    """
    right = torch.cat([positive.argmax(-1) == 1, negative_image.argmax(-1) == 0, negative_speech.argmax(-1) == 0])
    match, counted = _labels(valid)
    kinds = [match, ~match & counted]
    return torch.stack([(right & kind).sum() / kind.sum().clamp(min=1) for kind in kinds]).mean()


def _labels(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each of 3B pairs matches, and whether it counts."""
    rows = valid.shape[1]
    match = torch.arange(3 * rows, device=valid.device) < rows
    return match, torch.cat([torch.ones_like(valid[0]), valid.flatten()])
