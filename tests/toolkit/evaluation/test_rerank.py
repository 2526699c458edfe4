"""Re-ranking against loops: which pairs are scored, on which rank, and the new order of the best k."""

import math
from types import SimpleNamespace

import pytest
import torch

from shards.errors import UserError
from tests.distributed import run_ranks
from toolkit.config import schema as config
from toolkit.evaluation.encode import Encodings, ProcessInfo, Tokens
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import CorrectCandidates, RankCounts, Ranking, recall_at
from toolkit.evaluation.rerank import fit_weight, fuse_scores, reorder, score_candidates, score_pairs
from toolkit.model.outputs import Encoded

OWNER = torch.repeat_interleave(torch.arange(9), torch.tensor([1, 3, 2, 1, 4, 1, 2, 2, 1]))
PICTURES, CAPTIONS = 9, len(OWNER)
BATCH = 4


class Matcher:
    """Scores a pair by its tokens only, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def match(self, speech, image):
        self.calls += 1
        spoken = (speech.tokens * speech.mask[:, :, None]).sum(1) / speech.mask.sum(1, keepdim=True)
        logit = (spoken * image.tokens.mean(1)).sum(1)
        return torch.stack([-logit, logit], dim=1)


def drawn():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(PICTURES, 4, generator=generator), dim=1)
    speech = torch.nn.functional.normalize(torch.randn(CAPTIONS, 4, generator=generator), dim=1)
    patches = torch.randn(PICTURES, 5, 6, generator=generator)
    lengths = torch.randint(2, 9, (CAPTIONS,), generator=generator).tolist()
    frames = [torch.randn(length, 6, generator=generator) for length in lengths]
    return images, speech, patches, frames


def encodings_of(rank, world_size):
    """Captions in batches of 4, in random order, with the same number of batches on every rank."""
    images, speech, patches, frames = drawn()
    order = torch.randperm(CAPTIONS, generator=torch.Generator().manual_seed(5))
    turn = order.argsort()
    calls = -(-CAPTIONS // (BATCH * world_size))
    filled = torch.cat([order, order[-1:].repeat(calls * world_size * BATCH - CAPTIONS)])
    batches = []
    for rows in filled.view(calls, world_size, BATCH)[:, rank]:
        lengths = torch.tensor([len(frames[row]) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence([frames[row] for row in rows], batch_first=True, padding_value=7.0)
        batches.append(Encoded(speech[rows], padded, torch.arange(padded.shape[1]) < lengths[:, None]))
    tokens = Tokens(patches, batches, turn // BATCH, turn % BATCH, [BATCH] * (len(turn) // BATCH + 1))
    return Encodings(torch.arange(PICTURES).numpy(), torch.arange(CAPTIONS).numpy(), OWNER, images, speech, tokens)


def naive_score(caption, picture, fuse):
    images, speech, patches, frames = drawn()
    score = float(frames[caption].mean(0) @ patches[picture].mean(0))
    return score + float(speech[caption] @ images[picture]) if fuse == "sum" else score


def naive_places(cosines, rescore, is_right, k):
    """Rank of the best correct candidate of every query: the best k by the new score, then the rest by cosine."""
    places = []
    for query, row in enumerate(cosines.tolist()):
        order = sorted(range(len(row)), key=lambda answer: -row[answer])
        best = sorted(order[:k], key=lambda answer: -rescore(query, answer))
        places.append(next(n for n, answer in enumerate(best + order[k:]) if is_right(query, answer)))
    return places


def rerank(model, encodings, forward, backward, queries, k, evaluation, process):
    scored = score_candidates(model, encodings, forward, backward, queries, k, process)
    return *scored.reorder(model, forward, backward, evaluation), scored.seconds


def reranked(rank, world_size, k, fuse):
    """Rank counts and candidates of both directions, and the number of model calls."""
    encodings, model = encodings_of(rank, world_size), Matcher()
    pictures = torch.arange(PICTURES)
    forward, backward = rank_both(encodings.speech, encodings.images, OWNER, max(k, 6), rank, world_size, chunk=4)
    evaluation = config.Evaluation(batch_size=3, fuse=fuse)
    process = ProcessInfo(rank, world_size, torch.device("cpu"))
    spoken, shown, seconds = rerank(model, encodings, forward, backward, pictures, k, evaluation, process)
    assert seconds > 0
    return [(ranking.rank_counts.ahead, ranking.candidates) for ranking in (spoken, shown)], model.calls


@pytest.mark.parametrize("fuse", ["matching", "sum"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_both_directions_equal_loops(k, fuse):
    (spoken, shown), _ = reranked(0, 1, k, fuse)
    images, speech, _, _ = drawn()
    cosines = speech @ images.T
    assert spoken[0].tolist() == naive_places(
        cosines, lambda caption, picture: naive_score(caption, picture, fuse), lambda c, p: OWNER[c] == p, k
    )
    assert shown[0].tolist() == naive_places(
        cosines.T, lambda picture, caption: naive_score(caption, picture, fuse), lambda p, c: OWNER[c] == p, k
    )


@pytest.mark.parametrize("k", [1, 3, 9])
def test_every_correct_candidate_has_its_new_rank(k):
    encodings, pictures = encodings_of(0, 1), torch.arange(PICTURES)
    both = rank_both(encodings.speech, encodings.images, OWNER, max(k, 6))
    process = ProcessInfo(0, 1, torch.device("cpu"))
    spoken, shown, _ = rerank(Matcher(), encodings, *both, pictures, k, config.Evaluation(fuse="sum"), process)
    cosines = encodings.speech @ encodings.images.T
    for ranking, scores, transposed in ((spoken, cosines, False), (shown, cosines.T, True)):
        assert len(ranking.correct.query) == CAPTIONS
        columns = [column.tolist() for column in vars(ranking.correct).values()]
        for query, answer, ahead, tied in zip(*columns, strict=True):
            order = sorted(range(scores.shape[1]), key=lambda candidate, row=scores[query]: -row[candidate])
            pair = (lambda q, a: (a, q)) if transposed else (lambda q, a: (q, a))
            best = sorted(order[:k], key=lambda a, q=query, pair=pair: -naive_score(*pair(q, a), "sum"))
            assert (ahead, tied) == ((best + order[k:]).index(answer), 1)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_result_and_the_number_of_calls_do_not_depend_on_the_world_size(world_size):
    alone, _ = reranked(0, 1, 4, "sum")
    results = run_ranks(reranked, world_size, 4, "sum")
    for directions, _ in results:
        for (ahead, candidates), (expected_ahead, expected_candidates) in zip(directions, alone, strict=True):
            assert torch.equal(ahead, expected_ahead)
            assert torch.equal(candidates, expected_candidates)
    assert len({calls for _, calls in results}) == 1, "under ZeRO-3 ranks with different numbers of calls deadlock"


def test_candidates_are_in_the_new_order_followed_by_the_rest():
    old = Ranking(RankCounts(*torch.tensor([[1], [0], [1]])), torch.tensor([[4, 2, 7, 1]]))
    new = reorder(old, torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[False, True, False]]))
    assert new.candidates.tolist() == [[2, 7, 4, 1]]
    assert new.rank_counts.ahead.tolist() == [0]


def test_a_correct_answer_outside_the_best_k_stays_behind_them_even_if_its_old_score_is_equal():
    # All ten candidates have the same cosine, and the correct one is not among the best 3.
    old = Ranking(RankCounts(*torch.tensor([[0], [9], [1]])), torch.tensor([[0, 1, 2]]))
    new = reorder(old, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)).rank_counts
    assert (new.ahead.item(), new.tied.item(), new.correct.item()) == (3, 6, 1)
    assert recall_at(new, 3) == 0.0
    assert recall_at(new, 10) == 100.0


def test_every_correct_answer_outside_the_best_k_shares_the_ranks_behind_them_with_its_equals():
    correct = CorrectCandidates(*torch.tensor([[0], [7], [0], [10]]))  # all ten candidates have the same cosine
    old = Ranking(RankCounts(*torch.tensor([[0], [9], [1]])), torch.tensor([[0, 1, 2]]), correct)
    new = reorder(old, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)).correct
    assert (new.ahead.item(), new.tied.item()) == (3, 7)


def test_equal_new_scores_share_their_ranks():
    old = Ranking(RankCounts(*torch.tensor([[2], [0], [1]])), torch.tensor([[5, 6, 7, 8]]))
    new = reorder(old, torch.ones(1, 4), torch.tensor([[False, False, True, False]]))
    assert recall_at(new.rank_counts, 1) == pytest.approx(25.0)


def test_scores_of_single_pairs_and_the_need_for_tokens():
    encodings, process = encodings_of(0, 1), ProcessInfo(0, 1, torch.device("cpu"))
    pairs = torch.tensor([[16, 0], [0, 8], [3, 3], [16, 0]])
    scores = score_pairs(Matcher(), encodings, pairs, config.Evaluation(batch_size=2, fuse="matching"), process)
    expected = [naive_score(caption, picture, "matching") for caption, picture in pairs.tolist()]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    encodings.tokens = None
    with pytest.raises(ValueError, match="without tokens"):
        score_pairs(Matcher(), encodings, pairs, config.Evaluation(), process)


def candidates(seed: int, queries: int, help_of_logits: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weakly informative cosines, and match logits; some queries have no correct candidate."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(queries, 8, generator=generator) < 0.15
    cosine = 0.1 * right + 0.1 * torch.randn(queries, 8, generator=generator)
    logits = help_of_logits * right + torch.randn(queries, 8, generator=generator)
    return cosine, logits, right


def likelihood(directions: list, a: float, b: float) -> float:
    """Mean log-likelihood of the correct candidates, by loops."""
    logs = []
    for cosine, logits, right in directions:
        for c, m, r in zip(cosine.tolist(), logits.tolist(), right.tolist(), strict=True):
            if any(r) and not all(r):
                scores = [math.exp(a * x + b * y) for x, y in zip(c, m, strict=True)]
                logs.append(math.log(sum(s for s, ok in zip(scores, r, strict=True) if ok) / sum(scores)))
    return sum(logs) / len(logs)


def test_the_fitted_weight_is_the_most_likely_one():
    directions = [candidates(0, 60, 1.5), candidates(1, 40, 1.0)]
    weight = fit_weight(directions)
    best = max(
        ((a, b) for a in range(2, 25) for b in torch.arange(0, 3, 0.1).tolist()),
        key=lambda w: likelihood(directions, *w),
    )
    assert weight == pytest.approx(best[1] / best[0], rel=0.15)


def test_match_logits_that_do_not_help_get_no_weight():
    cosine, logits, right = candidates(2, 400, -0.5)
    assert fit_weight([(cosine, logits, right)]) == 0.0
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    assert fit_weight([(cosine[:3], logits[:3], nothing)]) == 0.0
    perfect = torch.zeros(50, 8, dtype=torch.bool)
    perfect[:, 0] = True
    assert 0 < fit_weight([(0.1 * perfect + 0.01 * cosine[:50], 5.0 * perfect, perfect)]) < float("inf")


def test_a_fitted_score_needs_its_weight():
    model = SimpleNamespace(config=SimpleNamespace(match_weight=None))
    cosine, logits = torch.tensor([0.5, 0.2]), torch.tensor([1.0, 4.0])
    with pytest.raises(UserError, match=r"no fitted weight .* --evaluation.fuse sum or matching"):
        fuse_scores(model, cosine, logits, config.Evaluation(fuse="fitted"))
    model.config.match_weight = 0.25
    assert fuse_scores(model, cosine, logits, config.Evaluation(fuse="fitted")).tolist() == pytest.approx([0.75, 1.2])
