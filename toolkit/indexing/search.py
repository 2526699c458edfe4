"""Search in an index: exact nearest neighbors by cosine, then re-ranking of the best by the match logit.

The scores are those of `toolkit/evaluation`: the best k by cosine are ordered by cosine + w * match logit, with the
weight w in the exported model, and the others follow in their order. Equal scores are ordered by position.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from shards.errors import UserError
from toolkit.config.schema import Evaluation, Fuse
from toolkit.evaluation.rerank import fuse_scores
from toolkit.indexing.encoder import Encoder, groups
from toolkit.indexing.items import FileSource, ItemSource, Modality, open_source, printable
from toolkit.indexing.nearest import nearest
from toolkit.indexing.store import Index
from toolkit.indexing.update import decode_batches
from toolkit.model.outputs import Encoded

logger = logging.getLogger(__name__)

_RERANK_BATCH = 32  # candidates encoded at once


@dataclass(frozen=True)
class Hit:
    """A result."""

    row: int  # in the index
    name: str  # of the item
    path: str  # path of the file, or shards and key
    cosine: float  # of the embeddings
    match: float | None  # match logit; None: not re-ranked
    score: float  # score by which the result is ordered; without re-ranking the cosine


class Searcher:
    """Searches an index with files of the other modality: images by voice, audio files by an image.

    Args:
        index: The index.
        encoder: The model that made it.
        fuse: Score of re-ranked results; see `toolkit/evaluation/rerank.py`.
        workers: Threads that decode candidates; None: one per core, at most 8.
        find: Finds the best rows by cosine; None: exactly, by `nearest`.
    """

    def __init__(
        self,
        index: Index,
        encoder: Encoder,
        fuse: Fuse = "fitted",
        workers: int | None = None,
        find: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.index, self.encoder, self.workers = index, encoder, workers
        self.find = find or partial(nearest, index)
        self.evaluation = Evaluation(fuse=fuse)
        self.query_modality: Modality = "audio" if index.head.modality == "image" else "image"

    @cached_property
    def source(self) -> ItemSource:
        """The indexed items, opened when first needed."""
        return open_source(self.index.head.source, self.index.head.modality)

    def fusion_problem(self) -> str | None:
        """Why results cannot be re-ranked by the chosen score; None: they can."""
        if self.evaluation.fuse == "fitted" and self.encoder.model.config.match_weight is None:
            return "this model has no fitted weight of the match logit: pass --fuse sum or matching"
        return None

    def search_files(self, files: Sequence[str], top: int = 10, rerank: int = 0) -> Iterator[list[Hit]]:
        """Search by files, one after another.

        Raises:
            UserError: A file cannot be decoded.
        """
        source = FileSource("", self.query_modality, files)
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"{printable(file)}: no such file")
            with torch.inference_mode():
                query = self.encoder.encode(self.query_modality, [source.decode(file, self.encoder.processor)])
            yield self.search(query, top, rerank)[0]

    def search(self, queries: Encoded, top: int = 10, rerank: int = 0) -> list[list[Hit]]:
        """Search by encoded queries.

        Args:
            queries: Output of the encoder, [Q].
            top: Results per query.
            rerank: Candidates per query that are encoded again and re-ranked; 0: none.

        Raises:
            UserError: The model has no fitted weight of the match logit, or the index is damaged.
        """
        if rerank and (problem := self.fusion_problem()):
            raise UserError(problem)
        scores, rows = self.find(queries.embedding.float().cpu(), max(top, rerank))
        results = []
        for number, (cosines, best) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True)):
            hits = [self._hit(row, cosine) for row, cosine in zip(best, cosines, strict=True)]
            reranked = self._rerank(queries[number : number + 1], hits[:rerank]) if rerank else []
            results.append([*reranked, *hits[rerank:]][:top])
        return results

    def _hit(self, row: int, cosine: float) -> Hit:
        name = self.index.item(row).name
        return Hit(row, name, self._path(name), cosine, None, cosine)

    def _path(self, name: str) -> str:
        source = self.index.head.source
        return f"{source['place']}:{name}" if source["kind"] == "shards" else self.source.path(name)

    @torch.inference_mode()
    def _rerank(self, query: Encoded, hits: list[Hit]) -> list[Hit]:
        """Reorder candidates; those that cannot be read any more follow the others."""
        scored: list[Hit] = []
        unreadable: list[Hit] = []
        batches = [hits[start : start + _RERANK_BATCH] for start in range(0, len(hits), _RERANK_BATCH)]
        items = [[self.index.item(hit.row) for hit in batch] for batch in batches]
        modality = self.index.head.modality
        for batch, inputs in zip(batches, decode_batches(self.encoder, self.source, items, self.workers), strict=True):
            kept: list[tuple[Hit, Tensor]] = []
            for hit, value in zip(batch, inputs, strict=True):
                reason = value if isinstance(value, str) else None
                if reason is None and not self.source.is_current(self.index.item(hit.row)):
                    reason = f"{hit.path} has changed since it was indexed"
                if isinstance(value, Tensor) and reason is None:
                    kept.append((hit, value))
                else:
                    logger.warning("%s", f"{printable(str(reason))}: not re-ranked; update the index")
                    unreadable.append(hit)
            values = [value for _, value in kept]
            for rows in groups(modality, values, self.encoder.processor.sampling_rate) if kept else ():
                encoded = self.encoder.encode(modality, [values[row] for row in rows])
                scored += self._score(query, encoded, [kept[row][0] for row in rows])
        position = {hit.row: number for number, hit in enumerate(hits)}
        return [*sorted(scored, key=lambda hit: (-hit.score, position[hit.row])), *unreadable]

    def _score(self, query: Encoded, encoded: Encoded, hits: list[Hit]) -> list[Hit]:
        """Score candidates as evaluation does: the cosine from float32, and the match logit."""
        repeated = query[torch.zeros(len(hits), dtype=torch.int64, device=query.embedding.device)]
        speech, image = (repeated, encoded) if self.query_modality == "audio" else (encoded, repeated)
        model = self.encoder.model
        logits = model.match(speech, image)[:, 1].float().cpu()
        cosines = (speech.embedding * image.embedding).sum(dim=1).float().cpu()
        scores = fuse_scores(model, cosines, logits, self.evaluation)
        values = zip(hits, cosines.tolist(), logits.tolist(), scores.tolist(), strict=True)
        return [Hit(hit.row, hit.name, hit.path, cosine, match, score) for hit, cosine, match, score in values]
