"""Approximate search in a large index: each embedding is in the list of its nearest centroid, and few lists are read.

    approximate-000003/        of generation 3 of the index; renamed to this name when it is complete
        approximate.json       {"format", "lists", "probes", "recall", "sample"}
        centroids.npy          float32 [C, D], unit length, by k-means
        bounds.npy             int64 [C + 1]: list c holds the rows bounds[c] to bounds[c + 1] of the next two
        embeddings.npy         [N, D], a second copy, sorted by list
        rows.npy               int64 [N], their rows in the index

It is the inverted file of faiss (IndexIVFFlat). faiss makes it; but what is stored are plain arrays, since reading a
faiss file that may come from anywhere is not safe (faiss issue 5400). Scores are exact; only results can be missed.
"""

import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.files import sync
from shards.progress import progress_bar
from toolkit.indexing.nearest import nearest
from toolkit.indexing.store import Index, open_array, release

logger = logging.getLogger(__name__)

MIN_ITEMS = 1_000_000  # of an index that is searched approximately; below, exact search is fast
RECALL_AT, TARGET_RECALL = 10, 0.99  # as few lists are read as reach this recall@10
FORMAT = 1
_SAMPLE = 256  # queries that recall is measured with
_POINTS_PER_LIST = 64  # in k-means
_ROWS = 65_536  # assigned or copied at once
_HEAD = "approximate.json"
_MAX_HEAD = 1 << 16  # bytes


@dataclass(frozen=True)
class Measured:
    """Contents of `approximate.json`."""

    lists: int  # C, number of lists (nlist of faiss)
    probes: int  # number of lists that are read for a query (nprobe of faiss)
    recall: float  # share of the exact best 10 that are found, over queries of the indexed modality
    sample: int  # number of those queries

    def __str__(self) -> str:
        share = f"{100 * self.recall:.1f} %"
        return (
            f"approximate search reads {self.probes:,} of {self.lists:,} lists: recall@{RECALL_AT} of {share} against "
            f"exact search, measured with {self.sample:,} of the indexed items as queries"
        )


class ApproximateIndex:
    """An approximate index, opened for reading; its arrays are memory maps.

    Args:
        folder: Its folder.
        index: The index that it belongs to, of at least one item.

    Raises:
        UserError: It is damaged.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        rows, dim, path = index.head.rows, index.head.dim, folder / _HEAD
        try:
            if path.stat().st_size > _MAX_HEAD:
                raise ValueError(f"more than {_MAX_HEAD:,} bytes")
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError("of another format")
            self.measured = Measured(**values)
            lists, probes, recall = self.measured.lists, self.measured.probes, self.measured.recall
            if not (type(lists) is type(probes) is int and 1 <= probes <= lists <= rows and 0 <= recall <= 1):
                raise ValueError(f"{probes} of {lists} lists, recall {recall}")
            self.centroids = torch.from_numpy(open_array(folder / "centroids.npy", (lists, dim), "float32"))
            self.bounds = np.array(open_array(folder / "bounds.npy", (lists + 1,), "int64"))
            if self.bounds[0] != 0 or self.bounds[-1] != rows or (np.diff(self.bounds) < 0).any():
                raise ValueError("bounds of the lists do not cover the items")
            self.embeddings = open_array(folder / "embeddings.npy", (rows, dim), index.head.dtype)
            self.rows = open_array(folder / "rows.npy", (rows,), "int64")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{folder} is damaged ({reason}): run index.py again, or pass --exact") from None
        self.folder = folder

    def nearest(self, queries: Tensor, k: int, probes: int | None = None) -> tuple[Tensor, Tensor]:
        """Find the best rows among the lists whose centroids are nearest; see `toolkit.indexing.nearest.nearest`.

        Args:
            queries: Float32 [Q, D], of unit length.
            k: Results per query, at most N.
            probes: Lists read for a query, more if they have fewer than k rows; None: as measured.

        Raises:
            UserError: The approximate index is damaged.
        """
        k = min(k, len(self.rows))
        results = [self._nearest(query, k, probes or self.measured.probes) for query in queries]
        if not results:
            return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
        return torch.stack([scores for scores, _ in results]), torch.stack([rows for _, rows in results])

    def _nearest(self, query: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
        order = (self.centroids @ query).argsort(descending=True).numpy()
        sizes = np.diff(self.bounds)[order].cumsum()
        lists = order[: max(probes, int(np.searchsorted(sizes, k)) + 1)]
        scores, rows = [], []
        for start, stop in zip(self.bounds[lists].tolist(), self.bounds[lists + 1].tolist(), strict=True):
            scores.append(torch.from_numpy(np.asarray(self.embeddings[start:stop])).float() @ query)
            rows.append(np.array(self.rows[start:stop]))
            release(self.embeddings, start, stop)
        candidates = torch.from_numpy(np.concatenate(rows))
        if int(candidates.min()) < 0 or int(candidates.max()) >= len(self.rows):
            raise UserError(f"{self.folder} is damaged (rows outside of the index): remove it, or pass --exact")
        candidates, order_of_rows = candidates.sort()  # of equal scores the lower row is first
        values = torch.cat(scores).nan_to_num_(nan=-torch.inf)[order_of_rows]
        best = values.sort(descending=True, stable=True).indices[:k]
        return values[best], candidates[best]


def open_approximate(index: Index) -> ApproximateIndex | None:
    """Open the approximate index of an index; None if it has none.

    One that an update left behind is ignored, with a line.

    Raises:
        UserError: It is damaged.
    """
    folder = index.folder / index.head.approximate_name
    if folder.is_dir() and len(index):
        return ApproximateIndex(folder, index)
    if any(path.is_dir() and path.suffix != ".tmp" for path in index.folder.glob("approximate-*")):
        logger.warning(
            "%s: its approximate index is of another state and is not used: run index.py again", index.folder
        )
    return None


def refresh(index: Index, min_items: int = MIN_ITEMS) -> Measured | None:
    """Make the approximate index of a large index, unless it is there; that of a small one is removed.

    Args:
        index: The index, locked for writing.
        min_items: Number of items from which on there is one.

    Returns:
        What was measured; None if there is no approximate index.
    """
    folder = index.folder / index.head.approximate_name
    if len(index) < max(1, min_items):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if folder.is_dir():
        try:
            return ApproximateIndex(folder, index).measured
        except UserError:
            logger.warning("%s is damaged and is made again", folder)
            shutil.rmtree(folder)
    try:
        import faiss  # noqa: F401
    except ImportError:
        logger.warning(
            "%s items are searched exactly: pip install 'speech-image-toolkit[index]' and run index.py again for "
            "approximate search",
            f"{len(index):,}",
        )
        return None
    return build(index, folder)


def build(index: Index, folder: Path) -> Measured:
    """Divide the embeddings of an index into lists, and measure how many of them have to be read."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    centroids, nearest_list = _divide(index)
    bounds = np.concatenate([[0], np.bincount(nearest_list, minlength=len(centroids)).cumsum()])
    rows = np.argsort(nearest_list, kind="stable")
    for name, array in (("centroids", centroids), ("bounds", bounds.astype(np.int64)), ("rows", rows.astype(np.int64))):
        np.save(temporary / f"{name}.npy", array)
    copy = np.lib.format.open_memmap(temporary / "embeddings.npy", "w+", index.embeddings.dtype, index.embeddings.shape)
    for start in range(0, len(rows), _ROWS):
        copy[start : start + _ROWS] = index.embeddings[rows[start : start + _ROWS]]
    copy.flush()
    _write_head(temporary, Measured(len(centroids), 1, 0.0, 0))
    measured = _measure(ApproximateIndex(temporary, index), index)
    _write_head(temporary, measured)
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)
    return measured


