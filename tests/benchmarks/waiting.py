"""How much of a training its steps wait for data, with the real loader.

    python tests/benchmarks/waiting.py [--json] [--ranks N] [--steps N] [--set KEY=VALUE ...]

`toolkit/train.py` trains the quickstart's model on its objectives with its loader, a worker a rank and 16 pairs a rank,
so that a step costs what it costs there on one core; the pictures and captions are noise that is as long to decode as
photographs and speech, made here. The figure is the share of the steps' time that the log calls waiting, over all
intervals but the first, in which the worker starts. By default one rank: what several wait for one another is in the
log's figure too. Exit code 1: the bound is missed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import corpus
from table import Figure, print_figures

ROOT = Path(__file__).resolve().parents[2]
PICTURES, INTERVAL = 128, 5


def train(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train on ranks of this machine, and give the log's intervals."""
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
    command = [sys.executable, str(ROOT / "toolkit" / "train.py"), "--config", "quickstart", *arguments]
    common = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["OMP_NUM_THREADS"] = "1"
    with (folder / "output").open("w+") as output:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(options.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"the training failed:\n{(folder / 'output').read_text()[-3000:]}")
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "waiting" in record]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--ranks", type=int, default=1, help="of the two of the quickstart (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configuration")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        intervals = train(Path(folder), options)[1:]
    if not intervals:
        raise SystemExit(f"--steps {options.steps} is too few: the first {INTERVAL} are not counted")
    step = sum(16 * options.ranks / each["pairs_per_second"] for each in intervals) / len(intervals)
    share = sum(each["waiting"] / each["pairs_per_second"] for each in intervals)
    share /= sum(1 / each["pairs_per_second"] for each in intervals)
    what = (
        f"share of a step that waits for data: quickstart on {options.ranks} ranks, {INTERVAL * len(intervals)} steps"
    )
    figure = Figure("data_wait", share * step, step, "s", share, what, at_most=0.05)
    return print_figures([figure], options.json)


if __name__ == "__main__":
    sys.exit(main())
