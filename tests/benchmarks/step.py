"""A whole training step of the project against one written plainly in ALBEF's way: time, with the same losses.

    python tests/benchmarks/step.py [--json] [--batch B] [--queue N] [--width W] [--layers L] [--repeats R] ...

Both train the same modules from the same weights on the same batches, with frozen trunks, SIC against a queue, SIM,
CMD, clipping, AdamW and a momentum encoder, in float32 on the CPU. Ours is the trainer with its DeepSpeed engine. The
plain one runs student and teacher from the waveform and the pixels up, each on one padded batch, draws its negatives
row by row, makes the logits of the whole queue, and moves the teacher parameter by parameter. First both take the same
two steps with the same negatives, and their losses have to agree. Then they take turns; the figure is the ratio of the
medians of the processor's time, of which work beside this takes nothing with the one thread that is the default. Exit
code 1: the bound is missed.
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
from table import Figure, print_figures
from training import frozen_model, make_batch, open_trainer

from toolkit.config import schema as config
from toolkit.training.metrics.flops import count_patches
from toolkit.training.queue import EmbeddingQueue
from toolkit.training.trainer import Trainer

IMAGE_SIZE, LONGEST = 224, 8.0


def configure(options: argparse.Namespace) -> config.Config:
    """The reference's objectives, at the benchmark's sizes."""
    configuration = config.Config(model=frozen_model(options.width, options.layers))
    configuration.objectives.contrastive.queue = options.queue
    configuration.objectives.contrastive.alpha_ramp = 0
    configuration.objectives.denoising.layers = 1
    configuration.objectives.momentum.decay = 0.9  # so that two steps show a teacher that is wrong
    configuration.training = config.Training(
        batch_size=options.batch, lr=1e-3, warmup_steps=0, precision="fp32", zero_stage=1
    )
    configuration.data.image_size = IMAGE_SIZE
    return configuration


def fill(queue: EmbeddingQueue) -> None:
    """Keys of pictures that the batches do not hold."""
    embeddings = [F.normalize(torch.randn(queue.size, queue.speech.shape[1]), dim=1) for _ in range(2)]
    queue.push(*embeddings, torch.arange(queue.size) + 2**31)


def check(trainer: Trainer, plain: PlainStep, batch_size: int) -> float:
    """Both take the same two steps: the greatest difference of a loss, relative to it; more than 1e-5 ends the run."""
    worst = 0.0
    for step in range(2):
        batch = make_batch(step, batch_size, IMAGE_SIZE, LONGEST)
        expected = plain.step(batch, trainer.seed(step, 0))
        losses = trainer.train_step(step, iter([batch]))
        for name, value in expected.items():
            worst = max(worst, abs(float(losses[name] / value) - 1))
            if not worst < 1e-5:
                raise SystemExit(f"step {step}: {name} is {float(losses[name])} here and {float(value)} there")
    return worst


def seconds(trainer: Trainer, plain: PlainStep, batch_size: int, repeats: int) -> tuple[float, float]:
    """Median seconds of the processor of a step of ours and of the plain one, taken in turns."""
    ours, theirs = [], []
    for step in range(2, 2 + repeats):
        batch = make_batch(step, batch_size, IMAGE_SIZE, LONGEST)
        begin = time.process_time()
        trainer.train_step(step, iter([batch]))
        middle = time.process_time()
        plain.step(batch, trainer.seed(step, 0), row_by_row=True)
        ours.append(middle - begin)
        theirs.append(time.process_time() - middle)
    return statistics.median(ours), statistics.median(theirs)


def flops_ratio(trainer: Trainer, batch_size: int) -> float:
    """FLOPs of the plain step relative to ours: the frozen trunks twice, and all rows as long as the longest."""
    batch = make_batch(0, batch_size, IMAGE_SIZE, LONGEST)
    lengths = batch.lengths.numpy()
    patches = count_patches(trainer.learner.model.image, IMAGE_SIZE)
    ours = trainer.flop_counter.flops(lengths, patches)
    padded = trainer.flop_counter.flops(np.full_like(lengths, lengths.max()), patches)
    return (sum(padded.values()) + padded["frozen trunks"]) / sum(ours.values())


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--queue", type=int, default=8192, help="keys of earlier batches (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the trunks (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of each trunk (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configuration = configure(options)
    with open_trainer(configuration) as trainer:
        fill(trainer.queue)
        plain = PlainStep(trainer.learner, trainer.queue, configuration)
        error = check(trainer, plain, options.batch)
        ours, theirs = seconds(trainer, plain, options.batch, options.repeats)
        arithmetic = flops_ratio(trainer, options.batch)
    what = (
        f"processor time of a step, batch {options.batch}, queue {options.queue}, frozen trunks of {options.layers} "
        f"layers of {options.width}; losses agree to {error:.0e}; by FLOPs {arithmetic:.2f} times"
    )
    figures = [Figure("step_time", ours, theirs, "s", theirs / ours, what, at_least=2.0)]
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
