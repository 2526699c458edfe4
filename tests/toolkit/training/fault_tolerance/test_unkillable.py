"""A run with accidents, ranks killed and a polite stop, has the numbers and the samples of one without."""

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shards.reading.dataset import Batch
from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config

STEPS = 6
WAYS = {0: [0], 1: [1], 2: [0, 1], 3: [1]}  # ZeRO stage: the ranks that are killed


@dataclass(frozen=True)
class Accident:
    """A signal to ranks at the beginning of a step."""

    step: int
    ranks: list[int]
    signal: int


def settings(shards: Path, run: Path, zero: int) -> config.Config:
    return test_trainer.settings(shards, run, steps=STEPS, save_every=2, zero_stage=zero)


def train(rank: int, world_size: int, attempts: list[tuple[config.Config, Accident | None]]) -> None:
    """Train several runs one after the other, each until its accident, and note which samples each step used."""
    for run, accident in attempts:
        trainer = test_trainer.make_trainer(rank, world_size, run)
        following = trainer.next_batch

        def noted(batches: Iterator[Batch], trainer: Any = trainer, following: Any = following) -> Batch:
            batch = following(batches)
            with (trainer.run / f"used{rank}.jsonl").open("a") as file:
                file.write(json.dumps([trainer.progress.step, batch.ids.tolist()]) + "\n")
            return batch

        def step(
            number: int, batches: Any, take: Any = trainer.train_step, accident: Accident | None = accident
        ) -> Any:
            if accident and number == accident.step and rank in accident.ranks:
                os.kill(os.getpid(), accident.signal)
            return take(number, batches)

        trainer.next_batch, trainer.train_step = noted, step
        trainer.train()
        trainer.close()


def used(run: Path) -> dict[int, list[int]]:
    """Samples by step, of all ranks; a step that was taken twice must have taken the same."""
    result: dict[tuple[int, int], list[int]] = {}
    for rank in range(2):
        for line in (run / f"used{rank}.jsonl").read_text().splitlines():
            step, ids = json.loads(line)
            assert result.setdefault((step, rank), ids) == ids
    return {step: result[step, 0] + result[step, 1] for step in range(STEPS)}


@pytest.mark.timeout(600)
def test_killed_and_stopped_at_random_equals_unbroken_at_every_stage(shards: Path, tmp_path: Path) -> None:
    chance = random.Random()
    kills = {zero: Accident(chance.randrange(1, 4), ranks, signal.SIGKILL) for zero, ranks in WAYS.items()}
    stops = {
        zero: Accident(chance.randrange(4, STEPS - 1), [1 - ranks[0]], signal.SIGTERM) for zero, ranks in WAYS.items()
    }
    print(kills, stops)
    broken = {zero: settings(shards, tmp_path / f"broken{zero}", zero) for zero in WAYS}
    unbroken = {zero: settings(shards, tmp_path / f"unbroken{zero}", zero) for zero in WAYS}
    for zero, kill in kills.items():
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(train, 2, [(broken[zero], kill)], timeout=100)
    stopped: list[tuple[config.Config, Accident | None]] = [(broken[zero], stop) for zero, stop in stops.items()]
    rest = [(run, None) for zero in WAYS for run in (broken[zero], unbroken[zero])]
    run_ranks(train, 2, stopped + rest, timeout=300)

    for zero in WAYS:
        one, other = tmp_path / f"broken{zero}", tmp_path / f"unbroken{zero}"
        same = test_trainer.losses_by_step(one, STEPS) == test_trainer.losses_by_step(other, STEPS)
        assert same, f"ZeRO {zero}"
        assert used(one) == used(other), f"ZeRO {zero}"
        assert sorted(n for step in range(5) for n in used(one)[step]) == list(range(40)), "a pass of 40 pictures"
        progress = json.loads((one / f"checkpoints/step-{STEPS:08d}/progress.json").read_text())
        assert progress["restarts"] >= 1
