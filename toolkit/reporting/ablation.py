"""What the settings of a grid's members gain in mean R@1, over seeds, with a paired test over the test pictures.

Members that differ by the seed only are one configuration. Runs with the same seed make a pair. The test is a
permutation test clustered by picture. A picture contributes by its own query and by its captions'. Under the null
hypothesis the sign of each picture's contribution, averaged over the seeds, is + or - with probability 1/2.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from toolkit.evaluation.results import DIRECTIONS, STAGES, describe_protocol
from toolkit.reporting.figures import get, number
from toolkit.reporting.runs import Configuration, Run

if TYPE_CHECKING:
    from toolkit.evaluation.summaries.significance import PictureSums

PERMUTATIONS = 20_000
_SEEDS = 3  # fewer do not tell a gain from chance
RECALL_COLUMNS = ["configuration", "seeds", "S>I R@1", "I>S R@1", "mean R@1", "re-ranked: S>I", "I>S", "mean R@1"]
GAIN_COLUMNS = ["gain in mean R@1, points", "with", "without", "gain", "deviation", "p", "seeds"]


@dataclass(frozen=True)
class Gain:
    """Mean R@1 of treatment and control in percent, and their difference, over seeds.

    Attributes:
        name: What is compared.
        treatment: Mean over seeds with what is compared, of the column "with".
        control: Mean over seeds without it, of the column "without".
        difference: Mean difference, in points.
        deviation: Standard deviation of the difference between seeds; None: there is one seed.
        p: Probability of such a difference by chance; None: the ranks of the queries were not stored.
        seeds: Number of pairs.
    """

    name: str
    treatment: float
    control: float
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
            number(self.treatment),
            number(self.control),
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


def ablations(configurations: Sequence[Configuration], baseline: str | None = None) -> list[Ablation]:
    """Compare configurations by their final evaluations, those on each test set apart.

    Args:
        configurations: The configurations.
        baseline: Name of the one that the others are compared with; default: the first.

    Raises:
        UserError: There is no configuration of that name, or stored ranks cannot be read.
    """
    names = [each.name for each in configurations]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: there is no such configuration; there are {', '.join(names)}")
    base = baseline or names[0]
    data = dict.fromkeys(run.final.data for each in configurations for run in each.runs if run.final)
    return [_ablation(configurations, base, name) for name in data]


def _ablation(configurations: Sequence[Configuration], base: str, data: str) -> Ablation:
    members = {
        each.name: [_Member(run) for run in each.runs if run.final and run.final.data == data]
        for each in configurations
    }
    members = {name: found for name, found in members.items() if found}
    gains = []
    for name, own in members.items():
        if all("reranked" in member.stages for member in own):
            gains.append(_compare(f"re-ranking, {name}", [_Pair(one, one, "reranked", "coarse") for one in own]))
    controls = {member.seed: member for member in members.get(base, [])}
    for name, own in members.items():
        for stage in STAGES if name != base else ():
            shared = [(one, controls[one.seed]) for one in own if one.seed in controls]
            pairs = [_Pair(*pair, stage, stage) for pair in shared if all(stage in one.stages for one in pair)]
            if pairs:
                gains.append(_compare(f"{name} against {base}, {stage.replace('reranked', 're-ranked')}", pairs))
    return Ablation(
        data, [_recall_row(*item) for item in members.items()], gains, _notes(configurations, members, base, gains)
    )


class _Member:
    """A run's final evaluation as a member of a configuration."""

    def __init__(self, run: Run) -> None:
        assert run.final is not None
        self.run, self.evaluation, self.seed = run, run.final, run.config.seed
        self.report = self.evaluation.report
        self.stages = [stage for stage in STAGES if isinstance(get(self.report, stage, "mean_R@1"), int | float)]

    def mean(self, stage: str) -> float:
        return float(self.report[stage]["mean_R@1"])

    @cached_property
    def sums(self) -> "dict[str, tuple[str, PictureSums]]":
        """By stage, a key of the queries and the hits of each picture; empty without stored ranks."""
        from toolkit.evaluation.summaries.significance import sum_by_picture

        result = self.evaluation.result
        found = {}
        for stage in self.stages if result else ():
            assert result is not None
            ranks = {direction: result.ranks(direction, stage) for direction in DIRECTIONS}
            queries = "\0".join(query for direction in DIRECTIONS for query in ranks[direction].query)
            found[stage] = queries, sum_by_picture(ranks)
        return found


@dataclass(frozen=True)
class _Pair:
    """Treatment and control with one seed."""

    treatment: _Member
    control: _Member
    treatment_stage: str
    control_stage: str

    @property
    def means(self) -> tuple[float, float]:
        """Mean R@1 of treatment and control."""
        return self.treatment.mean(self.treatment_stage), self.control.mean(self.control_stage)


def _compare(name: str, pairs: Sequence[_Pair]) -> Gain:
    """Compare treatment and control over seeds."""
    means = [pair.means for pair in pairs]
    differences = [treatment - control for treatment, control in means]
    return Gain(
        name,
        statistics.mean(treatment for treatment, _ in means),
        statistics.mean(control for _, control in means),
        statistics.mean(differences),
        statistics.stdev(differences) if len(pairs) > 1 else None,
        _p_value(pairs),
        len(pairs),
    )


def _p_value(pairs: Sequence[_Pair]) -> float | None:
    """Test the mean over seeds of what each picture contributes; None: not the same queries, or without ranks."""
    import numpy as np

    from toolkit.evaluation.summaries.significance import permutation_test

    sides = [
        (pair.treatment.sums.get(pair.treatment_stage), pair.control.sums.get(pair.control_stage)) for pair in pairs
    ]
    known = [(treatment, control) for treatment, control in sides if treatment is not None and control is not None]
    if len(known) < len(pairs) or len({queries for side in known for queries, _ in side}) > 1:
        return None
    difference = np.mean([treatment.hits - control.hits for (_, treatment), (_, control) in known], axis=0)
    queries = known[0][0][1].queries.sum(0)
    return float(permutation_test(difference, queries, PERMUTATIONS, seed=0)[-1])


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
    configurations: Sequence[Configuration], members: Mapping[str, Sequence[_Member]], base: str, gains: Sequence[Gain]
) -> list[str]:
    notes = []
    few = [f"{name} ({len(found)})" for name, found in members.items() if len(found) < _SEEDS]
    if few:
        notes.append(f"Fewer than {_SEEDS} seeds, too few to tell a gain from chance: {', '.join(few)}.")
    protocols = dict.fromkeys(
        describe_protocol(one.evaluation.result.protocol, stage)
        for found in members.values()
        for one in found
        for stage in one.stages
        if one.evaluation.result
    )
    if len(protocols) > len(STAGES):
        notes.append(f"The protocols differ: {'; '.join(protocols)}.")
    if base not in members:
        notes.append(f"The baseline {base} was not evaluated on these data: nothing is compared with it.")
    if any(gain.p is None for gain in gains):
        missing = [one.run for found in members.values() for one in found if one.evaluation.result is None]
        example = f": python toolkit/evaluate.py --run {missing[0].folder}" if missing else ""
        notes.append(f"p is not measured where ranks of the same queries are not stored; for each run{example}")
    unfinished = [run.name for each in configurations for run in each.runs if run.final is None]
    if unfinished:
        notes.append(f"Not evaluated yet: {', '.join(unfinished)}.")
    return notes


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
