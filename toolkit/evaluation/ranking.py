"""Rank both directions at once: every caption against all pictures, and every picture against all captions.

The scores of all pairs are computed once, tile by tile, and serve both directions. A tile is compared with the scores
of the correct pairs while it is in the CPU's cache: how many candidates are below a correct one, or equal to it,
determines recall and all other measures, and needs no sorting. Only the best k candidates of each query are selected.
"""

import torch
from torch import Tensor

from toolkit.distributed import all_gather
from toolkit.evaluation.recall import CorrectCandidates, RankCounts, Ranking, all_reduce_sum

_ROWS, _COLUMNS = 2048, 8192  # captions and pictures of a block, among which candidates are selected: 64 MB
_TILE = 128  # pictures of one product; divides _COLUMNS


@torch.no_grad()
def rank_both(
    speech: Tensor,
    images: Tensor,
    caption_picture: Tensor,
    k: int,
    rank: int = 0,
    world_size: int = 1,
    chunk: int = _ROWS,
) -> tuple[Ranking, Ranking]:
    """Rank all pictures for each caption, and all captions for each picture that has one.

    Chunks of captions are distributed over the ranks. They do not depend on the world size, so the result is bitwise
    identical for any world size.

    Args:
        speech: Unit embeddings [C, D] of the captions, float32, the same on all ranks.
        images: Unit embeddings [P, D] of the pictures, likewise.
        caption_picture: Int64 [C], position of each caption's picture. It is fastest if captions of a picture are
            neighbors.
        k: Number of candidates to return for each query, at most as many as there are.
        rank: Rank of this process.
        world_size: Number of processes.
        chunk: Captions scored at once.

    Returns:
        The rankings of the C captions, and of the pictures with captions in ascending order.
    """
    ranker = _Ranker(speech, images, caption_picture.to(speech.device), k, chunk)
    own = range(rank * chunk, len(speech), world_size * chunk)
    for start in own:
        ranker.score_correct(start)
    all_reduce_sum(ranker.correct, world_size)
    ranker.set_targets()
    for start in own:
        ranker.rank_chunk(start)
    return ranker.gather(world_size)


