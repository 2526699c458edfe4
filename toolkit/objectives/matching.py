r"""SIM, speech-image matching: the fine alignment by the fusion encoder, on hard negatives.

For speech i, a negative image m is sampled from the keys of other pictures, :math:`id_m \ne id_i`, in the batch of all
ranks and in the queue of earlier pairs; likewise a negative speech for image i:

.. math:: P(m | i) \propto \exp(s_i \cdot v'_m / \tau)

The fusion encoder classifies pairs as matching or not, with n(i) the sample, p its softmax and H the cross-entropy:

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
        image: Int64 [B], for each utterance the key row of a non-matching picture.
        speech: Int64 [B], for each picture the key row of a non-matching utterance.
        valid: Bool [2, B], for `image` and `speech`; False if there is no key of another picture.
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
    """Sample one non-matching picture and one non-matching utterance per row, with softmax probabilities.

    All samples are drawn by one batched inversion of the cumulative distribution, without synchronizing with the
    device. If the weights of a row have no finite positive sum, its negatives are sampled uniformly.

    Args:
        speech: Embeddings [B, D] of this rank's rows.
        image: Embeddings [B, D], likewise.
        speech_keys: Embeddings [N, D] to sample from: the batch of this rank or of all ranks, then the queue.
        image_keys: Embeddings [N, D], likewise.
        ids: Int64 [B], picture ids of the rows.
        key_ids: Int64 [N], picture ids of the keys; -1 is never sampled.
        temperature: Scalar.
        uniforms: [2, B] in [0, 1), one per sample. Sliced from one array over the global batch, they give the same
            samples for any world size.
    """
    with torch.autocast(speech.device.type, enabled=False):
        dtype = torch.promote_types(speech.dtype, torch.float32)
        queries, keys = torch.stack([speech, image]).to(dtype), torch.stack([image_keys, speech_keys]).to(dtype)
        similarity = queries @ keys.mT / temperature  # [2, B, N]
    allowed = (ids[:, None] != key_ids) & (key_ids != EMPTY)
    weights = similarity.masked_fill(~allowed, -torch.inf).softmax(-1)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total.isfinite() & (total > 0), weights, allowed.to(dtype))
    index = _sample(weights, uniforms)
    # Rounding in the cumulative sum could select a key of weight 0: check against the mask.
    valid = allowed.expand_as(weights).gather(-1, index[..., None]).squeeze(-1)
    return Negatives(index[0], index[1], valid)


def _sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Sample indices [...] with weights [..., N] >= 0: the first with a cumulative weight above u * total."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    # If u rounds to 1, the target would be the total, which no cumulative weight exceeds.
    target = torch.minimum(uniforms[..., None].to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)


def matching_loss(positive: Tensor, negative_image: Tensor, negative_speech: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of match against no match over one positive and two negatives per row: this module's equation.

    Args:
        positive: Logits [B, 2] of the matching pairs; index 1 is the match.
        negative_image: Logits [B, 2] of each utterance with its negative picture.
        negative_speech: Logits [B, 2] of each picture with its negative utterance.
        valid: Bool [2, B], as returned by `draw_negatives`; an invalid negative adds 0 to the sum.

    Returns:
        Scalar, the sum divided by 3B.
    """
    logits = torch.cat([positive, negative_image, negative_speech])
    match, counted = _labels(valid)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, match.long(), reduction="none")
        return torch.where(counted, losses, 0).sum() / len(losses)


@torch.no_grad()
def matching_accuracy(positive: Tensor, negative_image: Tensor, negative_speech: Tensor, valid: Tensor) -> Tensor:
    """Balanced accuracy over matching and non-matching pairs; chance is 0.5.

    Args:
        positive: As for `matching_loss`.
        negative_image: As for `matching_loss`.
        negative_speech: As for `matching_loss`.
        valid: As for `matching_loss`.
    """
    right = torch.cat([positive.argmax(-1) == 1, negative_image.argmax(-1) == 0, negative_speech.argmax(-1) == 0])
    match, counted = _labels(valid)
    kinds = [match, ~match & counted]
    return torch.stack([(right & kind).sum() / kind.sum().clamp(min=1) for kind in kinds]).mean()


def _labels(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each of 3B pairs matches, and whether it is valid."""
    rows = valid.shape[1]
    match = torch.arange(3 * rows, device=valid.device) < rows
    return match, torch.cat([torch.ones_like(valid[0]), valid.flatten()])
