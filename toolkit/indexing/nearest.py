"""Exact nearest neighbors by dot product."""

import torch
from torch import Tensor

from toolkit.indexing.store import Index

_CHUNK_VALUES = 1 << 20  # of the index, converted to float32 at once; larger chunks leave the cache
_QUERIES = 256  # searched at once


def nearest(index: Index, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the best rows of an index by dot product, exactly, reading the index once in chunks.

    Args:
        index: The index, with N rows.
        queries: Float32 [Q, D], of unit length.
        k: Results per query, at most N.

    Returns:
        Float32 [Q, k] and rows int64 [Q, k], best first; of equal scores the lower row is first.
    """
    k = min(k, len(index))
    parts = [_nearest(index, part, k) for part in queries.split(_QUERIES)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _nearest(index: Index, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = torch.empty(len(queries), 0)
    best_rows = torch.empty(len(queries), 0, dtype=torch.int64)
    buffer = torch.empty(max(1, _CHUNK_VALUES // index.head.dim), index.head.dim)
    for start, chunk in index.chunks(len(buffer)):
        block = buffer[: len(chunk)].copy_(torch.from_numpy(chunk))
        scores = (queries @ block.T).nan_to_num_(nan=-torch.inf)
        rows = torch.arange(start, start + len(chunk))
        if best.shape[1] == k:  # a later row with the score of the k-th does not displace it
            better = (scores > best[:, -1:]).any(dim=0).nonzero().flatten()
            scores, rows = scores[:, better], rows[better]
        merged = torch.cat([best, scores], dim=1)
        merged_rows = torch.cat([best_rows, rows.expand(len(queries), -1)], dim=1)
        order = merged.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best, best_rows = merged.gather(1, order), merged_rows.gather(1, order)
    return best, best_rows
