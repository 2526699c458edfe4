"""Runs that are broken off and resumed, for tests of checkpoints."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.toolkit.training import test_trainer
from toolkit.config import schema as config

STEPS = 4


class Gone(Exception):
    """Ends a training in place of a killed process."""


def settings(shards: Path, run: Path, **training: Any) -> config.Config:
    made = test_trainer.settings(shards, run, **({"save_every": 1, "steps": STEPS} | training))
    made.model.fusion.dropout = 0.1
    return made


def train(rank: int, world_size: int, runs: list[tuple[config.Config, int | None, str]]) -> None:
    """Train several runs one after the other, each to its end or as far as the step at which it is ended."""
    for each, last, how in runs:
        trainer = test_trainer.make_trainer(rank, world_size, each)
        take = trainer.train_step

        def step(number: int, batches: Any, take: Any = take, last: int | None = last, how: str = how) -> Any:
            if number == last and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == last:
                raise Gone
            return take(number, batches)

        trainer.train_step = step
        try:
            trainer.train()
        except Gone:
            trainer.checkpoints._wait_at_exit()
        trainer.close()


def losses(run: Path) -> dict[int, dict[str, float]]:
    return test_trainer.losses_by_step(run, STEPS)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "last" / "model.safetensors")


def assert_equal(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert losses(run)[1]["loss"] != losses(run)[STEPS]["loss"]
    one, two = exported(run), exported(other)
    assert all(torch.equal(one[name], two[name]) for name in two)
