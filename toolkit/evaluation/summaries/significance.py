"""Confidence intervals of recall, and a paired test between two evaluations of the same queries.

Captions of one picture are not independent, and a picture's own query is not independent of its captions'. Intervals
therefore resample pictures with all their queries (cluster bootstrap, percentiles), and the test flips the sign of
whole pictures (paired permutation test). Both are deterministic by their seed.

They describe the choice of test pictures alone, not that of the training seed: whether a method gains needs several
trainings (`toolkit/reporting/ablation.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shards.errors import UserError
from toolkit.evaluation.recall import CUTOFFS, RankCounts, hits_at
from toolkit.evaluation.results import DIRECTIONS, Ranks, Result, describe_protocol

LEVEL = 0.95
SAMPLES = 2000  # of the bootstrap
PERMUTATIONS = 10_000
_CHUNK = 1 << 22  # random numbers at once
_SLACK = 1e-9  # in percent; sums of the same numbers in another order are equal
MEAN = "mean_R@1"
FIGURES = [(direction, f"R@{k}") for direction in DIRECTIONS for k in CUTOFFS]


@dataclass(frozen=True)
class PictureSums:
    """Hits and queries of P pictures, for each of `FIGURES`: float64 [P, F]."""

    hits: np.ndarray
    queries: np.ndarray

    def recall(self, weights: np.ndarray) -> np.ndarray:
        """Recall in percent with weights [S, P] of the pictures: [S, F + 1], the mean R@1 last; NaN without queries."""
        with np.errstate(invalid="ignore", divide="ignore"):
            figures = 100 * (weights @ self.hits) / (weights @ self.queries)
        first = [index for index, (_, name) in enumerate(FIGURES) if name == "R@1"]
        return np.concatenate([figures, figures[:, first].mean(axis=1, keepdims=True)], axis=1)


def sum_by_picture(ranks: Mapping[str, Ranks]) -> PictureSums:
    """Sum the hits of each picture's queries.

    Args:
        ranks: The queries of both `DIRECTIONS`.
    """
    pictures, place = np.unique(np.concatenate([ranks[name].picture for name in DIRECTIONS]), return_inverse=True)
    places = dict(zip(DIRECTIONS, np.split(place, [len(ranks[DIRECTIONS[0]].picture)]), strict=True))
    hits, queries = np.zeros((2, len(pictures), len(FIGURES)))
    for column, (direction, name) in enumerate(FIGURES):
        each = ranks[direction]
        counts = RankCounts(*(torch.from_numpy(values) for values in (each.ahead, each.tied, each.correct)))
        np.add.at(hits[:, column], places[direction], hits_at(counts, int(name[2:])).numpy())
        np.add.at(queries[:, column], places[direction], 1.0)
    return PictureSums(hits, queries)


def intervals(ranks: Mapping[str, Ranks], samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Confidence intervals of recall by a bootstrap over pictures.

    Args:
        ranks: The queries of both `DIRECTIONS`.
        samples: Number of bootstrap samples.
        seed: Seed of the samples.

    Returns:
        Lower and upper bound in percent in the shape of a report's "coarse": {"speech_to_image": {"R@1": [low, high],
        ...}, "image_to_speech": the same, "mean_R@1": [low, high]}.
    """
    sums = sum_by_picture(ranks)
    sampled = [sums.recall(weights) for weights in _bootstrap_weights(len(sums.hits), samples, seed)]
    low, high = _bounds(np.concatenate(sampled))
    bounds = [[round(float(one), 3), round(float(other), 3)] for one, other in zip(low, high, strict=True)]
    result: dict[str, Any] = {direction: {} for direction in DIRECTIONS}
    for (direction, name), pair in zip(FIGURES, bounds, strict=False):
        result[direction][name] = pair
    return result | {MEAN: bounds[-1]}


def _bounds(sampled: np.ndarray) -> np.ndarray:
    return np.nanpercentile(sampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)


def _bootstrap_weights(pictures: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each picture is drawn: float64 [samples, pictures] in chunks."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // pictures)
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        drawn = generator.integers(pictures, size=(count, pictures)) + pictures * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * pictures).reshape(count, pictures).astype(float)


@dataclass(frozen=True)
class Difference:
    """A figure of two evaluations, in percent.

    Attributes:
        direction: One of `DIRECTIONS`; empty for the mean R@1 of both.
        figure: Name of the figure.
        first: Of the first evaluation.
        second: Of the second evaluation.
        difference: Second minus first.
        low: Lower bound of the difference's confidence interval.
        high: Its upper bound.
        p: Probability of a difference at least as large if the two evaluations were exchangeable, picture by picture.
    """

    direction: str
    figure: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


