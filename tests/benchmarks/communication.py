"""Bytes that a rank exchanges in a step: counted on 2 and 4 ranks, by formula up to 1,024, and where scaling bends.

    python tests/benchmarks/communication.py [--json] [--batch B] [--flops F] [--bandwidth B] [--latency S] ...

The trainer takes steps on gloo ranks with negatives from all of them, and every collective is counted; so is a plain
design that gathers keys thrice and the tokens of all ranks, with gradient, to draw from. Both have to be what the
formulas of `scaling.py` say: exactly, but for the negatives of ours, which are drawn, and may be 15 % off. The formulas
then go up to 1,024 ranks with the sizes of the large reference, and with the machine's figures tell the efficiency of
weak scaling: the batch grows with the ranks. The curve is flat from a node of 8 on, and bends where less than 90 % of a
node's efficiency is left. Exit code 1: a bound is missed, or a count is not what the formula says.
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
COUNTED, STEPS = (2, 4), 3
BATCH, IMAGE_SIZE, LONGEST = 16, 56, 0.5  # of a rank; nearly every caption is longer than that
NODE, BENT = 8, 0.9


def count_ours(rank: int, ranks: int, zero: int) -> tuple[dict[str, float], dict[str, int]]:
    """Count the trainer's steps on one rank: bytes a step by kind of collective, and the sizes for the formulas."""
    import traffic

    counted = traffic.Traffic()
    counted.watch()
    from training import frozen_model, make_batch, open_trainer

    from toolkit.config import schema as config

    configuration = config.Config(model=frozen_model(32, 2))
    configuration.objectives.matching.negatives = "global"
    configuration.objectives.contrastive.queue = 256
    configuration.training = config.Training(
        batch_size=BATCH * ranks, warmup_steps=0, precision="fp32", zero_stage=zero
    )
    configuration.data.image_size, configuration.data.shuffle_shards = IMAGE_SIZE, 1
    with open_trainer(configuration) as trainer:
        assert trainer.teacher
        for step in range(1 + STEPS):
            batch = make_batch(step * ranks + rank, BATCH, IMAGE_SIZE, LONGEST)
            counted.on = step > 0
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
            "zero": zero,
        }
    return {name: value / STEPS for name, value in counted.bytes.items()}, sizes


def count_plain(rank: int, ranks: int, sizes: Sizes) -> float:
    """Bytes of a step of the plain design on one rank, with tensors of the same sizes."""
    import torch
    import torch.distributed as dist
    import traffic

    counted = traffic.Traffic()
    counted.watch()

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    with counted.counting():
        for width in (sizes.dim, sizes.dim, 2):  # speech, images, identities: int64
            gathered(torch.zeros(sizes.batch, width))
        for width, has_gradient in ((sizes.speech, sizes.speech_gradient), (sizes.image, sizes.image_gradient)):
            tokens = gathered(torch.zeros(sizes.batch, width))
            if has_gradient:
                dist.all_reduce(tokens)
        dist.all_reduce(torch.zeros(sizes.trained))
    return counted.total


def compare(ranks: int, zero: int) -> list[dict[str, Any]]:
    """Count both designs and hold them against the formulas."""
    results = run_ranks(count_ours, ranks, zero, timeout=300)
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
        within = 0.15 if kind == "all_to_all_single" else 1e-3
        rows.append(_row(ranks, f"ours: {', '.join(names)}", counted, expected, within))
    unknown = {kind for by_kind, _ in results for kind in by_kind} - kinds.keys()
    if unknown:
        raise SystemExit(f"collectives that the formula does not know: {', '.join(sorted(unknown))}")
    counted = sum(run_ranks(count_plain, ranks, sizes, timeout=120)) / ranks
    expected = sum(part.bytes for part in plain(ranks, sizes).values())
    return [*rows, _row(ranks, "plain", counted, expected, 1e-3)]


def _row(ranks: int, what: str, counted: float, formula: float, within: float) -> dict[str, Any]:
    off = abs(counted / formula - 1)
    return {"ranks": ranks, "what": what, "counted": counted, "formula": formula, "off": off, "holds": off <= within}


def curve(sizes: Sizes, machine: Machine) -> list[dict[str, Any]]:
    """Bytes and efficiency of both designs for every number of ranks, and what takes ours longest."""
    rows = []
    for n in RANKS:
        parts, others = ours(n, sizes), plain(n, sizes)
        taken = seconds(n, parts, machine)
        rows.append(
            {
                "ranks": n,
                "ours_mb": sum(part.bytes for part in parts.values()) / 1e6,
                "plain_mb": sum(part.bytes for part in others.values()) / 1e6,
                "ours_efficiency": efficiency(n, parts, sizes, machine),
                "plain_efficiency": efficiency(n, others, sizes, machine),
                "ours_slowest": max(taken, key=taken.__getitem__) if n > 1 else "",
            }
        )
    return rows


