"""Create the files of a version, which later versions must be able to read (`tests/test_compatibility.py`).

    python tests/compatibility/make.py VERSION

In `tests/compatibility/VERSION`: shards of tones and plain pictures; a run of two ranks stopped at step 3 of 6 (its
configuration, checkpoint, export and log); its configuration file; and the results of an uninterrupted run, as
`expected.json`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RATE = 16000
SPLITS = {"train": 12, "dev": 6, "test": 6}
LOSSES = ("loss", "contrastive", "matching", "denoising", "temperature")


def make_corpus(folder: Path) -> Path:
    """Write random pictures and tones, and the table that lists them."""
    rows = ["image,audio,split"]
    for split, count in SPLITS.items():
        for n in range(count):
            chance = np.random.default_rng([len(split), n])
            squares = chance.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(squares).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{split}{n}.png")
            time = np.arange(int(chance.integers(RATE // 4, RATE // 2))) / RATE
            tone = 0.4 * np.sin(2 * np.pi * chance.uniform(200, 2000) * time)
            soundfile.write(folder / f"{split}{n}.wav", tone, RATE)
            rows.append(f"{split}{n}.png,{split}{n}.wav,{split}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def call(*command: str | Path, ranks: int = 1) -> None:
    """Run one of the project's commands on a number of ranks."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [] if ranks == 1 else [f"--nproc_per_node={ranks}", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*start, *map(str, command)], cwd=ROOT, env=environment, check=True, timeout=280)


def read_losses(run: Path) -> dict[str, dict[str, float]]:
    """Read the losses in the log of a run, by step."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {str(r["step"]): {name: r[name] for name in LOSSES if name in r} for r in records if "loss" in r}


def read_recall(run: Path) -> dict[str, Any]:
    """Read the final recall, without values that depend on the machine."""
    recall = json.loads((run / "recall.json").read_text())
    stages = {stage: recall[stage] for stage in ("coarse", "reranked")}
    return {stage: {side: values[side] for side in values if "_to_" in side} for stage, values in stages.items()}


def main() -> None:
    """Create the files of the version named on the command line."""
    folder = HERE / sys.argv[1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = ["--config", HERE / "tiny.yaml", "--data.shards", folder / "shards"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "corpus").mkdir()
        corpus = make_corpus(work / "corpus")
        table = ["--root", corpus / "table.csv", "--out", folder / "shards", "--samples-per-shard", "6"]
        call("toolkit/make_shards.py", "table", *table)
        call("toolkit/train.py", *config, "--run", folder / "run", "--training.stop_after", "3", ranks=2)
        call("toolkit/train.py", *config, "--run", work / "uninterrupted", ranks=2)
        call("toolkit/evaluate.py", "--run", work / "uninterrupted")
        expected = {"losses": read_losses(work / "uninterrupted"), "recall": read_recall(work / "uninterrupted")}
    run = folder / "run"
    for left in (run / "lease.json", run / "environment.json", run / "report.html", *run.glob("examples-*")):
        left.unlink(missing_ok=True)
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace(f"{folder}{os.sep}", ""))
    shutil.copy(HERE / "tiny.yaml", folder)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
