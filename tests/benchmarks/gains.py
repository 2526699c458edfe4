"""What re-ranking by SIM and what CMD gain in mean R@1, over seeds, paired over the same test queries.

    python launch/submit.py --config quickstart --run runs/gains --grid slurm/grids/gains.yaml
    python tests/benchmarks/gains.py runs/gains [MORE_FOLDERS] [--json]

Every finished run in the folders is evaluated on its final split, coarse and re-ranked. Runs with the same seed, with
and without CMD, make a pair. The test is a permutation test: under the hypothesis of no gain the sign of a picture's
contribution, of its own query and of its captions' over all seeds, is a coin's. Exit code 1: a bound is missed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

PERMUTATIONS = 20_000


@dataclass
class Result:
    """One run: its seed, whether CMD was trained, and by picture what it adds to mean R@1, in points."""

    run: Path
    seed: int
    denoising: bool
    coarse: np.ndarray
    reranked: np.ndarray


@dataclass
class Gain:
    """Mean R@1 of both sides and their difference, over seeds."""

    figure: str
    ours: float
    theirs: float
    difference: float
    deviation: float  # between seeds
    p: float
    seeds: int
    at_least: float  # points

    @property
    def holds(self) -> bool:
        """Whether the difference reaches its bound and is no accident."""
        return self.difference >= self.at_least and self.p < 0.05

    def json(self) -> str:
        """One line; the bound is on the difference."""
        return json.dumps({**vars(self), "unit": "mean R@1, %", "ratio": self.ours / self.theirs})

    def text(self) -> str:
        """One line of the table."""
        values = f"{self.ours:6.1f} {self.theirs:6.1f} {self.difference:+7.2f} {self.deviation:6.2f} {self.p:9.4f}"
        return f"{self.figure:<24}{values} {self.seeds:6d}   >= {self.at_least:g} {'ok' if self.holds else 'MISSED'}"


def measure(run: Path) -> Result:
    """Evaluate a run on its final split."""
    import torch

    from shards.manifest import load
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.recall import hits_at
    from toolkit.evaluation.retrieve import retrieve
    from toolkit.run_folder import find_export, load_model, load_run

    config = load_run(run)
    model = load_model(find_export(run, None))
    manifest, process = load(config.data.shards), ProcessInfo(0, 1, torch.device("cpu"))
    by_stage = []
    for k in (0, config.final.rerank):
        found = retrieve(model, manifest, config.final.split or "test", config, k, process)
        spoken = hits_at(found.speech_to_image.rank_counts, 1) / len(found.captions)
        shown = hits_at(found.image_to_speech.rank_counts, 1) / len(found.queries)
        added = torch.zeros(len(found.samples), dtype=torch.float64)
        added.index_add_(0, found.picture, spoken).index_add_(0, found.queries, shown)
        by_stage.append(50.0 * added.numpy())  # the mean of two directions, in per cent
    return Result(run, config.seed, config.objectives.denoising.weight > 0, *by_stage)


def gain(figure: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], at_least: float) -> Gain:
    """Compare two sides, a pair of arrays [pictures] for each seed."""
    differences = np.stack(ours) - np.stack(theirs)  # [seeds, pictures]
    by_picture = differences.mean(0)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (PERMUTATIONS, len(by_picture)))
    extreme = np.abs(signs @ by_picture) >= abs(by_picture.sum()) - 1e-9
    by_seed = differences.sum(1)
    return Gain(
        figure,
        float(np.stack(ours).sum(1).mean()),
        float(np.stack(theirs).sum(1).mean()),
        float(by_seed.mean()),
        statistics.stdev(by_seed) if len(by_seed) > 1 else float("nan"),
        float((extreme.sum() + 1) / (PERMUTATIONS + 1)),
        len(by_seed),
        at_least,
    )


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of grids or of runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--rerank-at-least", type=float, default=2.0, help="points (default: %(default)s)")
    parser.add_argument("--cmd-at-least", type=float, default=1.5, help="points (default: %(default)s)")
    options = parser.parse_args()
    runs = sorted({path.parent.parent for folder in options.folders for path in folder.rglob("export/last")})
    if not runs:
        parser.error(f"no finished run in {', '.join(map(str, options.folders))}")
    results = []
    for run in runs:
        results.append(measure(run))
        one = results[-1]
        print(f"{run}: coarse {one.coarse.sum():.1f}, re-ranked {one.reranked.sum():.1f}", file=sys.stderr, flush=True)
    whole = {one.seed: one for one in results if one.denoising}
    without = {one.seed: one for one in results if not one.denoising}
    gains = []
    for name, group in (("rerank", whole), ("rerank_without_cmd", without)):
        if group:
            both = [one.reranked for one in group.values()], [one.coarse for one in group.values()]
            gains.append(gain(f"{name}_gain", *both, options.rerank_at_least))
    if pairs := sorted(whole.keys() & without.keys()):
        for stage in ("coarse", "reranked"):
            both = [getattr(whole[s], stage) for s in pairs], [getattr(without[s], stage) for s in pairs]
            gains.append(gain(f"cmd_gain_{stage}", *both, options.cmd_at_least))
    if options.json:
        print("\n".join(one.json() for one in gains))
    else:
        print(f"{'mean R@1, %':<24}{'ours':>6} {'theirs':>6} {'gain':>7} {'+-':>6} {'p':>9} {'seeds':>6}   bound")
        print("\n".join(one.text() for one in gains))
    return 0 if all(one.holds for one in gains) else 1


if __name__ == "__main__":
    sys.exit(main())