def bend(rows: list[dict[str, Any]], design: str) -> str:
    """From how many ranks on a design keeps less than `BENT` of a node's efficiency."""
    kept = {row["ranks"]: row[f"{design}_efficiency"] for row in rows}
    bent = [n for n in RANKS if n > NODE and kept[n] < BENT * kept[NODE]]
    return f"from {bent[0]:,} ranks" if bent else f"not up to {RANKS[-1]:,} ranks"


def report(counts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Both tables as text."""
    lines = [f"{'ranks':>5}  {'counted':>12}  {'formula':>12}  {'off':>6}"]
    for row in counts:
        verdict = "ok" if row["holds"] else "MISSED"
        numbers = f"{row['ranks']:>5}  {row['counted']:>12,.0f}  {row['formula']:>12,.0f}  {row['off']:>6.1%}"
        lines.append(f"{numbers}  {verdict:6}  {row['what']}")
    lines += ["", f"{'ranks':>5}  {'ours MB':>9}  {'plain MB':>9}  {'ours':>6}  {'plain':>6}  slowest of ours"]
    for row in rows:
        sizes = f"{row['ours_mb']:>9,.1f}  {row['plain_mb']:>9,.1f}"
        kept = f"{row['ours_efficiency']:>6.1%}  {row['plain_efficiency']:>6.1%}"
        lines.append(f"{row['ranks']:>5}  {sizes}  {kept}  {row['ours_slowest']}")
    bent = f"less than {BENT:.0%} of a node's efficiency: ours {bend(rows, 'ours')}, plain {bend(rows, 'plain')}"
    return "\n".join([*lines, "", bent, ""])


def _counted(row: dict[str, Any]) -> Figure:
    """What was counted against its formula."""
    name = re.sub(r"\W+", "_", f"bytes_{row['ranks']}_{row['what']}")
    ratio = row["counted"] / row["formula"]
    return Figure(name, row["counted"], row["formula"], "bytes", ratio, row["what"], at_most=1.02)


def _computed(row: dict[str, Any]) -> Figure:
    """A row of the curve; on one rank nothing is sent, and on few the plain design sends less."""
    ours, plain = row["ours_efficiency"], row["plain_efficiency"]
    return Figure(f"efficiency_{row['ranks']}", ours, plain, "", ours / plain, "computed", at_least=0.95)


def main() -> int:
    """Count, compute, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than tables")
    parser.add_argument("--no-count", action="store_true", help="formulas only")
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2], help="stage (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pairs a rank (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=768, help="of the embeddings (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=400, help="of the longest caption (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=1024, help="of a token (default: %(default)s)")
    parser.add_argument("--trained", type=float, default=94e6, help="parameters (default: %(default)g)")
    parser.add_argument("--averaged", type=float, default=14e6, help="parameters (default: %(default)g)")
    parser.add_argument("--flops", type=float, default=4e14, help="a second and rank, reached (default: %(default)g)")
    parser.add_argument("--work", type=float, default=6e11, help="FLOP a pair (default: %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes a second (default: %(default)g)")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds a doubling (default: %(default)g)")
    parser.add_argument("--message", type=float, default=1e-6, help="seconds a message (default: %(default)g)")
    o = parser.parse_args()
    sizes = Sizes(
        batch=o.batch,
        dim=o.dim,
        speech=o.frames * o.width,
        image=o.patches * o.width,
        frames=o.frames,
        trained=int(o.trained),
        averaged=int(o.averaged),
        number=2,
        zero=o.zero,
    )
    machine = Machine(o.work * o.batch / o.flops, o.flops, o.bandwidth, o.latency, o.message)
    counts = [] if o.no_count else [row for ranks in COUNTED for row in compare(ranks, o.zero)]
    rows = curve(sizes, machine)
    last, what = rows[-1], f"MB a step a rank receives on {RANKS[-1]:,} ranks, {o.batch} pairs each, by formula"
    ratio = last["ours_mb"] / last["plain_mb"]
    figure = Figure("step_bytes", last["ours_mb"], last["plain_mb"], "MB", ratio, what, at_most=0.05)
    if o.json:
        print("\n".join(one.json() for one in [*map(_counted, counts), *map(_computed, rows), figure]))
    else:
        print(report(counts, rows))
        print(table([figure]))
    return 0 if figure.holds and all(row["holds"] for row in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
