r"""SIC, speech-image contrastive: the coarse alignment of global vectors.

With unit vectors :math:`s_i, v_i` of the student, keys :math:`s'_m, v'_m` of the momentum encoder, identities `id` of
pictures and temperature :math:`\tau`, over the M keys of all ranks' batch and the queue:

.. math::
    p^{s2i}_{im} &= \exp(s_i \cdot v'_m / \tau) / \sum_{m'} \exp(s_i \cdot v'_{m'} / \tau) \\
    q^{s2i}_{im} &= \exp(s'_i \cdot v'_m / \tau) / \sum_{m'} \exp(s'_i \cdot v'_{m'} / \tau) \\
    y^{s2i}_{im} &= \alpha q^{s2i}_{im} + (1 - \alpha) [id_m = id_i] / |\{m' : id_{m'} = id_i\}| \\
    L &= \frac{1}{2B} \sum_i [ H(y^{s2i}_i, p^{s2i}_i) + H(y^{i2s}_i, p^{i2s}_i) ]

with H the cross-entropy, and i2s as s2i with speech and image exchanged.

Source: the softmax in both directions, the queue and momentum distillation are arXiv 2408.13119's SIC. The rest is our
reading, after ALBEF (arXiv 2107.07651, equations 1, 2 and 6, and its retrieval code): how the targets mix, their even
spread over all entries of one picture, and q at the student's temperature, without gradient. Where ALBEF's equation 6
has the KL divergence there is H here: the same gradient, another constant.
"""

import torch
from torch import Tensor

EMPTY = -1  # identity of a queue slot that holds nothing yet


def contrastive_loss(
    speech: Tensor,
    image: Tensor,
    speech_keys: Tensor,
    image_keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    temperature: Tensor,
    alpha: float = 0.0,
    own_speech_keys: Tensor | None = None,
    own_image_keys: Tensor | None = None,
) -> Tensor:
    """Symmetric contrastive loss over batch and queue, with momentum distillation: this module's equation.

    Without a momentum encoder the keys are all ranks' student vectors with their gradient (`gather_with_grad`).

    Args:
        speech: [B, D] student's vectors of this rank's rows.
        image: [B, D] alike.
        speech_keys: [M, D] keys of all ranks' rows, then the queue.
        image_keys: [M, D] alike.
        ids: int64 [B] picture identities, each of them among the keys.
        key_ids: int64 [M]; -1 marks an empty slot, which counts nowhere.
        temperature: Scalar; its gradient comes from p alone.
        alpha: Weight of the soft targets.
        own_speech_keys: [B, D] momentum vectors of this rank's rows; needed if alpha is not 0.
        own_image_keys: [B, D] alike.

    Returns:
        Scalar, the mean over this rank's B rows.

    Raises:
        ValueError: alpha is not 0 and the momentum vectors of the rows are missing.
    """
    if alpha and (own_speech_keys is None or own_image_keys is None):
        raise ValueError("soft targets (alpha not 0) need own_speech_keys and own_image_keys")
    valid = key_ids != EMPTY
    positive = ids[:, None] == key_ids
    with torch.autocast(speech.device.type, enabled=False):
        to_image = _cross_entropy(speech, image_keys, own_speech_keys, positive, valid, temperature, alpha)
        to_speech = _cross_entropy(image, speech_keys, own_image_keys, positive, valid, temperature, alpha)
    return (to_image + to_speech) / 2


def _cross_entropy(
    queries: Tensor,
    keys: Tensor,
    own_keys: Tensor | None,
    positive: Tensor,
    valid: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """One direction: queries [B, D] against keys [M, D], of which `positive` [B, M] are right and `valid` [M] count."""
    logits = _similarity(queries, keys) / temperature
    targets = positive.to(logits.dtype) / positive.sum(1, keepdim=True).clamp(min=1)
    if alpha and own_keys is not None:
        with torch.no_grad():
            soft = _similarity(own_keys, keys) / temperature
            targets = torch.lerp(targets, soft.masked_fill(~valid, -torch.inf).softmax(1), alpha)
    # Targets sum to 1 and are 0 on empty slots, so H(y, p) = logsumexp - sum(y logits), without any 0 * inf.
    return (logits.masked_fill(~valid, -torch.inf).logsumexp(1) - (targets * logits).sum(1)).mean()


def _similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Dot products [B, M], in float32 or wider."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.to(dtype) @ keys.to(dtype).T
