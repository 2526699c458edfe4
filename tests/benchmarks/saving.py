"""What a checkpoint costs the steps around it, against torch.save of the same state in the loop.

    python tests/benchmarks/saving.py [--json] [--width W] [--layers L] [--steps K] [--repeats R] [--threads T]

Three stretches of K steps of the trainer take turns: undisturbed; after `Trainer.save`, which copies and has the files
written behind the steps; and after torch.save of weights, optimizer, teacher and queue, flushed to the disk as ours
are. The stretch with our save ends when its checkpoint and its export are complete, so that nothing of their cost is
left out. A stall is what a stretch takes longer than the undisturbed one beside it; the figures are medians of
wall-clock time, which wants a machine that does nothing else. On a GPU the copies do not wait for the step either; here
the thread that writes and the one that trains share the memory. Exit code 1: a bound is missed.
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
from table import Figure, print_figures
from training import frozen_model, make_batch, open_trainer

from toolkit.config import schema as config
from toolkit.training.trainer import Trainer

IMAGE_SIZE, LONGEST = 56, 0.5


class Stretches:
    """Stretches of steps, the seconds of each by what was saved in it."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.count, self.next = trainer, steps, 0
        self.batch = make_batch(0, config.micro_batch(trainer.config, trainer.world_size), IMAGE_SIZE, LONGEST)
        self.blocked: list[float] = []

    def undisturbed(self) -> float:
        """Seconds of steps alone."""
        return self._timed(lambda: None)

    def ours(self) -> float:
        """Seconds of the trainer's save and the steps after it."""
        return self._timed(self._save)

    def plain(self) -> float:
        """Seconds of torch.save and the steps after it."""
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
        self.blocked.append(time.perf_counter() - begin)

    def _torch_save(self) -> None:
        path = self.trainer.run / "plain.pt"
        with path.open("wb") as file:
            torch.save(state_of(self.trainer), file)
            file.flush()
            os.fsync(file.fileno())


def state_of(trainer: Trainer) -> dict[str, Any]:
    """What a plain loop saves."""
    assert trainer.teacher
    return {
        "model": trainer.learner.state_dict(),
        "optimizer": trainer.engine.optimizer.state_dict(),
        "teacher": trainer.teacher.encoder.state_dict(),
        "queue": trainer.queue.state_dict(),
    }


def megabytes(path: Path) -> float:
    """Size of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def configure(options: argparse.Namespace) -> config.Config:
    """A state of hundreds of megabytes, on steps that are short for it."""
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
    """The stretches in turns, after one of each that is not counted."""
    stretches = Stretches(trainer, options.steps)
    kinds = (stretches.undisturbed, stretches.ours, stretches.plain)
    rounds = [[kind() for kind in kinds] for _ in range(1 + options.repeats)][1:]
    alone = statistics.median(each[0] for each in rounds)
    ours = statistics.median(each[1] - each[0] for each in rounds)
    theirs = statistics.median(each[2] - each[0] for each in rounds)
    blocked = statistics.median(stretches.blocked[1:])
    sizes = [megabytes(trainer.run / name) for name in ("checkpoints", "export", "plain.pt")]
    what = (
        f"stall of a save: {sizes[0]:.0f} MB of checkpoint and {sizes[1]:.0f} MB of export against {sizes[2]:.0f} MB "
        f"of torch.save, beside {options.steps} steps of {alone / options.steps:.2f} s"
    )
    return [
        Figure("save_stall", ours, theirs, "s", ours / theirs, what, at_most=0.5),
        Figure("save_blocks", blocked, theirs, "s", blocked / theirs, "until the save returns", at_most=0.5),
    ]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--width", type=int, default=512, help="of the fusion encoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the fusion encoder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of a stretch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open_trainer(configure(options)) as trainer:
        figures = measure(trainer, options)
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
