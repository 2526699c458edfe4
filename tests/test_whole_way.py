"""The whole way through the real commands: corpus, shards, two ranks through submitit, evaluation."""

import json
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
HUMAN = ROOT.parent / "shared" / "data" / "flickr8k"

pytestmark = pytest.mark.timeout(280)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def write_table(folder: Path, pictures: int) -> Path:
    """A corpus of colored pictures, each with two captions, in the `table` layout."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    rows = ["image,audio,text,speaker,split"]
    for n in range(pictures):
        Image.fromarray(chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        split = ("train", "train", "train", "dev", "test")[n % 5]
        for k in range(2):
            soundfile.write(folder / f"{n}-{k}.wav", chance.uniform(-0.3, 0.3, chance.integers(4000, 16000)), 16000)
            rows.append(f"{n}.png,{n}-{k}.wav,words {n} {k},speaker{k},{split}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


def write_config(path: Path, shards: Path, train: str = "train", dev: str = "dev", test: str = "test") -> Path:
    every = {"log_every": 2, "save_every": 2}
    config = {
        "data": {"shards": str(shards), "image_size": 32, "max_seconds": 4.0, "workers": 1, "train": train, "dev": dev},
        "model": asdict(tiny_model()),
        "objectives": {"contrastive": {"queue": 16}, "denoising": {"side": "both"}},
        "training": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "precision": "fp32"} | every,
        "evaluation": {"every": 2, "batch_size": 4},
        "final": {"split": test, "rerank": 3},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def check_run(run_folder: Path, pictures: int, captions: int) -> None:
    report = json.loads((run_folder / "recall.json").read_text())
    assert (report["pictures"], report["captions"]) == (pictures, captions)
    for stage in ("coarse", "reranked"):
        for way in ("speech_to_image", "image_to_speech"):
            assert 0 <= report[stage][way]["R@1"] <= report[stage][way]["R@5"] <= report[stage][way]["R@10"] <= 100
    with Image.open(run_folder / "retrieved.png") as picture:
        assert picture.width > 300
    steps = [r["step"] for r in map(json.loads, (run_folder / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == [2, 4]


def test_from_a_table_to_recall_with_one_command_each(tmp_path: Path) -> None:
    table = write_table(tmp_path / "corpus", pictures=30)
    run("toolkit/make_shards.py", "table", "--root", str(table), "--out", str(tmp_path / "shards"), "--jobs", "1")
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "shards")
    told = run("launch/submit.py", "--config", str(config), "--run", str(tmp_path / "run"), "--cluster", "local")
    assert "step 4/4" in told
    assert "R@1" in told
    check_run(tmp_path / "run", pictures=6, captions=12)
    again = run("toolkit/evaluate.py", "--run", str(tmp_path / "run"), "--split", "dev", "--checkpoint", "last")
    assert "dev" in again


def test_the_deepspeed_launcher_continues_a_run(tmp_path: Path) -> None:
    table = write_table(tmp_path / "corpus", pictures=20)
    run("toolkit/make_shards.py", "table", "--root", str(table), "--out", str(tmp_path / "shards"), "--jobs", "1")
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "shards")
    common = ["--config", str(config), "--run", str(tmp_path / "run")]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    first = run(*launcher, *_port(), "toolkit/train.py", *common, "--training.stop_after", "2")
    assert "step 2/4" in first
    second = run(*launcher, *_port(), "toolkit/train.py", *common)
    assert "continued from the checkpoint at step 2" in second
    assert "step 4/4" in second


def _port() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--master_port", str(free.getsockname()[1])]


@pytest.mark.skipif(not HUMAN.is_dir(), reason="the recordings are not here")
def test_human_recordings_go_the_whole_way(tmp_path: Path) -> None:
    run("toolkit/make_shards.py", "flickr8k", "--root", str(HUMAN), "--out", str(tmp_path / "shards"), "--jobs", "1")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert sum(shard["samples"] for shard in manifest["shards"]) == 10
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "shards", train="train", dev="train", test="train")
    run("launch/submit.py", "--config", str(config), "--run", str(tmp_path / "run"), "--cluster", "local")
    check_run(tmp_path / "run", pictures=10, captions=50)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.shards", "nowhere"], "no shards in nowhere"),
        (["--training.batch_size", "64"], "a batch of 64 needs at least 128 pictures"),
        (["--data.train", "tarin"], "tarin"),
        (["--deepspeed.zero_optimisation.stage", "2"], "deepspeed.zero_optimisation: unknown key"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run_folder(tmp_path: Path, arguments: list[str], said: str) -> None:
    table = write_table(tmp_path / "corpus", pictures=10)
    run("toolkit/make_shards.py", "table", "--root", str(table), "--out", str(tmp_path / "shards"), "--jobs", "1")
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "shards")
    command = [sys.executable, "toolkit/train.py", "--config", str(config), "--run", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()
    assert not (tmp_path / "run").exists()
