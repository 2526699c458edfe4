"""What the settings of a grid's members gain in mean R@1, over seeds, with a paired test over the test pictures.

Members that differ by the seed only are one configuration. Runs with the same seed make a pair. The test is a
permutation test clustered by picture: under the hypothesis of no gain the sign of a picture's contribution, of its own
query and of its captions', averaged over the seeds, is a coin's.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from toolkit.evaluation.results import DIRECTIONS, STAGES
from toolkit.reporting.figures import get, number
from toolkit.reporting.runs import Group, Run

if TYPE_CHECKING:
    import numpy as np

PERMUTATIONS = 20_000
_CHUNK = 500  # permutations at once: 20 MB for 5,000 pictures
_SEEDS = 3  # fewer do not tell a gain from chance
RECALL_COLUMNS = ["configuration", "seeds", "S>I R@1", "I>S R@1", "mean R@1", "re-ranked: S>I", "I>S", "mean R@1"]
GAIN_COLUMNS = ["gain in mean R@1, points", "with", "without", "gain", "deviation", "p", "seeds"]


@dataclass(frozen=True)
class Gain:
    """Mean R@1 of two sides in percent and their difference, over seeds.

    Attributes:
        name: What is compared.
        ours: Mean over seeds.
        theirs: Likewise.
        difference: Mean difference, in points.
        deviation: Standard deviation of the difference between seeds; None: there is one seed.
        p: Probability of such a difference by chance; None: the ranks of the queries were not stored.
        seeds: Number of pairs.
    """

    name: str
    ours: float
    theirs: float
    difference: float
    deviation: float | None
    p: float | None
    seeds: int

    def cells(self) -> list[str]:
        """Return the cells of `GAIN_COLUMNS`."""
        p = "not measured" if self.p is None else "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        deviation = number(self.deviation, 2)
        return [
            self.name,
            number(self.ours),
            number(self.theirs),
            f"{self.difference:+.2f}",
            deviation,
            p,
            str(self.seeds),
        ]


@dataclass(frozen=True)
class Ablation:
    """Recall of configurations, and what they gain against the first one and by re-ranking.

    Attributes:
        data: Name of the test data, the same for all.
        recall: Rows of `RECALL_COLUMNS`: means and standard deviations over seeds, in percent.
        gains: Comparisons.
        notes: What is missing.
    """

    data: str
    recall: list[list[str]]
    gains: list[Gain]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Format as Markdown."""
        tables = [_markdown(RECALL_COLUMNS, self.recall)]
        if self.gains:
            tables.append(_markdown(GAIN_COLUMNS, [gain.cells() for gain in self.gains]))
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(
            [
                f"Test data: {self.data}. Recall in percent, mean ± standard deviation over seeds; S speech, I image.",
                *tables,
                *([notes] if notes else []),
            ]
        )


def ablations(groups: Sequence[Group], baseline: str | None = None) -> list[Ablation]:
    """Compare configurations by their final evaluations, those on each test set apart.

    Args:
        groups: The configurations.
        baseline: Name of the one that the others are compared with; default: the first.

    Raises:
        UserError: There is no configuration of that name, or stored ranks cannot be read.
    """
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: there is no such configuration; there are {', '.join(names)}")
    base = baseline or names[0]
    data = dict.fromkeys(run.final.data for group in groups for run in group.runs if run.final)
    return [_ablation(groups, base, name) for name in data]


def _ablation(groups: Sequence[Group], base: str, data: str) -> Ablation:
    members = {
        group.name: [_Member(run) for run in group.runs if run.final and run.final.data == data] for group in groups
    }
    members = {name: found for name, found in members.items() if found}
    gains = []
    for name, ours in members.items():
        if all("reranked" in member.stages for member in ours):
            gains.append(compare(f"re-ranking, {name}", [_pair(one, one, "reranked", "coarse") for one in ours]))
    theirs = {member.seed: member for member in members.get(base, [])}
    for name, ours in members.items():
        for stage in STAGES if name != base else ():
            shared = [(one, theirs[one.seed]) for one in ours if one.seed in theirs]
            pairs = [_pair(*pair, stage, stage) for pair in shared if all(stage in one.stages for one in pair)]
            if pairs:
                gains.append(compare(f"{name} against {base}, {stage.replace('reranked', 're-ranked')}", pairs))
    return Ablation(data, [_recall_row(*item) for item in members.items()], gains, _notes(groups, members, base, gains))


