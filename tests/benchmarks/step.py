"""A complete training step against a plain implementation of ALBEF's step: time, with equal losses.

    python tests/benchmarks/step.py [--json] [--batch B] [--queue N] [--width W] [--layers L] [--repeats R] ...

Both train the same modules from the same weights on the same batches, with frozen trunks, SIC with a queue, SIM, CMD,
gradient clipping, AdamW and a momentum encoder, in float32 on the CPU. Ours is the trainer with its DeepSpeed engine.
The plain step runs student and teacher from waveform and pixels on, each on one padded batch, draws its negatives row
by row, computes the logits of the whole queue, and updates the teacher parameter by parameter. First both take the same
two steps with the same negatives, and their losses must agree. Then measurements alternate; the figure is the ratio of
the medians of processor time, which other processes do not affect with one thread, the default. Exit code 1: the bound
is missed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from plain_step import PlainStep
from table import Figure, build_parser, print_figures
from training import frozen_model, make_batch, open_trainer

from toolkit.config import schema as config
from toolkit.training.metrics.flops import count_patches
from toolkit.training.queue import EmbeddingQueue
from toolkit.training.trainer import Trainer

IMAGE_SIZE, MAX_SECONDS = 224, 8.0


def configure(options: argparse.Namespace) -> config.Config:
    """Return a configuration with the reference's objectives at the sizes of the benchmark."""
    configuration = config.Config(model=frozen_model(options.width, options.layers))
    configuration.objectives.contrastive.queue = options.queue
    configuration.objectives.contrastive.alpha_ramp = 0
    configuration.objectives.denoising.layers = 1
    configuration.objectives.momentum.decay = 0.9  # low, so that an error of the teacher shows after two steps
    configuration.training = config.Training(
        batch_size=options.batch, lr=1e-3, warmup_steps=0, precision="fp32", zero_stage=1
    )
    configuration.data.image_size = IMAGE_SIZE
    return configuration


def fill_queue(queue: EmbeddingQueue) -> None:
    """Fill the queue with random keys whose image ids do not occur in the batches."""
    embeddings = [F.normalize(torch.randn(queue.size, queue.speech.shape[1]), dim=1) for _ in range(2)]
    queue.push(*embeddings, torch.arange(queue.size) + 2**31)


def check_losses(trainer: Trainer, plain: PlainStep, batch_size: int) -> float:
    """Run both on the same two steps and return the maximum relative difference of a loss.

    Raises:
        SystemExit: The difference is not below 1e-5.
    """
    max_error = 0.0
    for step in range(2):
        batch = make_batch(step, batch_size, IMAGE_SIZE, MAX_SECONDS)
        expected = plain.step(batch, trainer.seed(step, 0))
        losses = trainer.train_step(step, iter([batch]))
        for name, value in expected.items():
            max_error = max(max_error, abs(float(losses[name] / value) - 1))
            if not max_error < 1e-5:
                raise SystemExit(
                    f"step {step}: loss {name} is {float(losses[name])} in ours, {float(value)} in the plain step"
                )
    return max_error


def median_seconds(trainer: Trainer, plain: PlainStep, batch_size: int, repeats: int) -> tuple[float, float]:
    """Return the median processor seconds of a step of ours and of the plain step, measured alternately."""
    ours, theirs = [], []
    for step in range(2, 2 + repeats):
        batch = make_batch(step, batch_size, IMAGE_SIZE, MAX_SECONDS)
        begin = time.process_time()
        trainer.train_step(step, iter([batch]))
        middle = time.process_time()
        plain.step(batch, trainer.seed(step, 0), row_by_row=True)
        ours.append(middle - begin)
        theirs.append(time.process_time() - middle)
    return statistics.median(ours), statistics.median(theirs)


def flops_ratio(trainer: Trainer, batch_size: int) -> float:
    """Return FLOPs of the plain step relative to ours: frozen trunks run twice, and rows are padded to the longest."""
    batch = make_batch(0, batch_size, IMAGE_SIZE, MAX_SECONDS)
    lengths = batch.lengths.numpy()
    patches = count_patches(trainer.learner.model.image, IMAGE_SIZE)
    ours = trainer.flop_counter.flops(lengths, patches)
    padded = trainer.flop_counter.flops(np.full_like(lengths, lengths.max()), patches)
    return (sum(padded.values()) + padded["frozen trunks"]) / sum(ours.values())


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=5, threads=1)
    parser.add_argument("--batch", type=int, default=32, help="pairs per batch (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=8192, help="keys of previous batches (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width of the trunks (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="layers of each trunk (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configuration = configure(options)
    with open_trainer(configuration) as trainer:
        fill_queue(trainer.queue)
        plain = PlainStep(trainer.learner, trainer.queue, configuration)
        error = check_losses(trainer, plain, options.batch)
        ours, theirs = median_seconds(trainer, plain, options.batch, options.repeats)
        flops = flops_ratio(trainer, options.batch)
    what = (
        f"processor time of a step, batch {options.batch}, queue {options.queue}, frozen trunks of {options.layers} "
        f"layers of {options.width}; losses agree to {error:.0e}; ratio of FLOPs {flops:.2f}"
    )
    figures = [Figure("step_time", ours, theirs, "s", theirs / ours, what, at_least=2.0)]
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
