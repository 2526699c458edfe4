"""Memory and time of the blockwise SIC loss with a large queue, against an implementation with full logits.

    python tests/benchmarks/contrastive.py [--json] [--queue N] [--batch B] [--dim D] [--repeats R] [--threads T]

Both compute the loss and the gradients of embeddings and temperature, with soft targets and repeated pictures, in
float32 on the CPU, and must agree. Time: the two are measured alternately, and the figure is the ratio of the medians.
Memory: each runs in its own process, and the figure is the peak growth of its resident memory above that of the inputs.
One thread by default: with several, threads wait for one another when other processes use the machine, which distorts
the figure. Exit code 1: a bound is missed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from memory import memory_growth, memory_growth_in_subprocess
from table import Figure, build_parser, print_figures
from torch import Tensor

from toolkit.objectives.contrastive import contrastive_loss

ALPHA, TEMPERATURE, PICTURES = 0.4, 0.07, 6000


class Inputs:
    """Random batch, its keys and a full queue; the first keys belong to the batch and are close to its embeddings."""

    def __init__(self, queue: int, batch: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = batch

        def embeddings(rows: int) -> Tensor:
            return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)

        self.keys = [[embeddings(batch), embeddings(queue)] for _ in range(2)]
        own = [F.normalize(batch_keys + 0.5 * embeddings(batch), dim=1) for batch_keys, _ in self.keys]
        self.speech, self.image = (side.requires_grad_() for side in own)
        self.key_ids = torch.randint(0, PICTURES, (batch + queue,), generator=generator)
        self.ids = self.key_ids[:batch]
        self.temperature = torch.tensor(TEMPERATURE, requires_grad=True)

    def ours(self) -> Tensor:
        """Compute the loss with the toolkit."""
        own = [batch_keys for batch_keys, _ in self.keys]
        return contrastive_loss(
            self.speech, self.image, *self.keys, self.ids, self.key_ids, self.temperature, ALPHA, *own
        )

    def plain(self) -> Tensor:
        """Compute the retrieval loss as in ALBEF's code (arXiv 2107.07651), with the logits of the whole batch."""
        speech_keys, image_keys = (torch.cat(parts) for parts in self.keys)
        with torch.no_grad():
            positive = (self.ids[:, None] == self.key_ids).float()
            hard = positive / positive.sum(1, keepdim=True)
            to_image = self.keys[0][0] @ image_keys.T / self.temperature
            to_speech = self.keys[1][0] @ speech_keys.T / self.temperature
            image_targets = ALPHA * F.softmax(to_image, dim=1) + (1 - ALPHA) * hard
            speech_targets = ALPHA * F.softmax(to_speech, dim=1) + (1 - ALPHA) * hard
        to_image = self.speech @ image_keys.T / self.temperature
        to_speech = self.image @ speech_keys.T / self.temperature
        image_loss = -(F.log_softmax(to_image, dim=1) * image_targets).sum(1).mean()
        speech_loss = -(F.log_softmax(to_speech, dim=1) * speech_targets).sum(1).mean()
        return (image_loss + speech_loss) / 2

    def step(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Return the loss and its gradients with respect to both embeddings and the temperature."""
        value = loss()
        return [value, *torch.autograd.grad(value, (self.speech, self.image, self.temperature))]


def median_seconds(inputs: Inputs, repeats: int) -> tuple[float, float]:
    """Return the median seconds of ours and plain, measured alternately after a warm-up that checks that they agree."""
    for ours, plain in zip(inputs.step(inputs.ours), inputs.step(inputs.plain), strict=True):
        error = float((ours - plain).detach().norm() / plain.detach().norm())
        if not error < 1e-5:
            raise SystemExit(f"the losses or their gradients have a relative difference of {error:.2e}")
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        for name, taken in times.items():
            begin = time.perf_counter()
            inputs.step(getattr(inputs, name))
            taken.append(time.perf_counter() - begin)
    return statistics.median(times["ours"]), statistics.median(times["plain"])


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=5, threads=1)
    parser.add_argument("--queue", type=int, default=65536, help="keys of previous batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pairs per batch (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="embedding dimension (default: %(default)s)")
    parser.add_argument(
        "--memory-of", choices=["ours", "plain"], help="print the memory growth of one variant in bytes and exit"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = Inputs(options.queue, options.batch, options.dim)
    if options.memory_of:
        warm = Inputs(64, 8, 16)  # warm-up: libraries allocate their threads and buffers
        warm.step(getattr(warm, options.memory_of))
        print(memory_growth(lambda: inputs.step(getattr(inputs, options.memory_of))))
        return 0
    what = f"loss and gradients, batch {options.batch}, queue {options.queue}, embedding dimension {options.dim}"
    ours, plain = (memory_growth_in_subprocess(name) / 2**20 for name in ("ours", "plain"))
    figures = [
        Figure("sic_memory", ours, plain, "MiB", ours / plain, f"peak memory above the inputs: {what}", at_most=0.3)
    ]
    ours, plain = median_seconds(inputs, options.repeats)
    figures.append(Figure("sic_time", ours, plain, "s", ours / plain, f"median time: {what}", at_most=1.0))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
