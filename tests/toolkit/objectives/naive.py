"""References for the objectives: the papers' formulas as loops over scalars.

They share no code with the toolkit and use tensors only as numbers that remember their gradient.
"""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[d] * b[d] for d in range(len(a))), torch.zeros((), dtype=a.dtype))


def softmax(numbers: list[Tensor]) -> list[Tensor]:
    powers = [number.exp() for number in numbers]
    return [power / sum(powers) for power in powers]


def norm(a: Tensor) -> Tensor:
    return dot(a, a).sqrt()


def contrastive(
    speech, image, speech_keys, image_keys, ids, key_ids, temperature, alpha=0.0, own_speech=None, own_image=None
) -> Tensor:
    """ALBEF's image-text contrastive loss with momentum distillation, positives by identity."""
    kept = [m for m in range(len(key_ids)) if key_ids[m] != -1]
    total = 0.0
    for i in range(len(ids)):
        for query, own, keys in ((speech, own_speech, image_keys), (image, own_image, speech_keys)):
            p = softmax([dot(query[i], keys[m]) / temperature for m in kept])
            same = [1.0 if key_ids[m] == ids[i] else 0.0 for m in kept]
            target = [one / sum(same) for one in same]
            if alpha:
                q = softmax([dot(own[i], keys[m]).detach() / temperature.detach() for m in kept])
                target = [alpha * soft + (1 - alpha) * hard for soft, hard in zip(q, target, strict=True)]
            total = total - sum(y * x.log() for y, x in zip(target, p, strict=True)) / 2
    return total / len(ids)


def draw_probabilities(query: Tensor, keys: Tensor, own_id: int, key_ids: Tensor, temperature: float) -> list[float]:
    """Probability of each key to be sampled as a row's negative; all 0 if the row has none."""
    weights = [
        0.0 if key_ids[m] in (own_id, -1) else float((dot(query, keys[m]) / temperature).exp())
        for m in range(len(key_ids))
    ]
    return [weight / sum(weights) if sum(weights) else 0.0 for weight in weights]


def matching(positive: Tensor, negative_image: Tensor, negative_speech: Tensor, valid: Tensor) -> Tensor:
    total = 0.0
    for i in range(len(positive)):
        total = total - softmax(list(positive[i]))[1].log()
        for direction, logits in enumerate((negative_image, negative_speech)):
            if valid[direction, i]:
                total = total - softmax(list(logits[i]))[0].log()
    return total / (3 * len(positive))


def layer_norm(a: Tensor) -> list[Tensor]:
    mean = sum(a) / len(a)
    variance = sum((x - mean) ** 2 for x in a) / len(a)
    return [(x - mean) / (variance + 1e-5).sqrt() for x in a]


def denoising(predicted, target, positions, mask, loss: str, temperature: float) -> Tensor:
    target = target.detach()
    total = torch.zeros((), dtype=predicted.dtype)
    for b in range(len(predicted)):
        counted = [t for t in range(len(mask[b])) if positions[b, t] and mask[b, t]]
        real = [t for t in range(len(mask[b])) if mask[b, t]]
        for t in counted:
            x, y = predicted[b, t], target[b, t]
            if loss == "cosine":
                distance = 1 - dot(x, y) / (norm(x) * norm(y))
            elif loss == "mse":
                distance = sum((u - v) ** 2 for u, v in zip(layer_norm(x), layer_norm(y), strict=True)) / len(x)
            else:
                cosines = [dot(x, target[b, k]) / (norm(x) * norm(target[b, k])) for k in real]
                distance = -softmax([cosine / temperature for cosine in cosines])[real.index(t)].log()
            total = total + distance / len(counted)
    return total / len(predicted)


class Ring:
    """A queue of pairs as a plain list, the oldest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: list[tuple[list[float], list[float], int]] = []

    def push(self, speech: Tensor, image: Tensor, ids: Tensor) -> None:
        for i in range(len(ids)):
            self.entries.append((speech[i].tolist(), image[i].tolist(), int(ids[i])))
            while len(self.entries) > self.size:
                self.entries.pop(0)
