"""Throughput of a machine's GPUs: pairs a second, utilization, and the largest batch at each ZeRO stage.

    python tests/benchmarks/gpu.py [--json] [--config flickr8k] [--stages 0,1,2,3] [--gpus N] [--limit PAIRS]

It trains the configuration with trunks of the true sizes but random weights (HuBERT-large and CLIP ViT-L/14 for
flickr8k), on noise in shards of its own, through `toolkit/train.py --profile`, a process a GPU. The batch a rank is
doubled until the memory is full. Utilization is of the model's FLOPs against the data sheet's peak (see
`toolkit/training/metrics/profile.py`). Without a GPU it refuses, but for `--tiny`, which shows on a CPU that it works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import corpus
import yaml
from table import Figure, print_figures

from launch.executor import count_gpus
from launch.preflight.estimate import KNOWN
from tests.tiny import HUBERT, VIT
from toolkit.config.load import CONFIGS, apply_yaml
from toolkit.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 1024
HEADS = 16  # of both large trunks, and as good for counting as any
STEPS = 8


def configuration(name: str, shards: Path, tiny: bool) -> dict[str, Any]:
    """The named configuration, with random weights of its trunks' sizes and our shards."""
    named = Config()
    apply_yaml(named, CONFIGS / f"{name}.yaml")
    tree = asdict(named)
    tree["data"].update(shards=str(shards), shuffle_shards=2)
    for encoder, small in (("speech", HUBERT), ("image", VIT)):
        values = tree["model"][encoder]
        large = {**KNOWN[values["trunk"]], "num_attention_heads": HEADS}
        values.update(trunk=None, config=dict(small) if tiny else large)
    if tiny:
        tree["data"]["image_size"] = VIT["image_size"]
        tree["model"]["speech"]["head_heads"] = 4
        tree["model"]["fusion"].update(width=32, layers=1, heads=4)
        tree["training"]["precision"] = "fp32"
    return tree


def measure(tree: dict[str, Any], folder: Path, gpus: int, stage: int, batch: int) -> dict[str, Any] | str:
    """Profile some steps at a stage with so many pairs a rank: the figures, or why there are none."""
    run = folder / f"zero{stage}-batch{batch}"
    tree = {**tree, "run": str(run), "training": {**tree["training"], "zero_stage": stage, "batch_size": batch * gpus}}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "--", "toolkit/train.py"]
    words = ["--config", str(file), "--profile", str(STEPS)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads((run / "profile" / "profile.json").read_text())
        return found
    said = done.stderr.strip()
    return "out of memory" if "out of memory" in said.lower() else said.splitlines()[-1] if said else "it said nothing"


def largest(tree: dict[str, Any], folder: Path, gpus: int, stage: int, limit: int) -> tuple[int, dict[str, Any]]:
    """The largest batch a rank that fits, doubling from 8, and its profile.

    Raises:
        SystemExit: Not even 8 pairs run.
    """
    best: tuple[int, dict[str, Any]] | None = None
    batch = 8
    while batch <= limit:
        found = measure(tree, folder, gpus, stage, batch)
        if isinstance(found, str):
            print(f"ZeRO {stage}, {batch} pairs a rank: {found}", file=sys.stderr, flush=True)
            break
        rate, share = found["pairs_per_second"], found["utilisation"]
        print(f"ZeRO {stage}, {batch} pairs a rank: {rate:.1f} pairs/s, {share:.1%}", file=sys.stderr, flush=True)
        best, batch = (batch, found), 2 * batch
    if best is None:
        sys.exit(f"ZeRO {stage} does not run with 8 pairs a rank")
    return best


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--config", default="flickr8k", help="flickr8k or spokencoco (default: %(default)s)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=count_gpus(), help="default: all of this machine")
    parser.add_argument("--limit", type=int, default=1024, help="largest batch a rank to try (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing on one CPU process, to try the script")
    options = parser.parse_args()
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not options.gpus:
        parser.error("no GPU is seen here; --tiny tries the script without one")
    gpus = 1 if options.tiny else options.gpus
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = corpus.make_shards(folder / "shards", 128 if options.tiny else PICTURES, os.cpu_count() or 1)
        tree = configuration(options.config, shards, options.tiny)
        stages = [int(stage) for stage in options.stages.split(",")]
        found = {stage: largest(tree, folder, gpus, stage, options.limit) for stage in stages}
    figures = []
    first, base = stages[0], found[stages[0]][1]
    for stage, (batch, profile) in found.items():
        what = f"TFLOP/s a rank at ZeRO {stage} with {batch} pairs a rank on {gpus} x {profile['device']}, of the peak"
        reached = (profile["tflops"], profile["peak"], "TFLOP/s", profile["utilisation"])
        figures.append(Figure(f"utilisation_zero{stage}", *reached, what, at_least=0.2))
        what = f"pairs/s at ZeRO {stage}, largest batch that fits, against stage {first}"
        rates = profile["pairs_per_second"], base["pairs_per_second"]
        figures.append(Figure(f"rate_zero{stage}", *rates, "pairs/s", rates[0] / rates[1], what, at_least=0.5))
        what = f"largest batch a rank at ZeRO {stage}, against stage {first}"
        sizes = batch, found[first][0]
        figures.append(Figure(f"batch_zero{stage}", *sizes, "pairs", sizes[0] / sizes[1], what, at_least=1.0))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
