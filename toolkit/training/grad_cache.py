r"""Cached-gradient steps: SIC over a whole accumulated batch, in the memory of one micro-batch.

SIC compares every row with all others, so the micro-batches' losses do not make up the loss L of the whole batch. But
L reads the rows through their embeddings alone. With :math:`s_r, v_r` the embeddings of row r, :math:`\tau` the temperature
and :math:`\theta` the weights,

.. math::
    \frac{dL}{d\theta} = \sum_r \Big[ \frac{\partial L}{\partial s_r} \frac{ds_r}{d\theta}
    + \frac{\partial L}{\partial v_r} \frac{dv_r}{d\theta} \Big]
    + \frac{\partial L}{\partial \tau} \frac{d\tau}{d\theta}

1. Without a graph, the embeddings of all micro-batches.
2. Keys of all ranks, L and its partial derivatives, on the embeddings alone.
3. Each micro-batch once more with its graph: SIM and CMD as ever, and in place of SIC a term with the value L, the
   gradient of which is the micro-batch's part of the sum above.

The price is the second forward pass of the encoders, frozen parts included. Both passes of a micro-batch have to draw
the same dropout, and so each begins with the micro-batch's seed.

Source: GradCache, arXiv 2101.06983, section 3.2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shards.reading.dataset import Batch
from toolkit.training.learner import CachedGradients, ContrastiveKeys, Learner
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


def make_caches(
    learner: Learner,
    batches: Sequence[Batch],
    seed: Callable[[int], object],
    teacher: MomentumEncoder | None,
    queue: EmbeddingQueue,
    alpha: float,
) -> list[CachedGradients]:
    """Do the first two of the three parts of a step.

    Args:
        learner: Every rank calls this with its own.
        batches: This rank's micro-batches of one step, of equal size.
        seed: Called with a micro-batch's place before its forward pass, and to be called so before its second one.
        teacher: As the learner's `forward` takes it.
        queue: Alike.
        alpha: Alike.

    Returns:
        For each micro-batch what the learner's `forward` needs for the third part.
    """
    parts = []
    with torch.no_grad():
        for place, batch in enumerate(batches):
            seed(place)
            parts.append(learner.embeddings(batch, teacher))
        temperature = learner.model.temperature().requires_grad_()
    speech, image, clean_speech, clean_image = (torch.cat(part) for part in zip(*parts, strict=True))
    speech.requires_grad_()
    image.requires_grad_()
    if teacher is None:
        clean_speech, clean_image = speech, image
    ids = torch.cat([batch.ids for batch in batches])
    keys = learner.keys(clean_speech, clean_image, ids, differentiable=teacher is None)
    loss = learner.contrast(speech, image, keys, queue, ids, temperature, alpha)
    by_speech, by_image, by_temperature = torch.autograd.grad(loss, (speech, image, temperature))
    count = len(batches)  # the engine takes the mean over the micro-batches, and this is a sum
    rows = zip((count * by_speech).chunk(count), (count * by_image).chunk(count), strict=True)
    return [
        CachedGradients(loss.detach(), *of_micro, by_temperature, _keys_of(keys, place, count, learner.world_size))
        for place, of_micro in enumerate(rows)
    ]


def _keys_of(keys: ContrastiveKeys, place: int, count: int, world_size: int) -> ContrastiveKeys:
    """The keys of one of `count` micro-batches, of all ranks; those of the step lie rank by rank."""

    def cut(whole: Tensor) -> Tensor:
        return whole.detach().unflatten(0, (world_size, count, -1))[:, place].flatten(0, 1)

    return ContrastiveKeys(cut(keys.speech), cut(keys.image), cut(keys.ids))
