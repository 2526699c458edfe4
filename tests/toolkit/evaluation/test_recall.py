"""Recall against loops over sorted lists, with ties, several captions per picture, chunks and ranks."""

import itertools

import pytest
import torch

from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import RankCounts, rank_of_best, recall_at, summarize_recall


def naive_recall(scores, right, k):
    """Percentage of queries with a correct candidate among the first k; ties: mean over all orders."""
    total = 0.0
    for row, targets in zip(scores.tolist(), right.tolist(), strict=True):
        hits = []
        for order in itertools.permutations(range(len(row))):
            first = sorted(order, key=lambda answer: -row[answer])[:k]
            hits.append(any(targets[answer] for answer in first))
        total += sum(hits) / len(hits)
    return 100 * total / len(scores)


def sorted_recall(scores, right, k):
    """The same without ties: one full sort per query."""
    hits = 0
    for row, targets in zip(scores.tolist(), right.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda answer: -row[answer])
        hits += any(targets[answer] for answer in order[:k])
    return 100 * hits / len(scores)


def unit_embeddings(count, generator, dim=8):
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def ragged_owner():
    """Captions of 12 pictures, from one to seven each, in random order."""
    owner = torch.repeat_interleave(torch.arange(12), torch.tensor([1, 5, 2, 7, 1, 1, 3, 5, 5, 4, 1, 2]))
    return owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("seed", range(8))
def test_ties_and_several_correct_answers_count_as_the_mean_over_all_orders(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (12, 6), generator=generator).float()
    right = torch.rand(12, 6, generator=generator) < 0.4
    right[torch.arange(12), torch.randint(0, 6, (12,), generator=generator)] = True
    for k in (1, 2, 3, 5, 6, 10):
        assert recall_at(rank_of_best(scores, right), k) == pytest.approx(naive_recall(scores, right, k)), f"k={k}"


def test_both_directions_equal_a_full_sort():
    generator = torch.Generator().manual_seed(0)
    owner = ragged_owner()
    images, speech = unit_embeddings(12, generator), unit_embeddings(len(owner), generator)
    pictures = torch.arange(12)
    scores, right = speech @ images.T, owner[:, None] == pictures
    forward, backward = rank_both(speech, images, owner, k=5, chunk=4)
    for k in (1, 5, 10):
        assert recall_at(forward.rank_counts, k) == pytest.approx(sorted_recall(scores, right, k))
        assert recall_at(backward.rank_counts, k) == pytest.approx(sorted_recall(scores.T, right.T, k))
    assert forward.candidates.tolist() == scores.argsort(dim=1, descending=True)[:, :5].tolist()
    report = summarize_recall(forward, backward)
    assert report["speech_to_image"]["R@5"] == pytest.approx(sorted_recall(scores, right, 5), abs=1e-3)
    both = (sorted_recall(scores, right, 1) + sorted_recall(scores.T, right.T, 1)) / 2
    assert report["mean_R@1"] == pytest.approx(both, abs=1e-3)


def test_constant_scores_get_chance():
    embeddings = torch.nn.functional.normalize(torch.ones(40, 4), dim=1)
    ids = torch.arange(40)
    for ranking in rank_both(embeddings, embeddings, ids, k=10):
        assert [recall_at(ranking.rank_counts, k) for k in (1, 5, 10)] == pytest.approx([2.5, 12.5, 25.0])


def test_nan_scores_are_misses():
    ids = torch.arange(20)
    good = torch.eye(20)
    for broken in (torch.full((20, 20), torch.nan), torch.where(good == 1, torch.nan, good)):
        for ranking in (*rank_both(broken, good, ids, k=5), *rank_both(good, broken, ids, k=5)):
            assert recall_at(ranking.rank_counts, 5) == 0.0
    scores = torch.tensor([[0.9, torch.nan, 0.1]])
    assert rank_of_best(scores, torch.tensor([[True, False, False]])).ahead.tolist() == [1]


def test_fewer_answers_than_k_are_all_found():
    rank_counts = RankCounts(torch.tensor([2]), torch.tensor([0]), torch.tensor([1]))
    assert recall_at(rank_counts, 10) == 100.0
    ids = torch.arange(3)
    for ranking in rank_both(torch.eye(3), torch.eye(3), ids, k=10):
        assert ranking.candidates.shape == (3, 3)
