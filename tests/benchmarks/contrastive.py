"""SIC against a large queue, a block of rows at a time, against full logits written plainly: memory and time.

    python tests/benchmarks/contrastive.py [--json] [--queue N] [--batch B] [--dim D] [--repeats R] [--threads T]

Both give loss and gradients of embeddings and temperature with soft targets and repeated pictures, in float32 on CPU,
and have to agree. Time: they take turns, and the figure is the ratio of the medians. Memory: each has a process of its
own, and the figure is how far its resident memory rises above that of the inputs. One thread by default: on a machine
that does other work several wait for one another, and the figure would tell of that work. Exit code 1: a bound is
missed.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from table import Figure, print_figures
from torch import Tensor

from toolkit.objectives.contrastive import contrastive_loss

ALPHA, TEMPERATURE, PICTURES = 0.4, 0.07, 6000


class Inputs:
    """A batch, its keys and a full queue; the first keys are the batch's own, near its embeddings."""

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
        """The toolkit's loss."""
        own = [batch_keys for batch_keys, _ in self.keys]
        return contrastive_loss(
            self.speech, self.image, *self.keys, self.ids, self.key_ids, self.temperature, ALPHA, *own
        )

    def plain(self) -> Tensor:
        """ALBEF's retrieval loss as its code writes it, with the logits of the whole batch."""
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
        """The loss and its gradients."""
        value = loss()
        return [value, *torch.autograd.grad(value, (self.speech, self.image, self.temperature))]


def seconds(inputs: Inputs, repeats: int) -> tuple[float, float]:
    """Median seconds of ours and of plain, taken in turns after one round that also checks that they agree."""
    for ours, plain in zip(inputs.step(inputs.ours), inputs.step(inputs.plain), strict=True):
        error = float((ours - plain).detach().norm() / plain.detach().norm())
        if not error < 1e-5:
            raise SystemExit(f"the losses or their gradients differ by {error:.2e} of their size")
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        for name, taken in times.items():
            begin = time.perf_counter()
            inputs.step(getattr(inputs, name))
            taken.append(time.perf_counter() - begin)
    return statistics.median(times["ours"]), statistics.median(times["plain"])


def rise(inputs: Inputs, name: str) -> float:
    """Bytes by which this process grows at most while it takes one step."""
    warm = Inputs(64, 8, 16)  # so that libraries have their threads and buffers
    warm.step(getattr(warm, name))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    inputs.step(getattr(inputs, name))
    return _status("VmHWM") - before


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024.0 * int(found[1])


def rise_alone(name: str, options: argparse.Namespace) -> float:
    """`rise` in a process of its own."""
    sizes = ["--queue", str(options.queue), "--batch", str(options.batch), "--dim", str(options.dim)]
    command = [sys.executable, __file__, *sizes, "--threads", str(options.threads), "--memory-of", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--queue", type=int, default=65536, help="keys of earlier batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=256, help="length of the embeddings (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--memory-of", choices=["ours", "plain"], help="print the bytes of one and leave")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = Inputs(options.queue, options.batch, options.dim)
    if options.memory_of:
        print(rise(inputs, options.memory_of))
        return 0
    what = f"loss and gradients, batch {options.batch}, queue {options.queue}, embeddings of {options.dim}"
    ours, plain = (rise_alone(name, options) / 2**20 for name in ("ours", "plain"))
    figures = [Figure("sic_memory", ours, plain, "MiB", ours / plain, f"peak above the inputs: {what}", at_most=0.3)]
    ours, plain = seconds(inputs, options.repeats)
    figures.append(Figure("sic_time", ours, plain, "s", ours / plain, f"median time: {what}", at_most=1.0))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