class _Ranker:
    """Scores, counts and candidates of this rank's chunks of captions.

    A score that is computed again comes from the same product of the same rows, so that it is the same to the last
    bit: a pair that ties with a correct one is found to be equal to it.
    """

    def __init__(self, speech: Tensor, images: Tensor, caption_picture: Tensor, k: int, chunk: int) -> None:
        self.speech, self.images, self.caption_picture, self.k, self.chunk = speech, images, caption_picture, k, chunk
        rows, columns = min(chunk, len(speech)), min(_COLUMNS, len(images))
        self.block = speech.new_empty(rows, columns)
        self.mask = speech.new_empty(rows * min(_TILE, columns))
        self.correct = speech.new_zeros(len(speech))  # score of each caption and its picture
        # Of both directions, for each correct pair: candidates with an equal or lower score, and with a lower one.
        self.counts = torch.zeros(2, 2, len(speech), dtype=torch.int64, device=speech.device)
        self.pictures = torch.zeros(len(speech), min(k, len(images)), dtype=torch.int64, device=speech.device)
        self.captions = [_empty(len(tile), speech) for tile in images.split(_TILE)]
        self.targets: list[list[tuple[Tensor | None, Tensor]]] = []

    def _score(self, start: int, first: int) -> Tensor:
        """Score the captions from `start` on and the pictures from `first` on: a tile of the block."""
        captions, pictures = self.speech[start : start + self.chunk], self.images[first : first + _TILE]
        place = first % _COLUMNS
        tile = self.block[: len(captions), place : place + len(pictures)]
        return torch.mm(captions, pictures.T, out=tile)

    def score_correct(self, start: int) -> None:
        """Score the correct pairs of a chunk, by computing the tiles that contain them."""
        caption_picture = self.caption_picture[start : start + self.chunk]
        for number in (caption_picture // _TILE).unique().tolist():
            rows = (caption_picture // _TILE == number).nonzero().squeeze(1)
            scores = self._score(start, number * _TILE)
            self.correct[start + rows] = scores[rows, caption_picture[rows] - number * _TILE]

    def set_targets(self) -> None:
        """List for each tile the captions of its pictures: of every picture the first, then the second, and so on.

        Each list has the tile's columns, None for all of them, and one caption for each of these columns.
        """
        order = self.caption_picture.argsort(stable=True)
        ends = torch.bincount(self.caption_picture, minlength=len(self.images)).cumsum(0)
        begins = torch.cat([ends.new_zeros(1), ends[:-1]])
        for first in range(0, len(self.images), _TILE):
            begin, end = begins[first : first + _TILE], ends[first : first + _TILE]
            lists: list[tuple[Tensor | None, Tensor]] = []
            for number in range(int((end - begin).max())):
                columns = (begin + number < end).nonzero().squeeze(1)
                lists.append((None if len(columns) == len(begin) else columns, order[begin[columns] + number]))
            self.targets.append(lists)

    def rank_chunk(self, start: int) -> None:
        """Score a chunk of captions and all pictures: count in both directions, and select the best candidates."""
        count = min(self.chunk, len(self.speech) - start)
        pictures = _empty(count, self.speech)
        for column in range(0, len(self.images), _COLUMNS):
            width = min(_COLUMNS, len(self.images) - column)
            for number in range(column // _TILE, -(-(column + width) // _TILE)):
                scores = self._score(start, number * _TILE)
                self._count(scores, start, self.targets[number])
                captions = _select(scores.T.contiguous(), start, self.k)
                self.captions[number] = _merge(self.captions[number], captions, self.k)
            pictures = _merge(pictures, _select(self.block[:count, :width], column, self.k), self.k)
        self.pictures[start : start + count] = pictures[1]

    def _count(self, scores: Tensor, start: int, targets: list[tuple[Tensor | None, Tensor]]) -> None:
        rows = slice(start, start + len(scores))
        self.counts[0, :, rows] += self._compare(scores, self.correct[rows, None], 1)
        for columns, captions in targets:
            picked = scores if columns is None else scores.index_select(1, columns)
            self.counts[1, :, captions] += self._compare(picked, self.correct[None, captions], 0)

    def _compare(self, scores: Tensor, thresholds: Tensor, dim: int) -> Tensor:
        """Count the scores up to and below thresholds along a dimension; no score is either if one of them is NaN."""
        # Zeros and ones of float32: their sum is exact, and many times as fast as that of bool.
        mask = self.mask[: scores.numel()].view(scores.shape)
        up_to = torch.le(scores, thresholds, out=mask).sum(dim)
        below = torch.lt(scores, thresholds, out=mask).sum(dim)
        return torch.stack([up_to, below]).long()

    def gather(self, world_size: int) -> tuple[Ranking, Ranking]:
        """Combine the ranks' results: int64 on the CPU, the same on all ranks."""
        up_to, below = all_reduce_sum(self.counts, world_size).cpu().unbind(1)
        correct, caption_picture = self.correct.cpu(), self.caption_picture.cpu()
        pictures, captions = all_reduce_sum(self.pictures, world_size).cpu(), self._gather_captions(world_size).cpu()
        queries, query = caption_picture.unique(return_inverse=True)
        numbers = torch.arange(len(caption_picture))
        total = len(self.images), len(self.speech)
        to_images = CorrectCandidates(numbers, caption_picture, total[0] - up_to[0], (up_to[0] - below[0]).clamp(min=1))
        to_speech = CorrectCandidates(query, numbers, total[1] - up_to[1], (up_to[1] - below[1]).clamp(min=1))
        return (
            Ranking(_count_best(to_images, correct, len(caption_picture), total[0]), pictures, to_images),
            Ranking(_count_best(to_speech, correct, len(queries), total[1]), captions[queries], to_speech),
        )

    def _gather_captions(self, world_size: int) -> Tensor:
        """Merge the ranks' best captions of every picture: [P, k], candidates with equal scores in order of chunks."""
        count = len(self.speech)
        values, indices = (torch.cat(parts) for parts in zip(*self.captions, strict=True))
        missing = min(self.k, count) - values.shape[1]  # this rank may have scored fewer captions
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        indices = torch.nn.functional.pad(indices, (0, missing), value=count)
        values, indices = (
            all_gather(part, world_size).unflatten(0, (world_size, -1)).transpose(0, 1).flatten(1)
            for part in (values, indices)
        )
        order = (indices // self.chunk).argsort(dim=1, stable=True)
        by_chunk = values.gather(1, order), indices.gather(1, order)
        return _merge(_empty(len(values), values), by_chunk, min(self.k, count))[1]


_Best = tuple[Tensor, Tensor]  # scores and positions of the best candidates, [Q, k] each, best first


def _empty(queries: int, like: Tensor) -> _Best:
    return like.new_empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64, device=like.device)


def _select(scores: Tensor, first: int, k: int) -> _Best:
    """Select the best k of candidates that are numbered from `first` on."""
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    return best.values, best.indices + first


def _merge(earlier: _Best, later: _Best, k: int) -> _Best:
    """Return the best k of both; with equal scores the earlier ones come first."""
    values, indices = (torch.cat(both, dim=1) for both in zip(earlier, later, strict=True))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def _count_best(pairs: CorrectCandidates, scores: Tensor, queries: int, candidates: int) -> RankCounts:
    """Rank counts of each query's best correct candidate.

    Args:
        pairs: Queries with their correct candidates.
        scores: Float [M], their scores.
        queries: Number of queries.
        candidates: Number of candidates of each query.
    """
    order = pairs.query.argsort(stable=True)
    counts = torch.bincount(pairs.query, minlength=queries)
    row, place = pairs.query[order], torch.arange(len(order)) - (counts.cumsum(0) - counts)[pairs.query[order]]
    padded = scores.new_full((queries, int(counts.max())), -torch.inf)
    padded[row, place] = scores[order]
    best = padded.amax(dim=1)  # NaN if one of them is
    first = torch.zeros(queries, dtype=torch.int64)
    ties = (scores == best[pairs.query]).nonzero().squeeze(1)
    first[pairs.query[ties]] = ties  # one of the best; all have the same counts
    correct = torch.bincount(pairs.query[ties], minlength=queries)
    broken = best.isnan()
    return RankCounts(
        torch.where(broken, candidates - counts, pairs.ahead[first]),
        torch.where(broken, 0, pairs.tied[first] - correct),
        correct.clamp(min=1),
    )
