r"""Cached gradients: SIC over an accumulated batch, in the memory of one micro-batch.

SIC compares every row with all others, so the micro-batches' losses do not add up to the loss L of the accumulated
batch. But L reads the rows through their embeddings alone. With :math:`s_r, v_r` the embeddings of row r,
:math:`\tau` the temperature and :math:`\theta` the weights,

.. math::
    \frac{dL}{d\theta} = \sum_r \Big[ \frac{\partial L}{\partial s_r} \frac{ds_r}{d\theta}
    + \frac{\partial L}{\partial v_r} \frac{dv_r}{d\theta} \Big]
    + \frac{\partial L}{\partial \tau} \frac{d\tau}{d\theta}

1. Encode all micro-batches without a graph.
2. Gather the keys of all ranks; compute L and its partial derivatives with respect to the embeddings and the
   temperature.
3. Run each micro-batch again with its graph: SIM and CMD as usual, and in place of SIC a surrogate with the value L,
   the gradient of which is the micro-batch's part of the sum above.

The cost is a second forward pass of the encoders, frozen parts included. Both passes of a micro-batch have to draw the
same dropout masks, so each begins with the micro-batch's seed.

Source: GradCache, arXiv 2101.06983, section 3.2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shards.reading.dataset import Batch
from toolkit.training.learner import CachedGradients, Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import ContrastiveKeys, EmbeddingQueue


def cache_gradients(
    learner: Learner,
    batches: Sequence[Batch],
    seed: Callable[[int], object],
    teacher: MomentumEncoder | None,
    queue: EmbeddingQueue,
    alpha: float,
) -> list[CachedGradients]:
    """Compute SIC over a step's micro-batches and its gradients (steps 1 and 2); every rank calls this.

    Args:
        learner: The learner.
        batches: This rank's micro-batches of one step, of equal size.
        seed: Called with a micro-batch's number before its forward pass; call it again before the second one.
        teacher: As in the learner's `forward`.
        queue: As in the learner's `forward`.
        alpha: As in the learner's `forward`.

    Returns:
        For each micro-batch the argument `cached` of the learner's `forward` (step 3).
    """
    parts = []
    with torch.no_grad():
        for micro, batch in enumerate(batches):
            seed(micro)
            parts.append([encoded.embedding for encoded in learner.encode(batch, teacher)])
        temperature = learner.model.temperature().requires_grad_()
    speech, image, teacher_speech, teacher_image = (torch.cat(part) for part in zip(*parts, strict=True))
    speech.requires_grad_()
    image.requires_grad_()
    if teacher is None:
        teacher_speech, teacher_image = speech, image
    ids = torch.cat([batch.ids for batch in batches])
    keys = learner.gather_keys(teacher_speech, teacher_image, ids, differentiable=teacher is None)
    loss = learner.contrast(speech, image, keys, queue, ids, temperature, alpha)
    speech_grad, image_grad, temperature_grad = torch.autograd.grad(loss, (speech, image, temperature))
    count = len(batches)  # the engine takes the mean over the micro-batches, and this is a sum
    rows = zip((count * speech_grad).chunk(count), (count * image_grad).chunk(count), strict=True)
    return [
        CachedGradients(loss.detach(), *of_micro, temperature_grad, _keys_of(keys, micro, count, learner.world_size))
        for micro, of_micro in enumerate(rows)
    ]


def _keys_of(keys: ContrastiveKeys, micro: int, count: int, world_size: int) -> ContrastiveKeys:
    """Select the keys of one of `count` micro-batches, of all ranks; a step's keys are ordered rank by rank."""

    def select(rows: Tensor) -> Tensor:
        return rows.detach().unflatten(0, (world_size, count, -1))[:, micro].flatten(0, 1)

    return ContrastiveKeys(select(keys.speech), select(keys.image), select(keys.ids))