def compare(
    first: Mapping[str, Ranks],
    second: Mapping[str, Ranks],
    samples: int = SAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Difference]:
    """Compare two evaluations of the same queries: differences with intervals, and a paired permutation test.

    Args:
        first: The queries of both `DIRECTIONS`, of the first evaluation.
        second: Those of the second evaluation, in the same order.
        samples: Number of bootstrap samples.
        permutations: Number of random permutations.
        seed: Seed of both.

    Raises:
        ValueError: The queries differ.
    """
    for direction in DIRECTIONS:
        if not np.array_equal(first[direction].query, second[direction].query):
            raise ValueError(f"the queries of {direction} differ")
    sums = [sum_by_picture(each) for each in (first, second)]
    everything = np.ones((1, len(sums[0].hits)))
    figures = [each.recall(everything)[0] for each in sums]
    sampled = [
        sums[1].recall(weights) - sums[0].recall(weights)
        for weights in _bootstrap_weights(everything.size, samples, seed)
    ]
    low, high = _bounds(np.concatenate(sampled))
    p = permutation_test(sums[1].hits - sums[0].hits, sums[0].queries.sum(0), permutations, seed)
    names = [*FIGURES, ("", MEAN)]
    columns = zip(*figures, figures[1] - figures[0], low, high, p, strict=True)
    return [Difference(*name, *map(float, values)) for name, values in zip(names, columns, strict=True)]


def permutation_test(difference: np.ndarray, queries: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """P-values of differences of recall, by random signs of the pictures; two-sided.

    Args:
        difference: Differences of the hits of each picture, for each of `FIGURES`: float64 [P, F].
        queries: Number of queries of all pictures, for each of `FIGURES`: float64 [F].
        permutations: Number of random permutations.
        seed: Seed of the permutations.

    Returns:
        [F + 1], that of the mean R@1 last.
    """
    generator = np.random.default_rng([seed, 1])
    added = 100 * difference / queries
    first = [index for index, (_, name) in enumerate(FIGURES) if name == "R@1"]
    added = np.concatenate([added, added[:, first].mean(axis=1, keepdims=True)], axis=1)
    observed = np.abs(added.sum(0)) - _SLACK
    extreme, chunk = np.zeros(added.shape[1]), max(1, _CHUNK // len(added))
    for start in range(0, permutations, chunk):
        signs = generator.integers(2, size=(min(chunk, permutations - start), len(added))) * 2.0 - 1
        extreme += (np.abs(signs @ added) >= observed).sum(0)
    return (extreme + 1) / (permutations + 1)


def compare_results(first: Result, second: Result, seed: int = 0) -> list[Difference]:
    """Compare two stored results; see `compare`.

    Raises:
        UserError: They are of different test data, or a file is damaged.
    """
    for name in ("corpus", "split", "manifest"):
        values = getattr(first, name), getattr(second, name)
        if values[0] != values[1]:
            raise UserError(
                f"{first.path} and {second.path} are of different test data ({name} {values[0]} and {values[1]}): "
                "evaluate both runs on the same shards and split"
            )
    one, other = ({direction: result.ranks(direction) for direction in DIRECTIONS} for result in (first, second))
    try:
        return compare(one, other, seed=seed)
    except ValueError as error:
        raise UserError(f"{first.path} and {second.path}: {error}; repeat the evaluations") from None


def matching_results(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of results with the same test data, checkpoint name and protocol, the newest of each; no baselines.

    Raises:
        UserError: There is no such pair.
    """

    def key(result: Result) -> str:
        return json.dumps([result.manifest, result.split, result.checkpoint, result.protocol], sort_keys=True)

    own = [[result for result in results if not result.is_baseline] for results in (first, second)]
    newest = [{key(result): result for result in results} for results in own]  # results are oldest first
    if pairs := [(one, newest[1][name]) for name, one in newest[0].items() if name in newest[1]]:
        return pairs
    data = [sorted({f"{one.corpus} {one.split} {one.manifest[:8]}" for one in results}) for results in own]
    if not set(data[0]) & set(data[1]):
        names = [", ".join(each) or "nothing" for each in data]
        raise UserError(f"different test data: evaluated were {names[0]} in the first, {names[1]} in the second")
    raise UserError(
        "no two evaluations with the same checkpoint name and protocol: name two result files instead of the runs"
    )


def format_comparison(first: Result, second: Result, differences: Sequence[Difference]) -> str:
    """Format a comparison as a table."""
    lines = [f"{first.corpus} {first.split}, second minus first, over the same queries"]
    for name, result in (("first", first), ("second", second)):
        step = "" if result.step is None else f" @ {result.step:,}"
        protocol = describe_protocol(result.protocol, result.stages[-1])
        lines.append(f"{name + ':':<8}{result.run}, checkpoint {result.checkpoint}{step}, {protocol}")
    lines.append(f"{'percent':<26}{'first':>8}{'second':>8}{'difference':>12}{'95 %':>18}{'p':>9}")
    for one in differences:
        name = f"{one.direction.replace('_', ' ')} {one.figure}".strip()
        bounds = f"{one.low:+.2f} to {one.high:+.2f}"
        lines.append(f"{name:<26}{one.first:>8.1f}{one.second:>8.1f}{one.difference:>+12.2f}{bounds:>18}{one.p:>9.4f}")
    return "\n".join(lines)
