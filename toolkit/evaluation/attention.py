"""Cross-attention of the fusion encoder: which patches of an image an utterance attends to, and when."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.model.fusion import pool_tokens
from toolkit.model.outputs import Encoded

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel


@dataclass(frozen=True)
class CrossAttention:
    """Attention weights of one utterance over the P patches of one image; each row sums to 1.

    Attributes:
        frames: Float32 [T, P] of each pooled speech frame, averaged over heads and over the layers in which frames
            attend: all but the last. T is 0 if the fusion encoder has one layer.
        match: Float32 [P] of the class token in the last layer, from which the match logit is computed, averaged over
            heads.
        logits: Float32 [2], the output of `SpeechImageModel.match`.
    """

    frames: Tensor
    match: Tensor
    logits: Tensor

    @property
    def total(self) -> Tensor:
        """Float32 [P], the mean over the frames; that of the class token if frames do not attend."""
        return self.frames.mean(dim=0) if len(self.frames) else self.match


@torch.no_grad()
def cross_attention(model: "SpeechImageModel", speech: Encoded, image: Encoded) -> CrossAttention:
    r"""Compute the attention weights of a pair in the fusion encoder.

    They are :math:`\mathrm{softmax}(Q K^\top / \sqrt{d})` of the queries and keys that the model computes in `match`,
    which is run unchanged. Attention shows where a layer reads from, which need not be why the pair matches
    (arXiv 1902.10186).

    Args:
        model: In evaluation mode. Hooks are registered meanwhile: no other thread may use it.
        speech: One encoded utterance.
        image: One encoded image.

    Raises:
        ValueError: There is more than one of them.
    """
    if len(speech.tokens) != 1 or len(image.tokens) != 1:
        raise ValueError(f"expected one pair, got {len(speech.tokens)} utterances and {len(image.tokens)} images")
    weights: list[Tensor] = []  # of each layer, [queries, P]

    def record(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        x, source = inputs[:2]
        query = attention.query(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        key = attention.key_value(source).chunk(2, dim=-1)[0].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights.append(scores.softmax(dim=-1)[0].mean(dim=0).cpu())

    layers: list[Any] = list(model.fusion.layers)
    hooks = [layer.cross_attention.register_forward_pre_hook(record) for layer in layers]
    try:
        logits = model.match(speech, image)[0].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    _, mask = pool_tokens(speech.tokens, speech.mask, model.fusion.pool)
    spoken = torch.ones(0, dtype=torch.bool) if mask is None else mask[0].cpu()
    patches = image.tokens.shape[1]
    frames = [layer[1:][spoken] for layer in weights[:-1]]  # the first query is the class token
    mean = torch.stack(frames).mean(dim=0) if frames else torch.empty(0, patches)
    return CrossAttention(mean, weights[-1][0], logits)
