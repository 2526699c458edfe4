r"""SIC, speech-image contrastive: the coarse alignment of global embeddings.

With unit embeddings :math:`s_i, v_i` of the student, keys :math:`s'_m, v'_m` of the momentum encoder, identities `id` of
pictures and temperature :math:`\tau`, over the M keys of all ranks' batch and the queue:

.. math::
    p^{s2i}_{im} &= \exp(s_i \cdot v'_m / \tau) / \sum_{m'} \exp(s_i \cdot v'_{m'} / \tau) \\
    q^{s2i}_{im} &= \exp(s'_i \cdot v'_m / \tau) / \sum_{m'} \exp(s'_i \cdot v'_{m'} / \tau) \\
    y^{s2i}_{im} &= \alpha q^{s2i}_{im} + (1 - \alpha) [id_m = id_i] / |\{m' : id_{m'} = id_i\}| \\
    L &= \frac{1}{2B} \sum_i [ H(y^{s2i}_i, p^{s2i}_i) + H(y^{i2s}_i, p^{i2s}_i) ]

with H the cross-entropy, and i2s as s2i with speech and image exchanged.

The B x M logits never exist at once. Targets sum to 1, so with logits :math:`z_{im} = s_i \cdot v'_m / \tau` a row's

.. math::
    H_i &= \log \sum_m \exp z_{im} - \sum_m y_{im} z_{im} \\
    \partial H_i / \partial s_i &= \frac{1}{\tau} \sum_m (p_{im} - y_{im}) v'_m \\
    \partial H_i / \partial \tau &= -\frac{1}{\tau} s_i \cdot \partial H_i / \partial s_i \\
    \partial H_i / \partial v'_m &= \frac{1}{\tau} (p_{im} - y_{im}) s_i

depend on that row alone. The forward pass walks over blocks of rows and takes value and gradients of a block while its
logits are there; the backward pass only scales what was found. Nothing is computed twice, and memory is a few times
that of one block: `BLOCK` numbers, or a single row's M where that is more.

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

EMPTY = -1  # identity of a queue slot that holds nothing yet
BLOCK = 2**22  # logits of the student that are held at once: 16 MB in float32, and some tensors of that size beside


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

    Without a momentum encoder the keys are all ranks' student embeddings with their gradient (`gather_packed`). Can be
    differentiated once.

    Args:
        speech: [B, D] student's embeddings of this rank's rows.
        image: [B, D] alike.
        speech_keys: [M, D] keys of all ranks' rows, then the queue; or these as parts, which are not copied together.
        image_keys: [M, D] alike.
        ids: int64 [B] picture identities, each of them among the keys.
        key_ids: int64 [M]; -1 marks an empty slot, which counts nowhere.
        temperature: Scalar; its gradient comes from p alone.
        alpha: Weight of the soft targets.
        own_speech_keys: [B, D] momentum embeddings of this rank's rows; needed if alpha is not 0.
        own_image_keys: [B, D] alike.
        block: Logits of the student held at once; changes memory and time, not the result.

    Returns:
        Scalar, the mean over this rank's B rows.

    Raises:
        ValueError: alpha is not 0 and the momentum embeddings of the rows are missing.
    """
    if alpha and (own_speech_keys is None or own_image_keys is None):
        raise ValueError("soft targets (alpha not 0) need own_speech_keys and own_image_keys")
    rows = max(1, block // len(key_ids))

    def direction(queries: Tensor, keys: Tensor | Sequence[Tensor], own: Tensor | None) -> Tensor:
        parts = [_wide(part) for part in ([keys] if isinstance(keys, Tensor) else keys)]
        own = _wide(own) if alpha and own is not None else None
        wide = _wide(queries)
        return _CrossEntropy.apply(wide, temperature.to(wide.dtype), own, ids, key_ids, alpha, rows, *parts)

    with torch.autocast(speech.device.type, enabled=False):
        to_image = direction(speech, image_keys, own_speech_keys)
        to_speech = direction(image, speech_keys, own_image_keys)
    return (to_image + to_speech) / 2


class _CrossEntropy(torch.autograd.Function):
    """One direction: mean H(y, p) of queries [B, D] against the parts of keys [M, D], a block of rows at a time."""

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
        """Give the loss, and keep its gradients for unit gradient: the logits are there now and not later."""
        # Finite, so that a target of 0 times it is 0; and far below any logit.
        hidden = queries.new_zeros(len(key_ids)).masked_fill_(key_ids == EMPTY, torch.finfo(queries.dtype).min / 2)
        scaled = queries / temperature
        own_scaled = scaled[:0] if own is None else own / temperature
        total = queries.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        by_query = torch.empty_like(queries) if wanted else None
        by_part = [torch.zeros_like(p) if n else None for p, n in zip(parts, ctx.needs_input_grad[7:], strict=True)]
        for first in range(0, len(queries), rows):
            chosen = slice(first, first + rows)
            targets = _shares(ids[chosen], key_ids, queries.dtype)
            # One product for both: the keys are read once.
            logits = _logits(torch.cat([scaled[chosen], own_scaled[chosen]]), parts, hidden)
            logits, soft = logits.split([len(targets), len(logits) - len(targets)])
            if own is not None:
                targets.lerp_(soft.softmax(1), alpha)
            total -= torch.linalg.vecdot(targets, logits).sum()
            highest = logits.amax(1, keepdim=True)
            powers = logits.sub_(highest).exp_()
            mass = powers.sum(1, keepdim=True)
            total += (mass.log() + highest).sum()
            if by_query is not None:
                lack = targets.addcmul_(powers, mass.reciprocal(), value=-1)  # y - p
                by_query[chosen] = _gradients(lack, scaled[chosen], parts, by_part)
        if by_query is not None:
            _keep(ctx, by_query / temperature, by_part, queries, temperature)
        return total / len(queries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` kept."""
        by_query, by_temperature, *by_part = ctx.saved_tensors
        scale = grad / len(by_query)
        keys = [None if part is None else part * scale for part in by_part]
        return by_query * scale, by_temperature * scale, None, None, None, None, None, *keys


def _shares(ids: Tensor, key_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Hard targets [b, M]: 1 / n on each of the n keys of a row's picture."""
    same = (ids[:, None] == key_ids).to(dtype)
    return same.mul_(same.sum(1, keepdim=True).clamp_(min=1).reciprocal_())


def _logits(scaled: Tensor, parts: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Logits [b, M] of queries [b, D], divided by the temperature already, with `hidden` [M] added."""
    logits = scaled.new_empty(len(scaled), len(hidden))
    sizes = [len(part) for part in parts]
    for part, hide, into in zip(parts, hidden.split(sizes), logits.split(sizes, 1), strict=True):
        torch.addmm(hide, scaled, part.T, out=into)
    return logits


def _gradients(lack: Tensor, scaled: Tensor, parts: Sequence[Tensor], by_part: Sequence[Tensor | None]) -> Tensor:
    """Sum of (p - y) times keys, [b, D], from y - p [b, M]; adds to `by_part` what the keys receive from the block."""
    columns = lack.split([len(part) for part in parts], 1)
    for column, into in zip(columns, by_part, strict=True):
        if into is not None:
            into.addmm_(column.T, scaled, alpha=-1)
    found = torch.zeros_like(scaled)
    for column, part in zip(columns, parts, strict=True):
        found.addmm_(column, part, alpha=-1)
    return found


def _keep(ctx: Any, by_query: Tensor, by_part: Sequence[Tensor | None], queries: Tensor, temperature: Tensor) -> None:
    """Save what the backward pass scales."""
    by_temperature = -(queries * by_query).sum() / temperature
    ctx.save_for_backward(by_query, by_temperature, *by_part)


def _wide(embeddings: Tensor) -> Tensor:
    """In float32 or wider."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
