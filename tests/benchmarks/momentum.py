"""Momentum update of the teacher, against the usual Python loop over parameters, and partitioned over ranks.

    python tests/benchmarks/momentum.py [--json] [--hidden W] [--layers L] [--repeats R] [--threads T]

The student has the size of HuBERT-base by default, all parameters trained, in float32 on the CPU. One rank: the two
updates are measured alternately, and the figure is the ratio of the medians. Two and four ranks: DeepSpeed's ZeRO 1
partitions the weights, and the figures are the elements that a rank averages and the time of the averaging, against one
rank. Ranks run one after another, and the minimum time is used, since they share one machine's memory; the all-gather
of the working copy is excluded. Times are processor times, so that waiting for a core does not count. Exit code 1: a
bound is missed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from table import Figure, build_parser, print_figures

from tests.distributed import run_ranks
from tests.tiny import HUBERT, VIT
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.learner import Learner
from toolkit.training.momentum import MomentumEncoder

DECAY = 0.995
RANKS = (1, 2, 4)


def build_student(hidden: int, layers: int) -> SpeechImageModel:
    """Build a model with a HuBERT of the given width and depth and a small picture trunk, all parameters trained."""
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    base = {"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
    base |= {"num_feat_extract_layers": 7, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
    speech = config.Speech(config=HUBERT | base | size, train="all", head_heads=4)
    image = config.Image(config=dict(VIT), train="all", head_heads=4)
    torch.manual_seed(0)
    return build_model(config.Model(speech=speech, image=image, fusion=config.Fusion(width=32, layers=1, heads=4)))


@torch.no_grad()
def update_in_loop(teacher: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Update the teacher as in ALBEF's code."""
    for average, weight in zip(teacher, weights, strict=True):
        average.data = average.data * DECAY + weight.data * (1.0 - DECAY)


def measure_one_rank(model: SpeechImageModel, repeats: int) -> tuple[float, float]:
    """Return median processor seconds of the update and the loop, measured alternately; checks that they agree."""
    teacher = MomentumEncoder(model, DECAY).to(torch.device("cpu"), torch.float32)
    theirs = [working.detach().clone() for working in teacher.working_copy]
    weights = [p.detach() for p in teacher.student]
    for weight in weights:
        weight.mul_(1.01)
    updates: dict[str, Callable[[], None]] = {"ours": teacher.update, "theirs": lambda: update_in_loop(theirs, weights)}
    times: dict[str, list[float]] = {name: [] for name in updates}
    for repetition in range(repeats + 1):
        for name, update in updates.items():
            begin = time.process_time()
            update()
            if repetition:  # the first is a warm-up
                times[name].append(time.process_time() - begin)
    for ours, other in zip(teacher.working_copy, theirs, strict=True):
        torch.testing.assert_close(ours.detach(), other, rtol=1e-5, atol=1e-6)
    return statistics.median(times["ours"]), statistics.median(times["theirs"])


def rank_work(rank: int, world_size: int, hidden: int, layers: int, repeats: int) -> tuple[int, float]:
    """Return the elements that this rank averages under ZeRO 1, and the minimum processor seconds of averaging."""
    from toolkit.training.zero.engine import make_engine

    model = build_student(hidden, layers)
    teacher = MomentumEncoder(model, DECAY)
    objectives = config.Objectives(denoising=config.Denoising(weight=0.0))
    training = config.Training(batch_size=world_size, precision="fp32", zero_stage=1)
    learner = Learner(model, objectives, rank, world_size)
    engine = make_engine(learner, config.Config(training=training), world_size, torch.device("cpu"))
    teacher.attach(engine, rank, world_size)
    teacher._refresh = lambda: None  # type: ignore[method-assign]  # all-gather: depends on the network
    times = []
    for turn in range(repeats * world_size):
        dist.barrier()
        if turn % world_size == rank:
            begin = time.process_time()
            teacher.update()
            times.append(time.process_time() - begin)
    engine.destroy()
    return sum(average.numel() for average in teacher.average), min(times)


def partitioned_figures(options: argparse.Namespace) -> list[Figure]:
    """Measure the work of the rank with the most work, for several ranks, against that of a single rank."""
    sizes = (options.hidden, options.layers, options.repeats)
    work = {ranks: run_ranks(rank_work, ranks, *sizes, timeout=300) for ranks in RANKS}
    busiest = {ranks: [max(column) for column in zip(*each, strict=True)] for ranks, each in work.items()}
    figures = []
    for ranks in RANKS[1:]:
        (elements, seconds), (all_elements, alone) = busiest[ranks], busiest[1]
        share = f"the rank with the most work of {ranks} under ZeRO 1, against one rank"
        what = f"weights averaged by {share}"
        figures.append(
            Figure(f"momentum_elements_{ranks}", elements, all_elements, "", elements / all_elements, what,
                   at_most=1.01 / ranks)
        )  # fmt: skip
        what = f"minimum processor time of averaging by {share}"
        figures.append(
            Figure(f"momentum_time_{ranks}", seconds, alone, "s", seconds / alone, what, at_most=1.3 / ranks)
        )
    return figures


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=9, threads=1)
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of HuBERT (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="layers of HuBERT (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_student(options.hidden, options.layers)
    trained = sum(p.numel() for p in MomentumEncoder(model, DECAY).student) / 1e6
    ours, theirs = measure_one_rank(model, options.repeats)
    what = f"median processor time of an update of {trained:.1f} M weights, float32"
    figures = [Figure("momentum_update", ours, theirs, "s", theirs / ours, what, at_least=2.0)]
    del model
    figures += partitioned_figures(options)
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
