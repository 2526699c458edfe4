"""Throughput of a machine's GPUs: pairs per second, utilization, and the largest batch at each ZeRO stage.

    python tests/benchmarks/gpu.py [--json] [--config flickr8k] [--stages 0,1,2,3] [--gpus N] [--limit PAIRS]

Trains the configuration with trunks of the true sizes but random weights (HuBERT-large and CLIP ViT-L/14 for flickr8k),
on shards of noise, through `toolkit/train.py --profile`, with one process per GPU. The batch size per rank is doubled
until memory is exhausted. Utilization is the model's FLOPs relative to the data sheet's peak (see
`toolkit/training/metrics/profile.py`). Fails without a GPU, except with `--tiny`, which tests the script on a CPU.
"""

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
from table import Figure, build_parser, print_figures

from launch.executor import count_gpus
from launch.preflight.estimate import KNOWN
from tests.tiny import HUBERT, VIT
from toolkit.config.load import CONFIGS, apply_yaml
from toolkit.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 1024
HEADS = 16  # of both large trunks; counts of FLOPs do not depend on it
STEPS = 8


def configuration(name: str, shards: Path, tiny: bool) -> dict[str, Any]:
    """Return the named configuration, with random weights of its trunks' sizes and the given shards."""
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
    """Profile `STEPS` steps at a ZeRO stage with `batch` pairs per rank; return the profile, or an error message."""
    run = folder / f"zero{stage}-batch{batch}"
    tree = {**tree, "run": str(run), "training": {**tree["training"], "zero_stage": stage, "batch_size": batch * gpus}}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "--", "toolkit/train.py"]
    words = ["--config", str(file), "--profile", str(STEPS)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        profile: dict[str, Any] = json.loads((run / "profile" / "profile.json").read_text())
        return profile
    stderr = done.stderr.strip()
    if "out of memory" in stderr.lower():
        return "out of memory"
    own = [line for line in stderr.splitlines() if line.startswith("error: ")]  # before the report of torchrun
    return (own or stderr.splitlines() or [f"exit code {done.returncode} without an error message"])[-1]


def largest_batch(tree: dict[str, Any], folder: Path, gpus: int, stage: int, limit: int) -> tuple[int, dict[str, Any]]:
    """Return the largest batch size per rank that fits, doubling from 8 up to `limit`, and its profile.

    Raises:
        SystemExit: A batch of 8 pairs fails.
    """
    best: tuple[int, dict[str, Any]] | None = None
    batch = 8
    while batch <= limit:
        profile = measure(tree, folder, gpus, stage, batch)
        if isinstance(profile, str):
            print(f"ZeRO {stage}, {batch} pairs per rank: {profile}", file=sys.stderr, flush=True)
            break
        rate, utilization = profile["pairs_per_second"], profile["utilisation"]
        line = f"ZeRO {stage}, {batch} pairs per rank: {rate:.1f} pairs/s, utilization {utilization:.1%}"
        print(line, file=sys.stderr, flush=True)
        best, batch = (batch, profile), 2 * batch
    if best is None:
        sys.exit(f"ZeRO {stage} fails with 8 pairs per rank")
    return best


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__)
    parser.add_argument("--config", default="flickr8k", help="flickr8k or spokencoco (default: %(default)s)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=count_gpus(), help="processes, one per GPU (default: all GPUs of this machine)"
    )
    parser.add_argument(
        "--limit", type=int, default=1024, help="largest batch size per rank to try (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="test the script with a tiny model on one CPU process")
    options = parser.parse_args()
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not options.gpus:
        parser.error("no GPU found; --tiny tests the script without one")
    gpus = 1 if options.tiny else options.gpus
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = corpus.make_shards(folder / "shards", 128 if options.tiny else PICTURES, os.cpu_count() or 1)
        tree = configuration(options.config, shards, options.tiny)
        stages = [int(stage) for stage in options.stages.split(",")]
        results = {stage: largest_batch(tree, folder, gpus, stage, options.limit) for stage in stages}
    figures = []
    first, base = stages[0], results[stages[0]][1]
    for stage, (batch, profile) in results.items():
        device = f"{gpus} x {profile['device']}"
        what = f"TFLOP/s per rank at ZeRO {stage} with {batch} pairs per rank on {device}, against the peak"
        values = (profile["tflops"], profile["peak"], "TFLOP/s", profile["utilisation"])
        figures.append(Figure(f"utilisation_zero{stage}", *values, what, at_least=0.2))
        what = f"pairs/s at ZeRO {stage}, largest batch that fits, against stage {first}"
        rates = profile["pairs_per_second"], base["pairs_per_second"]
        figures.append(Figure(f"rate_zero{stage}", *rates, "pairs/s", rates[0] / rates[1], what, at_least=0.5))
        what = f"largest batch size per rank at ZeRO {stage}, against stage {first}"
        sizes = batch, results[first][0]
        figures.append(Figure(f"batch_zero{stage}", *sizes, "pairs", sizes[0] / sizes[1], what, at_least=1.0))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
