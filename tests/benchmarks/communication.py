"""Bytes that a rank exchanges per step, counted on 2 and 4 ranks and computed up to 1,024, and scaling efficiency.

    python tests/benchmarks/communication.py [--json] [--batch B] [--flops F] [--bandwidth B] [--latency S] ...

The trainer runs steps on gloo ranks with negatives from all ranks, and every collective is counted; so is a plain
design that gathers keys three times and the tokens of all ranks, with gradient, to draw negatives. Both counts must
match the formulas of `scaling.py` to 0.1 %, except for the project's negatives, which are random and may deviate by
15 %. The formulas are then evaluated up to 1,024 ranks with the sizes of the large reference configuration and a given
machine, for the efficiency of weak scaling (the batch size grows with the number of ranks). Scaling is considered to
break down where efficiency falls below 90 % of that of a node of 8. Exit code 1: a bound is missed, or a count does not
match its formula.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scaling import Machine, Sizes, efficiency, ours, plain, seconds
from table import Figure, table

from tests.distributed import run_ranks

RANKS = [2**power for power in range(11)]
COUNTED_RANKS, STEPS = (2, 4), 3
BATCH, IMAGE_SIZE, MAX_SECONDS = 16, 56, 0.5  # per rank; nearly every caption is truncated to this duration
NODE, MIN_EFFICIENCY = 8, 0.9  # ranks of a node; relative to the efficiency of a node


def count_ours(rank: int, ranks: int, zero_stage: int) -> tuple[dict[str, float], dict[str, int]]:
    """Run the trainer on one rank; return bytes per step by kind of collective, and the sizes for the formulas."""
    import traffic

    counter = traffic.Traffic()
    counter.wrap_collectives()
    from training import frozen_model, make_batch, open_trainer

    from toolkit.config import schema as config

    configuration = config.Config(model=frozen_model(32, 2))
    configuration.objectives.matching.negatives = "global"
    configuration.objectives.contrastive.queue = 256
    configuration.training = config.Training(
        batch_size=BATCH * ranks, warmup_steps=0, precision="fp32", zero_stage=zero_stage
    )
    configuration.data.image_size, configuration.data.shuffle_shards = IMAGE_SIZE, 1
    with open_trainer(configuration) as trainer:
        assert trainer.teacher
        for step in range(1 + STEPS):
            batch = make_batch(step * ranks + rank, BATCH, IMAGE_SIZE, MAX_SECONDS)
            counter.enabled = step > 0
            trainer.train_step(step, iter([batch]))
        trainer.teacher.wait_pending()
        trained = [p for p in trainer.learner.parameters() if p.requires_grad]
        model = trainer.learner.model
        _, features = model.frozen_features(batch.images, batch.waveforms, batch.lengths)
        frames = int(model.speech.calls.frames(batch.lengths).max())
        patches = features.hidden.shape[1] - 1
        sizes = {
            "batch": BATCH,
            "dim": configuration.model.embed_dim,
            "speech": frames * model.speech.token_dim,
            "image": patches * model.image.token_dim,
            "frames": frames,
            "trained": sum(p.numel() for p in trained),
            "averaged": sum(p.numel() for p in trainer.teacher.student),
            "zero_stage": zero_stage,
        }
    return {name: value / STEPS for name, value in counter.bytes.items()}, sizes


def count_plain(rank: int, ranks: int, sizes: Sizes) -> float:
    """Count the bytes of a step of the plain design on one rank, with tensors of the same sizes."""
    import torch
    import torch.distributed as dist
    import traffic

    counter = traffic.Traffic()
    counter.wrap_collectives()

    def all_gather_cat(tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    counter.enabled = True
    for width in (sizes.dim, sizes.dim, 2):  # speech, images, int64 image ids
        all_gather_cat(torch.zeros(sizes.batch, width))
    for width, has_gradient in ((sizes.speech, sizes.speech_gradient), (sizes.image, sizes.image_gradient)):
        tokens = all_gather_cat(torch.zeros(sizes.batch, width))
        if has_gradient:
            dist.all_reduce(tokens)
    dist.all_reduce(torch.zeros(sizes.trained))
    return counter.total


def compare(ranks: int, zero_stage: int) -> list[dict[str, Any]]:
    """Count the traffic of both designs and compare it with the formulas."""
    results = run_ranks(count_ours, ranks, zero_stage, timeout=300)
    sizes = Sizes(**results[0][1])
    kinds = {
        "all_gather": ("keys", "requests", "weights", "teacher"),
        "all_reduce": ("gradients", "agreement"),
        "all_to_all_single": ("negatives",),
    }
    formula = ours(ranks, sizes)
    rows = []
    for kind, names in kinds.items():
        counted = sum(by_kind.get(kind, 0.0) for by_kind, _ in results) / ranks
        expected = sum(formula[name].bytes for name in names if name in formula)
        tolerance = 0.15 if kind == "all_to_all_single" else 1e-3
        rows.append(_row(ranks, f"ours: {', '.join(names)}", counted, expected, tolerance))
    unknown = {kind for by_kind, _ in results for kind in by_kind} - kinds.keys()
    if unknown:
        raise SystemExit(f"collectives that the formula does not cover: {', '.join(sorted(unknown))}")
    counted = sum(run_ranks(count_plain, ranks, sizes, timeout=120)) / ranks
    expected = sum(part.bytes for part in plain(ranks, sizes).values())
    return [*rows, _row(ranks, "plain", counted, expected, 1e-3)]


def _row(ranks: int, what: str, counted: float, formula: float, tolerance: float) -> dict[str, Any]:
    error = abs(counted / formula - 1)
    values = {"ranks": ranks, "what": what, "counted": counted, "formula": formula}
    return {**values, "error": error, "holds": error <= tolerance}


def scaling_curve(sizes: Sizes, machine: Machine) -> list[dict[str, Any]]:
    """Compute traffic and efficiency of both designs for each number of ranks, and the project's slowest collective."""
    rows = []
    for n in RANKS:
        parts, plain_parts = ours(n, sizes), plain(n, sizes)
        durations = seconds(n, parts, machine)
        rows.append(
            {
                "ranks": n,
                "ours_mb": sum(part.bytes for part in parts.values()) / 1e6,
                "plain_mb": sum(part.bytes for part in plain_parts.values()) / 1e6,
                "ours_efficiency": efficiency(n, parts, sizes, machine),
                "plain_efficiency": efficiency(n, plain_parts, sizes, machine),
                "ours_slowest": max(durations, key=durations.__getitem__) if n > 1 else "",
            }
        )
    return rows


