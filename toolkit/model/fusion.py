"""Fusion encoder (SIM) and denoiser (CMD): queries of one modality attend to the other."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.model.layers import Attention, ClassToken, FeedForward, masked_mean


class FusionLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each preceded by layer norm (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None, first_only: bool
    ) -> Tensor:
        """Map x [B, L, W] to [B, L, W], or only its first token: [B, 1, W]."""
        normed = self.self_norm(x)
        queries = normed
        if first_only:
            x, queries = x[:, :1], normed[:, :1]
        x = x + self.dropout(self.self_attention(queries, normed, mask))
        if context is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), context, context_mask))
        return x + self.feed_forward(self.feed_forward_norm(x))


class FusionEncoder(nn.Module):
    """Transformer whose queries attend to each other and to a context of the other modality.

    Args:
        query_dim: Size of a query token.
        context_dim: Size of a context token.
        width: Hidden size, and size of the output.
        layers: Number of layers.
        heads: Attention heads per layer.
        dropout: Dropout of attention and feed-forward.
        pool: Number of neighboring queries that are averaged into one.
        output: "cls": return only a class token prepended to the queries; "tokens": return all queries.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        pool: int = 1,
        output: Literal["cls", "tokens"] = "cls",
    ) -> None:
        super().__init__()
        self.width = width
        self.pool = pool
        self.query_input = nn.Sequential(nn.Linear(query_dim, width), nn.LayerNorm(width))
        self.context_input = nn.Sequential(nn.Linear(context_dim, width), nn.LayerNorm(width))
        self.class_token = ClassToken(width) if output == "cls" else None
        self.layers = nn.ModuleList(FusionLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        query_mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode queries given a context.

        Args:
            queries: [B, L, Hq].
            query_mask: Bool [B, L], False on padding; None: no padding.
            context: [B, P, Hc]; None: skip cross-attention.
            context_mask: Bool [B, P], False on padding; None: no padding.

        Returns:
            [B, 1, width] for output "cls", [B, ceil(L / pool), width] for "tokens".
        """
        queries, mask = pool_tokens(queries, query_mask, self.pool)
        x = self._with_positions(self.query_input(queries))
        if context is not None:
            context = self._with_positions(self.context_input(context))
        if self.class_token is not None:
            x, mask = self.class_token(x, mask)
        for depth, layer in enumerate(self.layers, start=1):
            first_only = self.class_token is not None and depth == len(self.layers)
            x = layer(x, mask, context, context_mask, first_only)
        return self.norm(x)

    def _with_positions(self, x: Tensor) -> Tensor:
        return x + sinusoids(x.shape[1], self.width, x.device).to(x.dtype)


class Denoiser(nn.Module):
    """Predicts clean tokens of one modality from noised ones and the other modality (CMD, arXiv 2408.13705).

    There is no residual connection from input to output: the output is the clean features, not a correction.

    Args:
        token_dim: Size of the noised and the predicted tokens.
        context_dim: Size of a token of the other modality.
        width: Hidden size.
        layers: Number of layers.
        heads: Attention heads per layer.
        dropout: Dropout of attention and feed-forward.
    """

    def __init__(self, token_dim: int, context_dim: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.fusion = FusionEncoder(token_dim, context_dim, width, layers, heads, dropout, output="tokens")
        self.predict = nn.Linear(width, token_dim)

    def forward(
        self, noised: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Map noised tokens [B, L, H] to predicted ones [B, L, H], given context [B, P, Hc] or None."""
        return self.predict(self.fusion(noised, mask, context, context_mask))


def pool_tokens(tokens: Tensor, mask: Tensor | None, pool: int) -> tuple[Tensor, Tensor | None]:
    """Average each `pool` neighboring tokens, without padding: tokens [B, ceil(L / pool), H], and their mask."""
    if pool == 1:
        return tokens, mask
    missing = -tokens.shape[1] % pool
    if mask is None and missing:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    tokens = F.pad(tokens, (0, 0, 0, missing)).unflatten(1, (-1, pool))
    if mask is None:
        return tokens.mean(dim=2), None
    mask = F.pad(mask, (0, missing)).unflatten(1, (-1, pool))
    return masked_mean(tokens, mask), mask.any(dim=-1)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [length, width] of "Attention Is All You Need", sines first."""
    rates = torch.exp(torch.arange((width + 1) // 2, device=device) * (-2 * math.log(10000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
