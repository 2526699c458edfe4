"""Transformer layers, and the head of both encoders.

torch's transformer layers read their children's weights without calling the children, which bypasses ZeRO-3's hooks;
here every weight is used in the `forward` of the module that owns it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention from x to a source; self-attention if the source is x.

    Weights are initialized like those of `torch.nn.MultiheadAttention`.

    Args:
        width: Size of x, of the source and of the output.
        heads: Number of heads; must divide `width`.
        dropout: Dropout of the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        bound = math.sqrt(6 / (4 * width))  # Xavier uniform of queries, keys and values as one matrix
        for linear in (self.query, self.key_value):
            nn.init.uniform_(linear.weight, -bound, bound)
        for linear in (self.query, self.key_value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x [B, L, W] to the positions of source [B, S, W] where mask, bool [B, S], is True; None: all."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU in between; the inner width is four times the outer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by layer norm (post-norm, as in SpeechCLIP's head)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map x [B, L, W] to [B, L, W]; mask, bool [B, L], is False on padding."""
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        return self.feed_forward_norm(x + self.feed_forward(x))


class ClassToken(nn.Module):
    """A learned token prepended to a sequence; initialized with a standard deviation of 0.02, as in BERT and ViT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Prepend the token to x [B, L, W], giving [B, 1 + L, W], and True to the mask."""
        x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return x, None if mask is None else F.pad(mask, (1, 0), value=True)


class FrozenLinear(nn.Linear):
    """Linear layer with buffers as weights: never trained, and not partitioned by ZeRO-3.

    Teacher and student share them even if they compute in different precisions.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        for name, parameter in linear.named_parameters():
            delattr(self, name)
            self.register_buffer(name, parameter.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., W] to [..., D]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Head(nn.Module):
    """Head of an encoder: maps a trunk's tokens to an embedding of unit length and token features.

    With layers: a class token is prepended, the sequence passes through post-norm transformer layers and a layer norm,
    and the class token is projected (the parallel branch of SpeechCLIP, arXiv 2210.00705). Without layers: `segments`
    concatenated means of the tokens are projected, and the tokens are returned unchanged.
    """

    def __init__(self, width: int, embed_dim: int, layers: int, heads: int, dropout: float, segments: int = 1) -> None:
        super().__init__()
        self.class_token = ClassToken(width) if layers else None
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if layers else None
        self.project = nn.Linear(width if layers else segments * width, embed_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode the tokens.

        Args:
            tokens: [B, L, W].
            mask: Bool [B, L], False on padding; None: no padding.
            pooled: [B, segments * W], input of the projection if there are no layers; None: the mean of the tokens.

        Returns:
            Embedding [B, D], float32, of unit length; tokens [B, L, W].
        """
        if self.class_token is not None and self.norm is not None:
            x, mask = self.class_token(tokens, mask)
            for layer in self.layers:
                x = layer(x, mask)
            x = self.norm(x)
            pooled, tokens = x[:, 0], x[:, 1:]
        elif pooled is None:
            pooled = masked_mean(tokens, mask)
        return F.normalize(self.project(pooled).float(), dim=-1), tokens


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [..., W] of the tokens [..., L, W] where mask, bool [..., L], is True; zeros where no element is True."""
    if mask is None:
        return tokens.mean(dim=-2)
    weight = mask.to(tokens.dtype)
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1)
    return (weight.unsqueeze(-2) @ tokens.masked_fill(~mask.unsqueeze(-1), 0)).squeeze(-2)
