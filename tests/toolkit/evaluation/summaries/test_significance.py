"""Intervals and tests against loops over pictures, and against what they are for: coverage and exchangeability."""

from dataclasses import replace

import numpy as np
import pytest

from shards.errors import UserError
from tests.toolkit.evaluation.made_results import made, ranks
from toolkit.evaluation.results import format_results
from toolkit.evaluation.summaries import significance
from toolkit.evaluation.summaries.significance import compare, compare_results, intervals, matching_results


def naive_recall(both, weights):
    """Recall with each picture repeated as often as drawn, by loops: without ties a hit is ahead < k."""
    figures = []
    for each in both.values():
        for k in (1, 5, 10):
            hits = [
                float(ahead < k)
                for picture, ahead in zip(each.picture, each.ahead, strict=True)
                for _ in range(int(weights[picture]))
            ]
            figures.append(100 * sum(hits) / len(hits))
    return [*figures, (figures[0] + figures[3]) / 2]


def test_intervals_are_percentiles_over_resampled_pictures():
    both, count = ranks(25, seed=0), 40
    names = sorted(set(both["image_to_speech"].picture))
    weights = np.concatenate(list(significance._bootstrap_weights(25, count, seed=3)))
    assert weights.shape == (count, 25)
    assert set(weights.sum(1)) == {25.0}
    assert len(set(map(tuple, weights))) == count
    sampled = [naive_recall(both, dict(zip(names, row, strict=True))) for row in weights]
    low, high = np.percentile(sampled, [2.5, 97.5], axis=0)
    found = intervals(both, samples=count, seed=3)
    assert found["speech_to_image"]["R@1"] == pytest.approx([low[0], high[0]], abs=1e-3)
    assert found["image_to_speech"]["R@10"] == pytest.approx([low[5], high[5]], abs=1e-3)
    assert found["mean_R@1"] == pytest.approx([low[6], high[6]], abs=1e-3)
    assert found == intervals(both, samples=count, seed=3)
    assert found != intervals(both, samples=count, seed=4)


def test_chunks_of_random_numbers_do_not_change_the_intervals(monkeypatch):
    both = ranks(25, seed=0)
    whole = intervals(both, samples=50)
    monkeypatch.setattr(significance, "_CHUNK", 100)
    assert intervals(both, samples=50) == whole


def test_intervals_cover_the_truth_and_captions_of_a_picture_are_not_independent():
    """Pictures whose captions all hit or all miss: recall 50 %, with the deviation of pictures, not of captions."""
    covered, pictures, trials = 0, 100, 100
    widths = []
    for seed in range(trials):
        hit = np.random.default_rng(seed).random(pictures) < 0.5
        low, high = intervals(ranks(pictures, hit=hit), samples=300, seed=seed)["speech_to_image"]["R@1"]
        covered += low <= 50 <= high
        widths.append(high - low)
    assert 88 <= covered <= 100
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 100 * 0.5 / np.sqrt(pictures), rel=0.1)


def test_the_permutation_test_equals_all_signs():
    first, second = ranks(9, seed=1), ranks(9, seed=2)
    names = sorted(set(first["image_to_speech"].picture))
    alone = [np.array(naive_sums(second, name)) - np.array(naive_sums(first, name)) for name in names]
    observed = abs(sum(alone))
    signs = [[1 if number >> bit & 1 else -1 for bit in range(9)] for number in range(2**9)]
    extreme = np.mean(
        [abs(sum(s * d for s, d in zip(each, alone, strict=True))) >= observed - 1e-9 for each in signs], axis=0
    )
    found = {(one.direction, one.figure): one for one in compare(first, second, permutations=20_000)}
    assert found["speech_to_image", "R@1"].p == pytest.approx(extreme[0], abs=0.02)
    assert found["image_to_speech", "R@1"].p == pytest.approx(extreme[1], abs=0.02)
    assert found["", "mean_R@1"].p == pytest.approx(extreme[2], abs=0.02)
    whole = dict.fromkeys(names, 1)
    for side, both in (("first", first), ("second", second)):
        assert getattr(found["", "mean_R@1"], side) == pytest.approx(naive_recall(both, whole)[6])


def naive_sums(both, name):
    """What a picture adds to R@1 of both directions and to their mean."""
    added = []
    for each in both.values():
        own = [float(a < 1) for p, a in zip(each.picture, each.ahead, strict=True) if p == name]
        added.append(100 * sum(own) / len(each.picture))
    return [*added, sum(added) / 2]


def test_p_is_uniform_without_a_difference_and_small_with_one():
    values = []
    for seed in range(100):
        same = compare(ranks(60, seed=2 * seed), ranks(60, seed=2 * seed + 1), samples=2, permutations=300, seed=seed)
        values.append(same[-1].p)
    assert np.mean(np.array(values) < 0.5) == pytest.approx(0.5, abs=0.15)
    hit = np.random.default_rng(0).random(60) < 0.3
    better = hit | (np.random.default_rng(1).random(60) < 0.4)
    one = compare(ranks(60, hit=hit), ranks(60, hit=better))[-1]
    assert one.p < 0.001
    assert 0 < one.low < one.difference < one.high
    assert compare(ranks(60, hit=hit), ranks(60, hit=better))[-1] == one


def test_results_of_different_test_data_are_not_compared(tmp_path):
    first = made(tmp_path / "a", 20, seed=0)
    assert compare_results(first, made(tmp_path / "b", 20, seed=1))[-1].p > 0
    for change in ({"split": "dev"}, {"manifest": "f" * 64}, {"corpus": "other"}):
        with pytest.raises(UserError, match="are of different test data") as caught:
            compare_results(first, made(tmp_path / "c", 20, seed=1, **change))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the queries of speech_to_image differ"):
        compare_results(first, made(tmp_path / "d", 19, seed=1))


def test_results_are_paired_by_data_checkpoint_and_protocol(tmp_path):
    older, newer, other = (
        made(tmp_path / name, 5, seed=0, time=time, checkpoint=checkpoint)
        for name, time, checkpoint in (("a", 1.0, "best"), ("b", 2.0, "best"), ("c", 3.0, "last"))
    )
    assert matching_results([older, newer, other], [older]) == [(newer, older)]
    with pytest.raises(UserError, match="no two evaluations"):
        matching_results([other], [older])
    with pytest.raises(UserError, match=r"different test data: .* in the first, .* in the second"):
        matching_results([older], [replace(older, manifest="0" * 64)])
    baseline = made(tmp_path / "d", 5, seed=0, baseline={"text": "oracle-text"})
    with pytest.raises(UserError, match=r"toy test abababab in the first, nothing in the second"):
        matching_results([older], [baseline])
    assert "baseline best" in format_results([baseline])
