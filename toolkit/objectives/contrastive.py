r"""SIC, speech-image contrastive: the coarse alignment of global embeddings.

With unit embeddings :math:`s_i, v_i` of the student, keys :math:`s'_m, v'_m` of the momentum encoder, picture ids `id`
and temperature :math:`\tau`, over the M keys of all ranks' batches and the queue:

.. math::
    p^{s2i}_{im} &= \exp(s_i \cdot v'_m / \tau) / \sum_{m'} \exp(s_i \cdot v'_{m'} / \tau) \\
    q^{s2i}_{im} &= \exp(s'_i \cdot v'_m / \tau) / \sum_{m'} \exp(s'_i \cdot v'_{m'} / \tau) \\
    y^{s2i}_{im} &= \alpha q^{s2i}_{im} + (1 - \alpha) [id_m = id_i] / |\{m' : id_{m'} = id_i\}| \\
    L &= \frac{1}{2B} \sum_i [ H(y^{s2i}_i, p^{s2i}_i) + H(y^{i2s}_i, p^{i2s}_i) ]

with H the cross-entropy, and i2s as s2i with speech and image exchanged.

The B x M logits are never materialized at once. Targets sum to 1, so with logits :math:`z_{im} = s_i \cdot v'_m / \tau`
a row's

.. math::
    H_i &= \log \sum_m \exp z_{im} - \sum_m y_{im} z_{im} \\
    \partial H_i / \partial s_i &= \frac{1}{\tau} \sum_m (p_{im} - y_{im}) v'_m \\
    \partial H_i / \partial \tau &= -\frac{1}{\tau} s_i \cdot \partial H_i / \partial s_i \\
    \partial H_i / \partial v'_m &= \frac{1}{\tau} (p_{im} - y_{im}) s_i

depend on that row alone. The forward pass iterates over blocks of rows and computes loss and gradients of each block
from its logits; the backward pass only scales the gradients. Nothing is computed twice, and the memory is a few times
that of one block: `BLOCK` numbers, or the M of a single row if that is more.

Source: the softmax in both directions, the queue and momentum distillation are arXiv 2408.13119's SIC. The rest is our
reading, after ALBEF (arXiv 2107.07651, equations 1, 2 and 6, and its retrieval code): how the targets mix, their even
spread over all entries of one picture, and q at the student's temperature, without gradient. Where ALBEF's equation 6
has the KL divergence there is H here: the same gradient, another constant. Gradients taken in the forward pass are the
way of Liger kernels' fused linear cross-entropy (arXiv 2410.10989).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EMPTY = -1  # picture id of an empty queue slot
BLOCK = 2**22  # logits computed at once: 16 MB in float32, and a few more tensors of that size


def contrastive_loss(
    speech: Tensor,
    image: Tensor,
    speech_keys: Tensor | Sequence[Tensor],
    image_keys: Tensor | Sequence[Tensor],
    ids: Tensor,
    key_ids: Tensor,
    temperature: Tensor,
    alpha: float = 0.0,
    own_speech_keys: Tensor | None = None,
    own_image_keys: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Symmetric contrastive loss over batch and queue, with momentum distillation: this module's equation.

    Without a momentum encoder, the keys are the student embeddings of all ranks with gradient (`gather_packed`). Not
    twice differentiable.

    Args:
        speech: Student embeddings [B, D] of this rank's rows.
        image: Student embeddings [B, D], likewise.
        speech_keys: Keys [M, D] of all ranks' rows, then of the queue; or a sequence of parts, which avoids a copy.
        image_keys: Keys [M, D], likewise.
        ids: Int64 [B], picture ids of the rows; each occurs among the keys.
        key_ids: Int64 [M], picture ids of the keys; -1 marks an empty slot, which is ignored.
        temperature: Scalar; its gradient is that of p only.
        alpha: Weight of the soft targets.
        own_speech_keys: Momentum embeddings [B, D] of this rank's rows; required if alpha is not 0.
        own_image_keys: Momentum embeddings [B, D], likewise.
        block: Number of logits computed at once; affects memory and time, not the result.

    Returns:
        Scalar, the mean over this rank's B rows.

    Raises:
        ValueError: `alpha` is not 0 and the momentum embeddings of the rows are missing.
    """
    if alpha and (own_speech_keys is None or own_image_keys is None):
        raise ValueError("soft targets (alpha not 0) need own_speech_keys and own_image_keys")
    rows = max(1, block // len(key_ids))

    def direction(queries: Tensor, keys: Tensor | Sequence[Tensor], own: Tensor | None) -> Tensor:
        parts = [_at_least_float32(part) for part in ([keys] if isinstance(keys, Tensor) else keys)]
        own = _at_least_float32(own) if alpha and own is not None else None
        wide = _at_least_float32(queries)
        return _CrossEntropy.apply(wide, temperature.to(wide.dtype), own, ids, key_ids, alpha, rows, *parts)

    with torch.autocast(speech.device.type, enabled=False):
        to_image = direction(speech, image_keys, own_speech_keys)
        to_speech = direction(image, speech_keys, own_image_keys)
    return (to_image + to_speech) / 2


class _CrossEntropy(torch.autograd.Function):
    """One direction: mean H(y, p) of queries [B, D] over keys [M, D] given in parts, computed in blocks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        temperature: Tensor,
        own: Tensor | None,
        ids: Tensor,
        key_ids: Tensor,
        alpha: float,
        rows: int,
        *parts: Tensor,
    ) -> Tensor:
        """Compute the loss, and save its gradients for a unit output gradient."""
        # Finite, so that its product with a target of 0 is 0; and far below any logit.
        bias = queries.new_zeros(len(key_ids)).masked_fill_(key_ids == EMPTY, torch.finfo(queries.dtype).min / 2)
        scaled = queries / temperature
        own_scaled = scaled[:0] if own is None else own / temperature
        total = queries.new_zeros(())
        needs_gradients = any(ctx.needs_input_grad)
        query_grad = torch.empty_like(queries) if needs_gradients else None
        key_grads = [torch.zeros_like(p) if n else None for p, n in zip(parts, ctx.needs_input_grad[7:], strict=True)]
        for first in range(0, len(queries), rows):
            chosen = slice(first, first + rows)
            targets = _hard_targets(ids[chosen], key_ids, queries.dtype)
            # One matrix product for both, so that the keys are read once.
            logits = _logits(torch.cat([scaled[chosen], own_scaled[chosen]]), parts, bias)
            logits, soft = logits.split([len(targets), len(logits) - len(targets)])
            if own is not None:
                targets.lerp_(soft.softmax(1), alpha)
            total -= torch.linalg.vecdot(targets, logits).sum()
            highest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(highest).exp_()
            normalizer = exponentials.sum(1, keepdim=True)
            total += (normalizer.log() + highest).sum()
            if query_grad is not None:
                residual = targets.addcmul_(exponentials, normalizer.reciprocal(), value=-1)  # y - p
                query_grad[chosen] = _gradients(residual, scaled[chosen], parts, key_grads)
        if query_grad is not None:
            _save_gradients(ctx, query_grad / temperature, key_grads, queries, temperature)
        return total / len(queries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients."""
        query_grad, temperature_grad, *key_grads = ctx.saved_tensors
        scale = grad / len(query_grad)
        keys = [None if part is None else part * scale for part in key_grads]
        return query_grad * scale, temperature_grad * scale, None, None, None, None, None, *keys


def _hard_targets(ids: Tensor, key_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute hard targets [b, M]: 1 / n for each of the n keys of a row's picture."""
    same = (ids[:, None] == key_ids).to(dtype)
    return same.mul_(same.sum(1, keepdim=True).clamp_(min=1).reciprocal_())


def _logits(scaled: Tensor, parts: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Compute logits [b, M] of queries [b, D] that are already divided by the temperature, with `bias` [M] added."""
    logits = scaled.new_empty(len(scaled), len(bias))
    sizes = [len(part) for part in parts]
    for part, part_bias, output in zip(parts, bias.split(sizes), logits.split(sizes, 1), strict=True):
        torch.addmm(part_bias, scaled, part.T, out=output)
    return logits


def _gradients(residual: Tensor, scaled: Tensor, parts: Sequence[Tensor], key_grads: Sequence[Tensor | None]) -> Tensor:
    """Return the block's query gradients, (p - y) times keys, [b, D], from y - p [b, M]; add its key gradients."""
    columns = residual.split([len(part) for part in parts], 1)
    for column, key_grad in zip(columns, key_grads, strict=True):
        if key_grad is not None:
            key_grad.addmm_(column.T, scaled, alpha=-1)
    query_grad = torch.zeros_like(scaled)
    for column, part in zip(columns, parts, strict=True):
        query_grad.addmm_(column, part, alpha=-1)
    return query_grad


def _save_gradients(
    ctx: Any, query_grad: Tensor, key_grads: Sequence[Tensor | None], queries: Tensor, temperature: Tensor
) -> None:
    """Save the gradients for the backward pass, with that of the temperature."""
    temperature_grad = -(queries * query_grad).sum() / temperature
    ctx.save_for_backward(query_grad, temperature_grad, *key_grads)


def _at_least_float32(embeddings: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is wider."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
