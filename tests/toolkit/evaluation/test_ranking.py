"""Both directions from one product, against one direction at a time with full rows of scores."""

import pytest
import torch

from tests.distributed import run_ranks
from toolkit.evaluation import ranking as module
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import rank_of_best


def embeddings(count, seed, levels=None, dim=8):
    """Random unit embeddings, or with `levels` integers of which many scores are equal, exactly."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(-levels, levels + 1, (count, dim), generator=generator).float()
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def owners(shuffled=False):
    """Captions of 13 pictures, from none to seven each."""
    owner = torch.repeat_interleave(torch.arange(13), torch.tensor([1, 5, 2, 7, 0, 1, 3, 5, 5, 4, 1, 0, 2]))
    return owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(3))] if shuffled else owner


def broken(tensor, rows):
    tensor = tensor.clone()
    tensor[rows] = torch.nan
    return tensor


CASES = {
    "plain": (embeddings(36, 0), embeddings(13, 1), owners()),
    "shuffled": (embeddings(36, 0), embeddings(13, 1), owners(shuffled=True)),
    "ties": (embeddings(36, 0, levels=1, dim=3), embeddings(13, 1, levels=1, dim=3), owners()),
    "ties shuffled": (embeddings(36, 2, levels=1, dim=3), embeddings(13, 3, levels=1, dim=3), owners(shuffled=True)),
    "equal": (torch.ones(36, 4) / 2, torch.ones(13, 4) / 2, owners()),
    "NaN captions": (broken(embeddings(36, 0), [0, 3, 4, 20]), embeddings(13, 1), owners()),
    "NaN pictures": (embeddings(36, 0), broken(embeddings(13, 1), [3, 4]), owners(shuffled=True)),
}


@pytest.fixture(params=[(128, 8192), (2, 4), (3, 6), (13, 13)], ids=str)
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "_TILE", request.param[0])
    monkeypatch.setattr(module, "_COLUMNS", request.param[1])


@pytest.mark.parametrize("chunk", [1, 5, 36, 100])
@pytest.mark.parametrize("case", CASES)
def test_counts_equal_those_of_full_rows(tiles, case, chunk):
    speech, images, owner = CASES[case]
    forward, backward = rank_both(speech, images, owner, 6, chunk=chunk)
    # Sums of products of a few numbers differ by their order only, which integers do not feel.
    scores = speech @ images.T
    right = owner[:, None] == torch.arange(13)
    queries = owner.unique()
    for ranking, rows, targets in ((forward, scores, right), (backward, scores.T[queries], right.T[queries])):
        expected = rank_of_best(rows, targets)
        for name in ("ahead", "tied", "correct"):
            assert getattr(ranking.rank_counts, name).tolist() == getattr(expected, name).tolist(), name
        found = ranking.correct
        assert sorted(zip(found.query.tolist(), found.candidate.tolist(), strict=True)) == [
            tuple(pair) for pair in targets.nonzero().tolist()
        ]
        for query, answer, ahead, tied in zip(*(vars(found)[name].tolist() for name in vars(found)), strict=True):
            own = rows[query, answer]
            assert ahead == int((~(rows[query] <= own)).sum())
            assert tied == max(1, int((rows[query] == own).sum()))
        if "NaN" not in case:
            best = rows.gather(1, ranking.candidates)
            assert torch.equal(best, rows.sort(dim=1, descending=True).values[:, :6])
            assert all(len(set(row)) == 6 for row in ranking.candidates.tolist())


def flat(rank, world_size, case, chunk):
    torch.set_num_threads(1)  # for bitwise equality
    both = rank_both(*CASES[case], 6, rank, world_size, chunk)
    parts = (part for one in both for part in (one.rank_counts, one.correct))
    return [tensor for part in parts for tensor in vars(part).values()] + [one.candidates for one in both]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_ranking_does_not_depend_on_world_size_and_rank(world_size):
    for case, chunk in (("plain", 3), ("ties", 5), ("NaN captions", 20)):
        alone = flat(0, 1, case, chunk)
        for gathered in run_ranks(flat, world_size, case, chunk):
            assert all(torch.equal(one, other) for one, other in zip(gathered, alone, strict=True)), case