def _divide(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Centroids float32 [C, D] of 2 sqrt(N) lists, and the list of each row, int64 [N]."""
    import faiss

    lists = max(1, min(len(index), round(2 * math.sqrt(len(index)))))
    generator = np.random.default_rng(0)
    sample = np.sort(generator.choice(len(index), min(len(index), lists * _POINTS_PER_LIST), replace=False))
    means = faiss.Kmeans(
        index.head.dim, lists, niter=10, spherical=True, seed=0, max_points_per_centroid=_POINTS_PER_LIST,
        min_points_per_centroid=1,
    )  # fmt: skip
    logger.info("approximate index: k-means of %s lists", f"{lists:,}")
    means.train(_finite(index.embeddings[sample]))
    list_of_row = np.empty(len(index), np.int64)
    with progress_bar(len(index), "embeddings", "assigning") as progress:
        for start, chunk in index.chunks(_ROWS):
            list_of_row[start : start + len(chunk)] = means.index.search(_finite(chunk), 1)[1][:, 0]
            progress(len(chunk))
    return np.asarray(means.centroids, np.float32), list_of_row


def _finite(embeddings: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.ascontiguousarray(embeddings, np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _measure(approximate: ApproximateIndex, index: Index) -> Measured:
    """Double the lists that are read until the recall is reached; the item that is the query does not count."""
    generator, lists = np.random.default_rng(1), approximate.measured.lists
    sample = np.sort(generator.choice(len(index), min(len(index), _SAMPLE), replace=False))
    queries = torch.from_numpy(_finite(index.embeddings[sample]))
    own, wanted = torch.from_numpy(sample)[:, None], min(RECALL_AT, max(1, len(index) - 1)) + 1
    exact = nearest(index, queries, wanted)[1]
    probes = 1
    while True:
        candidates = approximate.nearest(queries, wanted, probes)[1]
        found = ((exact[:, :, None] == candidates[:, None, :]).any(dim=2) & (exact != own)).sum()
        recall = float(found / (exact != own).sum().clamp(min=1))
        if recall >= TARGET_RECALL or probes == lists:
            return Measured(lists, probes, recall, len(sample))
        probes = min(2 * probes, lists)


def _write_head(folder: Path, measured: Measured) -> None:
    (folder / _HEAD).write_text(json.dumps({"format": FORMAT, **asdict(measured)}) + "\n")
