"""Profile of training steps: `toolkit/train.py --profile [STEPS]`.

Some steps warm up, some are timed (see `spans.py`), and a few more are traced by torch's profiler, which slows them.
They are steps of the trainer on the training data from initial weights, in the folder RUN/profile: the run itself is
neither continued nor changed, and may be running. Steps of SIC alone (`objectives.coarse_steps`) are skipped.

    RUN/profile/profile.json        the printed figures
    RUN/profile/trace-rank0.json    one trace a rank, for chrome://tracing or ui.perfetto.dev

Utilization is model FLOPs (see `flops.py`: trained layers count three times, frozen ones once, padding and
recomputation nothing) divided by the time of the steps and the peak of the device.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from shards.errors import UserError
from shards.files import atomic_write
from shards.manifest import Manifest
from shards.reading.dataset import Batch
from shards.reading.order import Order
from toolkit.config.schema import Config
from toolkit.rank_sync import run_on_rank_zero
from toolkit.training.metrics.flops import BatchStats
from toolkit.training.metrics.peak import peak_of
from toolkit.training.metrics.spans import REST, Recorder
from toolkit.training.trainer import Trainer

FOLDER = "profile"
WARM_UP = 3  # steps
TRACED = 3  # steps

# Spans in the order of a step, with their titles.
_PARTS = {
    "data": "waiting for data",
    "rank synchronization": "waiting for the other ranks' data",
    "frozen trunks": "frozen trunks",
    "encoders": "heads and trained layers",
    "teacher": "teacher's heads and trained layers",
    "gather keys": "gather keys",
    "SIC": "SIC",
    "SIM": "SIM: negatives, fusion",
    "CMD": "CMD",
    "backward": "backward",
    "optimizer": "optimizer",
    "update teacher and queues": "update teacher and queues",
    REST: "rest",
}

# Names of collectives in a trace.
_COLLECTIVE = re.compile(r"(?:gloo:|ncclDevKernel_|ncclKernel_)([A-Za-z]+(?:_[a-z]+)*)")


@dataclasses.dataclass
class Profile:
    """Figures of the timed steps; times are seconds a step, mean over the steps."""

    ranks: int
    device: str
    precision: str  # of the weights
    steps: int  # timed
    step: float  # a complete step, mean over steps and ranks
    fastest: float  # the shortest step
    slowest: float  # the longest step
    parts: dict[str, float]  # by span, mean over the ranks; they add up to `step`
    parts_slowest: dict[str, float]  # by span, on the rank that takes longest for it
    collectives: dict[str, float]  # by kind, in the traced steps, mean over the ranks; they may overlap with other work
    pairs_per_second: float  # pairs of all ranks
    audio_per_second: float  # seconds of speech of all ranks, without padding
    frames_per_second: float  # speech frames of all ranks, without padding
    patches_per_second: float  # image patches of all ranks
    padding: float  # fraction of the encoded speech that is padding
    flops: dict[str, float]  # model FLOPs a step and rank, by part
    tflops: float  # model TFLOP/s a rank
    peak: float  # TFLOP/s of the device, mean over the ranks
    peak_source: str  # a data sheet or a measurement
    utilisation: float  # `tflops` / `peak`; spelled as in the profile.json of earlier runs

    def text(self) -> str:
        """Format the figures for the terminal."""
        lines = [
            f"profile of {self.steps} steps on {self.ranks} x {self.device}, {self.precision}: "
            f"{1e3 * self.step:.1f} ms a step ({1e3 * self.fastest:.1f} to {1e3 * self.slowest:.1f})",
            f"  {'where the time goes':<36}{'ms':>9}{'share':>9}{'slowest rank, ms':>19}",
        ]
        for name, title in _PARTS.items():
            if name in self.parts:
                seconds, slowest = self.parts[name], self.parts_slowest[name]
                share = seconds / self.step
                lines.append(f"  {title:<36}{1e3 * seconds:>9.2f}{share:>9.1%}{1e3 * slowest:>19.2f}")
        total = sum(self.collectives.values())
        kinds = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in self.collectives.items())
        lines += [
            f"  collectives, including waits and overlapped time: {1e3 * total:.2f} ms"
            + (f" ({kinds})" if kinds else ""),
            f"{self.pairs_per_second:,.1f} pairs/s, {self.audio_per_second:,.1f} s of speech a second, "
            f"{self.frames_per_second + self.patches_per_second:,.0f} tokens/s "
            f"({self.frames_per_second:,.0f} speech frames, {self.patches_per_second:,.0f} patches), "
            f"padding {self.padding:.1%} of the speech",
            f"model FLOPs a step and rank: {sum(self.flops.values()) / 1e12:.4g} T ("
            + ", ".join(f"{part} {flops / sum(self.flops.values()):.0%}" for part, flops in self.flops.items())
            + ")",
            f"utilization: {self.tflops:.3g} of {self.peak:.4g} TFLOP/s a rank ({self.peak_source}) = "
            f"{self.utilisation:.1%}; trained layers count 3x, frozen 1x, padding and recomputation nothing",
        ]
        return "\n".join(lines)


@dataclasses.dataclass
class _RankProfile:
    """Measurements of one rank."""

    steps: list[dict[str, float]]  # seconds by span of each timed step
    stats: BatchStats  # counts of the timed steps
    collectives: dict[str, float]  # seconds by kind of collective in the traced steps
    peak: float  # TFLOP/s of the device


def profile_training(
    config: Config,
    rank: int,
    world_size: int,
    device: torch.device,
    steps: int,
    data: tuple[list[Manifest], Order] | None = None,
    deepspeed_settings: dict[str, Any] | None = None,
) -> Profile:
    """Time and trace some steps; every rank calls this, with arguments as the trainer takes them.

    Returns:
        The profile, the same on all ranks.

    Raises:
        UserError: The configuration or the shards are not valid.
    """
    folder = Path(config.run) / FOLDER
    run_on_rank_zero(lambda: _make_empty(folder), rank)
    config = dataclasses.replace(
        config,
        wandb=dataclasses.replace(config.wandb, mode="disabled"),
        training=dataclasses.replace(config.training, resume="auto"),  # the folder is empty: from the beginning
    )
    trainer = Trainer(config, folder, rank, world_size, device, data, deepspeed_settings)
    peak, source = peak_of(device, config.training.precision)
    own = _profile_rank(trainer, steps, folder / f"trace-rank{rank}.json", peak)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, own)
    result = _combine(gathered, trainer, source)
    if rank == 0:
        with atomic_write(folder / "profile.json") as file:
            file.write(json.dumps(dataclasses.asdict(result), indent=1).encode())
        print(result.text(), flush=True)
        print(f"traces: {folder}/trace-rank*.json, for chrome://tracing or ui.perfetto.dev", flush=True)
    trainer.close()
    return result


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _profile_rank(trainer: Trainer, steps: int, trace: Path, peak: float) -> _RankProfile:
    """Take warm-up steps, timed steps and traced steps."""
    first = trainer.config.objectives.coarse_steps  # from there all losses are computed
    timed = first + WARM_UP
    traced = timed + steps
    batches = trainer.batches(range(first, traced + TRACED))
    with trainer.watchdog:
        _take_steps(trainer, batches, range(first, timed))
        trainer.metrics.stats = stats = BatchStats()
        with Recorder(trainer.device) as recorder:
            _take_steps(trainer, batches, range(timed, traced), recorder)
        trainer.metrics.stats = BatchStats()  # the steps that follow are not timed
        with _tracer(trainer.device) as tracer, Recorder(trainer.device):  # for its labels
            _take_steps(trainer, batches, range(traced, traced + TRACED))
    tracer.export_chrome_trace(str(trace))
    return _RankProfile(recorder.seconds(), stats, _collective_seconds(tracer), peak)


def _take_steps(trainer: Trainer, batches: Iterator[Batch], steps: range, recorder: Recorder | None = None) -> None:
    for step in steps:
        trainer.train_step(step, batches)
        trainer.watchdog.beat()
        if recorder:
            recorder.end_step()
        if trainer.stop:
            raise UserError("the profile was stopped by a signal before it was complete")


def _tracer(device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints its stages to standard error
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))


def _collective_seconds(tracer: profile) -> dict[str, float]:
    """Seconds by kind of collective in a trace."""
    intervals: dict[str, list[tuple[float, float]]] = {}
    for event in tracer.events() or ():
        if kind := _COLLECTIVE.match(event.name):
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind[1]).lower()
            intervals.setdefault(name, []).append((event.time_range.start, event.time_range.end))
    return {name: _covered(each) / 1e6 for name, each in sorted(intervals.items())}


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _combine(profiles: list[_RankProfile], trainer: Trainer, peak_source: str) -> Profile:
    """Combine the measurements of all ranks, in their order."""
    ranks, steps = len(profiles), len(profiles[0].steps)
    parts = [{name: sum(step.get(name, 0.0) for step in one.steps) / steps for name in _PARTS} for one in profiles]
    present = [name for name in _PARTS if any(part[name] for part in parts)]
    totals = [sum(step.values()) for one in profiles for step in one.steps]
    seconds = sum(totals) / ranks
    stats = BatchStats()
    for one in profiles:
        stats.add(one.stats)
    kinds = sorted({kind for one in profiles for kind in one.collectives})
    tflops = stats.total_flops / ranks / seconds / 1e12
    peak = sum(one.peak for one in profiles) / ranks
    return Profile(
        ranks=ranks,
        device=torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else _cpu_name(),
        precision=trainer.config.training.precision,
        steps=steps,
        step=seconds / steps,
        fastest=min(totals),
        slowest=max(totals),
        parts={name: sum(part[name] for part in parts) / ranks for name in present},
        parts_slowest={name: max(part[name] for part in parts) for name in present},
        collectives={kind: sum(one.collectives.get(kind, 0.0) for one in profiles) / ranks / TRACED for kind in kinds},
        pairs_per_second=stats.pairs / seconds,
        audio_per_second=stats.seconds / seconds,
        frames_per_second=stats.frames / seconds,
        patches_per_second=stats.patches / seconds,
        padding=max(0.0, 1 - stats.seconds / stats.padded_seconds),
        flops={part: flops / ranks / steps for part, flops in stats.flops.items()},
        tflops=tflops,
        peak=peak,
        peak_source=peak_source,
        utilisation=tflops / peak,
    )


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''} a rank)"