def scaling_limit(rows: list[dict[str, Any]], design: str) -> str:
    """Describe from how many ranks on a design has less than `MIN_EFFICIENCY` of a node's efficiency."""
    efficiencies = {row["ranks"]: row[f"{design}_efficiency"] for row in rows}
    below = [n for n in RANKS if n > NODE and efficiencies[n] < MIN_EFFICIENCY * efficiencies[NODE]]
    return f"from {below[0]:,} ranks" if below else f"not up to {RANKS[-1]:,} ranks"


def report(counts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return the table of counts and the table of the scaling curve as text."""
    lines = [f"{'ranks':>5}  {'counted':>12}  {'formula':>12}  {'error':>6}"]
    for row in counts:
        verdict = "ok" if row["holds"] else "MISSED"
        numbers = f"{row['ranks']:>5}  {row['counted']:>12,.0f}  {row['formula']:>12,.0f}  {row['error']:>6.1%}"
        lines.append(f"{numbers}  {verdict:6}  {row['what']}")
    lines += [
        "",
        f"{'ranks':>5}  {'ours MB':>9}  {'plain MB':>9}  {'ours':>6}  {'plain':>6}  slowest collective of ours",
    ]
    for row in rows:
        sizes = f"{row['ours_mb']:>9,.1f}  {row['plain_mb']:>9,.1f}"
        efficiencies = f"{row['ours_efficiency']:>6.1%}  {row['plain_efficiency']:>6.1%}"
        lines.append(f"{row['ranks']:>5}  {sizes}  {efficiencies}  {row['ours_slowest']}")
    limits = f"ours {scaling_limit(rows, 'ours')}, plain {scaling_limit(rows, 'plain')}"
    return "\n".join([*lines, "", f"less than {MIN_EFFICIENCY:.0%} of a node's efficiency: {limits}", ""])


def _count_figure(row: dict[str, Any]) -> Figure:
    """Return the figure of counted bytes against their formula."""
    name = re.sub(r"\W+", "_", f"bytes_{row['ranks']}_{row['what']}")
    ratio = row["counted"] / row["formula"]
    return Figure(name, row["counted"], row["formula"], "bytes", ratio, row["what"], at_most=1.02)


def _efficiency_figure(row: dict[str, Any]) -> Figure:
    """Return the efficiency figure of a row; nothing is sent on one rank, and the plain design sends less on few."""
    ours, plain = row["ours_efficiency"], row["plain_efficiency"]
    return Figure(f"efficiency_{row['ranks']}", ours, plain, "", ours / plain, "computed", at_least=0.95)


def main() -> int:
    """Count, compute, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of tables")
    parser.add_argument("--no-count", action="store_true", help="evaluate the formulas only")
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2], help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pairs per rank (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=768, help="embedding dimension (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=400, help="frames of the longest caption (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=256, help="patches per image (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="token dimension (default: %(default)s)")
    parser.add_argument("--trained", type=float, default=94e6, help="trained parameters (default: %(default)g)")
    parser.add_argument(
        "--averaged", type=float, default=14e6, help="parameters that the teacher averages (default: %(default)g)"
    )
    parser.add_argument("--flops", type=float, default=4e14, help="achieved FLOP/s per rank (default: %(default)g)")
    parser.add_argument("--work", type=float, default=6e11, help="FLOPs per pair (default: %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes per second (default: %(default)g)")
    parser.add_argument(
        "--latency", type=float, default=1e-5, help="seconds per doubling of ranks (default: %(default)g)"
    )
    parser.add_argument("--message", type=float, default=1e-6, help="seconds per message (default: %(default)g)")
    options = parser.parse_args()
    sizes = Sizes(
        batch=options.batch,
        dim=options.dim,
        speech=options.frames * options.width,
        image=options.patches * options.width,
        frames=options.frames,
        trained=int(options.trained),
        averaged=int(options.averaged),
        element_size=2,
        zero_stage=options.zero,
    )
    machine = Machine(
        options.work * options.batch / options.flops, options.flops, options.bandwidth, options.latency, options.message
    )
    counts = [] if options.no_count else [row for ranks in COUNTED_RANKS for row in compare(ranks, options.zero)]
    rows = scaling_curve(sizes, machine)
    last, what = rows[-1], f"MB received per step and rank on {RANKS[-1]:,} ranks, {options.batch} pairs each, computed"
    ratio = last["ours_mb"] / last["plain_mb"]
    figure = Figure("step_bytes", last["ours_mb"], last["plain_mb"], "MB", ratio, what, at_most=0.05)
    if options.json:
        print("\n".join(one.json() for one in [*map(_count_figure, counts), *map(_efficiency_figure, rows), figure]))
    else:
        print(report(counts, rows))
        print(table([figure]))
    return 0 if figure.holds and all(row["holds"] for row in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
