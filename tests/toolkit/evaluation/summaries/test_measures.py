"""Measures against sorted lists over all orders of ties, and against trec_eval's definitions."""

import itertools
import math

import pytest
import torch

from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import recall_at
from toolkit.evaluation.summaries.measures import measure, measure_queries

PICTURES = range(4)
OWNER = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 3, 2, 1]))


def rankings(levels=None, captions=OWNER, pictures=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        speech, images = (torch.randn(n, 16, generator=generator) for n in (len(captions), pictures))
    else:
        speech, images = (
            torch.randint(-levels, levels + 1, (n, 2), generator=generator).float() for n in (len(captions), pictures)
        )
    return speech @ images.T, rank_both(speech, images, captions, 3)


def naive(order, right):
    """The measures of one list of candidates, written out."""
    places = [place for place, candidate in enumerate(order, start=1) if candidate in right]
    ideal = sum(1 / math.log2(1 + place) for place in range(1, min(10, len(right)) + 1))
    values = {"nDCG@10": sum(1 / math.log2(1 + place) for place in places if place <= 10) / ideal}
    for k in (1, 5, 10):
        values[f"recall_at_{k}"] = sum(place <= k for place in places) / len(right)
        values[f"hit_rate_at_{k}"] = float(any(place <= k for place in places))
    return values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [None, 1])
def test_measures_are_means_over_all_orders_of_ties(levels, seed):
    scores, both = rankings(levels, seed=seed)
    targets = [[{owner} for owner in OWNER.tolist()], [set((n == OWNER).nonzero()[:, 0].tolist()) for n in PICTURES]]
    for ranking, rows, rights in zip(both, (scores, scores.T), targets, strict=True):
        measured = measure_queries(ranking)
        for query, (row, right) in enumerate(zip(rows.tolist(), rights, strict=True)):
            lists = itertools.permutations(range(len(row)))
            values = [naive(sorted(order, key=lambda answer: -row[answer]), right) for order in lists]
            for name, value in measured.items():
                assert value[query] == pytest.approx(sum(one[name] for one in values) / len(values)), name


def test_measures_equal_those_of_trec_eval_and_the_papers():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    captions = torch.arange(30).repeat_interleave(5)
    scores, both = rankings(captions=captions, pictures=30)
    for ranking, rows, right in zip(
        both, (scores, scores.T), (captions[:, None] == torch.arange(30),) * 2, strict=True
    ):
        relevant = right if len(rows) == len(captions) else right.T
        qrels = {f"q{q}": {f"d{d}": 1 for d in row.nonzero()[:, 0].tolist()} for q, row in enumerate(relevant)}
        run = {f"q{q}": {f"d{d}": score for d, score in enumerate(row)} for q, row in enumerate(rows.tolist())}
        wanted = {"ndcg_cut.10", "recall.1,5,10", "success.1,5,10"}
        expected = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run).values()
        measured = measure(ranking)
        names = [("nDCG@10", "ndcg_cut_10")]
        names += [(f"recall_at_{k}", f"recall_{k}") for k in (1, 5, 10)]
        names += [(f"hit_rate_at_{k}", f"success_{k}") for k in (1, 5, 10)]
        for ours, theirs in names:
            mean = 100 * sum(query[theirs] for query in expected) / len(rows)
            assert measured[ours] == pytest.approx(mean, abs=1e-3), ours
        assert measured["hit_rate_at_5"] == pytest.approx(recall_at(ranking.rank_counts, 5), abs=1e-3)
    assert 0 < measured["recall_at_5"] < measured["hit_rate_at_5"], "a picture has five correct captions"
