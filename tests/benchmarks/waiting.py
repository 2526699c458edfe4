"""Share of training time that steps wait for data, with the real loader.

    python tests/benchmarks/waiting.py [--json] [--ranks N] [--steps N] [--set KEY=VALUE ...]

`toolkit/train.py` trains the quickstart's model on its objectives with its loader, with one worker and 16 pairs per
rank, so that a step costs the same as there on one core. The pictures and captions are generated noise with the
decoding time of photographs and speech. The figure is the share of step time that the log reports as waiting, over all
intervals but the first, in which the worker starts. One rank by default: with several, the log's figure includes the
time that ranks wait for one another. Exit code 1: the bound is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import corpus
from table import Figure, build_parser, print_figures

ROOT = Path(__file__).resolve().parents[2]
PICTURES, INTERVAL = 128, 5


def train(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train on ranks of this machine and return the logged intervals."""
    overrides = {
        "run": str(folder / "run"),
        "data.shards": str(corpus.make_shards(folder / "shards", PICTURES, len(os.sched_getaffinity(0)))),
        "training.batch_size": str(16 * options.ranks),
        "training.stop_after": str(options.steps),
        "training.log_every": str(INTERVAL),
        "evaluation.every": "0",
        "wandb.mode": "disabled",
        **dict(each.split("=", 1) for each in options.set),
    }
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}", "--"]
    words = ["toolkit/train.py", "--config", "quickstart", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"training failed:\n{(done.stdout + done.stderr)[-3000:]}")
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "waiting" in record]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="ranks; the quickstart uses two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a configuration key")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        intervals = train(Path(folder), options)[1:]
    if not intervals:
        raise SystemExit(f"--steps {options.steps} is too small: the first {INTERVAL} steps are excluded")
    step = sum(16 * options.ranks / each["pairs_per_second"] for each in intervals) / len(intervals)
    share = sum(each["waiting"] / each["pairs_per_second"] for each in intervals)
    share /= sum(1 / each["pairs_per_second"] for each in intervals)
    steps = INTERVAL * len(intervals)
    what = f"share of step time spent waiting for data: quickstart on {options.ranks} ranks, {steps} steps"
    figure = Figure("data_wait", share * step, step, "s", share, what, at_most=0.05)
    return print_figures([figure], options.json)


if __name__ == "__main__":
    sys.exit(main())