class _Member:
    """A run's final evaluation as a member of a configuration."""

    def __init__(self, run: Run) -> None:
        assert run.final is not None
        self.run, self.evaluation, self.seed = run, run.final, run.config.seed
        self.report = self.evaluation.report
        self.stages = [stage for stage in STAGES if get(self.report, stage)]

    def mean(self, stage: str) -> float:
        return float(self.report[stage]["mean_R@1"])

    @cached_property
    def contributions(self) -> dict[str, dict[str, float]]:
        """By stage, what each picture contributes to mean R@1, in percent."""
        result = self.evaluation.result
        return {} if result is None else {stage: contributions(result, stage) for stage in self.stages}


def contributions(result: Any, stage: str) -> dict[str, float]:
    """Return what each picture contributes to mean R@1 in percent, by its own query and by its captions'.

    Args:
        result: A `toolkit.evaluation.results.Result`.
        stage: One of its stages.
    """
    import numpy as np

    total: dict[str, float] = {}
    for direction in DIRECTIONS:
        ranks = result.ranks(direction, stage)
        first = np.where(ranks.ahead == 0, ranks.right / (ranks.right + ranks.tied), 0.0)
        pictures, place = np.unique(ranks.picture, return_inverse=True)
        shares = np.bincount(place, first) * 50.0 / len(first)
        for picture, share in zip(pictures.tolist(), shares.tolist(), strict=True):
            total[picture] = total.get(picture, 0.0) + share
    return total


@dataclass(frozen=True)
class Pair:
    """Mean R@1 of two sides with one seed, and the contributions of the pictures where they are known."""

    ours: float
    theirs: float
    by_picture: "np.ndarray | None"  # [pictures], differences, in points; in the order of the pictures' ids


def _pair(ours: _Member, theirs: _Member, our_stage: str, their_stage: str) -> Pair:
    import numpy as np

    both = ours.contributions.get(our_stage), theirs.contributions.get(their_stage)
    by_picture = None
    if both[0] is not None and both[1] is not None and both[0].keys() == both[1].keys():
        by_picture = np.array([both[0][picture] - both[1][picture] for picture in sorted(both[0])])
    return Pair(ours.mean(our_stage), theirs.mean(their_stage), by_picture)


def compare(name: str, pairs: Sequence[Pair]) -> Gain:
    """Compare two sides over seeds."""
    import numpy as np

    differences = [pair.ours - pair.theirs for pair in pairs]
    known = [pair.by_picture for pair in pairs if pair.by_picture is not None]
    same = len(known) == len(pairs) and len({len(one) for one in known}) == 1
    return Gain(
        name,
        statistics.mean(pair.ours for pair in pairs),
        statistics.mean(pair.theirs for pair in pairs),
        statistics.mean(differences),
        statistics.stdev(differences) if len(pairs) > 1 else None,
        permutation_test(np.mean(known, axis=0)) if same else None,
        len(pairs),
    )


def permutation_test(differences: "np.ndarray") -> float:
    """Return the p of a two-sided test that a sum of paired differences is 0, by random signs.

    Args:
        differences: [pictures].
    """
    import numpy as np

    generator, extreme = np.random.default_rng(0), 0
    for _ in range(0, PERMUTATIONS, _CHUNK):
        signs = generator.choice((-1.0, 1.0), (_CHUNK, len(differences)))
        extreme += int((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)


def _recall_row(name: str, members: Sequence[_Member]) -> list[str]:
    cells = [name, str(len(members))]
    for stage in STAGES:
        for path in (("speech_to_image", "R@1"), ("image_to_speech", "R@1"), ("mean_R@1",)):
            cells.append(_spread([get(member.report, stage, *path) for member in members]))
    return cells


def _spread(values: Sequence[Any]) -> str:
    if not all(isinstance(value, int | float) for value in values):
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _notes(
    groups: Sequence[Group], members: Mapping[str, Sequence[_Member]], base: str, gains: Sequence[Gain]
) -> list[str]:
    notes = []
    few = [f"{name} ({len(found)})" for name, found in members.items() if len(found) < _SEEDS]
    if few:
        notes.append(f"Fewer than {_SEEDS} seeds, too few to tell a gain from chance: {', '.join(few)}.")
    if base not in members:
        notes.append(f"The baseline {base} was not evaluated on these data: nothing is compared with it.")
    if any(gain.p is None for gain in gains):
        missing = [one.run for found in members.values() for one in found if one.evaluation.result is None]
        example = f": python toolkit/evaluate.py --run {missing[0].folder}" if missing else ""
        notes.append(f"p is not measured where ranks of the same queries are not stored; for each run{example}")
    unfinished = [run.name for group in groups for run in group.runs if run.final is None]
    if unfinished:
        notes.append(f"Not evaluated yet: {', '.join(unfinished)}.")
    return notes


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
