"""Stall of training steps caused by a checkpoint, against torch.save of the same state in the training loop.

    python tests/benchmarks/saving.py [--json] [--width W] [--layers L] [--steps K] [--repeats R] [--threads T]

Three variants of K steps of the trainer are measured alternately: without a save; after `Trainer.save`, which copies
the state and writes the files asynchronously; and after torch.save of weights, optimizer, teacher and queue, flushed to
disk like ours. The time with our save includes the completion of its checkpoint and export, so that its whole cost is
counted. A stall is the additional time relative to the steps without a save of the same repetition; the figures are
medians of wall-clock time, so the machine must be otherwise idle. On a GPU the copies do not wait for the step either;
here the writing and the training thread share the memory. Exit code 1: a bound is missed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from table import Figure, build_parser, print_figures
from training import frozen_model, make_batch, open_trainer

from toolkit.config import schema as config
from toolkit.training.trainer import Trainer

IMAGE_SIZE, MAX_SECONDS = 56, 0.5


class TimedSteps:
    """Timed runs of a number of steps, with and without a save.

    Attributes:
        blocking: Seconds until each call of `Trainer.save` returned.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.count, self.next = trainer, steps, 0
        self.batch = make_batch(0, config.micro_batch(trainer.config, trainer.world_size), IMAGE_SIZE, MAX_SECONDS)
        self.blocking: list[float] = []

    def without_save(self) -> float:
        """Measure the seconds of steps without a save."""
        return self._timed(lambda: None)

    def ours(self) -> float:
        """Measure the seconds of the trainer's save and the steps after it."""
        return self._timed(self._save)

    def plain(self) -> float:
        """Measure the seconds of torch.save and the steps after it."""
        return self._timed(self._torch_save)

    def _timed(self, save: Callable[[], None]) -> float:
        begin = time.perf_counter()
        save()
        for _ in range(self.count):
            self.trainer.train_step(self.next, iter([self.batch]))
            self.next += 1
        self.trainer.wait()
        return time.perf_counter() - begin

    def _save(self) -> None:
        begin = time.perf_counter()
        self.trainer.progress.step = self.next
        self.trainer.save()
        self.blocking.append(time.perf_counter() - begin)

    def _torch_save(self) -> None:
        path = self.trainer.run / "plain.pt"
        with path.open("wb") as file:
            torch.save(plain_state(self.trainer), file)
            file.flush()
            os.fsync(file.fileno())


def plain_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state that a plain training loop saves."""
    assert trainer.teacher
    return {
        "model": trainer.learner.state_dict(),
        "optimizer": trainer.engine.optimizer.state_dict(),
        "teacher": trainer.teacher.encoder.state_dict(),
        "queue": trainer.queue.state_dict(),
    }


def megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a folder, in MB."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def configure(options: argparse.Namespace) -> config.Config:
    """Return a configuration with a state of hundreds of megabytes and comparatively short steps."""
    model = frozen_model(64, 2)
    model.fusion = config.Fusion(width=options.width, layers=options.layers, heads=8, dropout=0.0)
    configuration = config.Config(model=model)
    configuration.objectives.contrastive.queue = 8192
    configuration.objectives.denoising.layers = 1
    configuration.training = config.Training(
        batch_size=2, warmup_steps=0, precision="fp32", zero_stage=1, keep_checkpoints=1
    )
    configuration.data.image_size = IMAGE_SIZE
    return configuration


def measure(trainer: Trainer, options: argparse.Namespace) -> list[Figure]:
    """Measure the variants alternately, after one warm-up of each."""
    timed_steps = TimedSteps(trainer, options.steps)
    variants = (timed_steps.without_save, timed_steps.ours, timed_steps.plain)
    rounds = [[variant() for variant in variants] for _ in range(1 + options.repeats)][1:]
    baseline = statistics.median(each[0] for each in rounds)
    ours = statistics.median(each[1] - each[0] for each in rounds)
    theirs = statistics.median(each[2] - each[0] for each in rounds)
    blocking = statistics.median(timed_steps.blocking[1:])
    sizes = [megabytes(trainer.run / name) for name in ("checkpoints", "export", "plain.pt")]
    what = (
        f"stall of a save: {sizes[0]:.0f} MB of checkpoint and {sizes[1]:.0f} MB of export against {sizes[2]:.0f} MB "
        f"of torch.save, in {options.steps} steps of {baseline / options.steps:.2f} s"
    )
    returned = "time until the save returns, against the stall of torch.save"
    return [
        Figure("save_stall", ours, theirs, "s", ours / theirs, what, at_most=0.5),
        Figure("save_blocks", blocking, theirs, "s", blocking / theirs, returned, at_most=0.5),
    ]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=15, threads=1)
    parser.add_argument("--width", type=int, default=512, help="width of the fusion encoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the fusion encoder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps per measurement (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open_trainer(configure(options)) as trainer:
        figures = measure(trainer, options)
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
