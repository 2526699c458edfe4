"""Where a step's time goes: `toolkit/train.py --profile [STEPS]`.

Some steps warm up, some are timed with nothing in their way (see `spans.py`), and a few more are traced by torch's
profiler, which slows them. The steps are those of the real trainer on the real data, in the folder RUN/profile with
weights as they begin: the run itself is neither continued nor touched, and may be under way. Steps of SIC alone
(`objectives.coarse_steps`) are passed over.

    RUN/profile/profile.json        the figures that are printed
    RUN/profile/trace-rank0.json    of each rank, for chrome://tracing or ui.perfetto.dev

Utilisation is model FLOPs (see `work.py`: trained parts three times, frozen ones once, neither padding nor
recomputation) over the time of the steps and the peak of the device.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from shards.errors import UserError
from shards.files import atomic_write
from shards.length_groups import padded_length
from shards.media.audio import SAMPLE_RATE
from shards.reading.dataset import Batch
from toolkit.config.schema import Config
from toolkit.rank_sync import run_on_rank_zero
from toolkit.training.metrics.flops import Amount
from toolkit.training.metrics.peak import peak_of
from toolkit.training.metrics.spans import REST, Recorder
from toolkit.training.trainer import Trainer

FOLDER = "profile"
STEPS = 10  # timed, if no number is given
WARM_UP = 3
TRACED = 3

# Spans in the order of a step, with what is printed for them.
_PARTS = {
    "data": "waiting for data",
    "agreement of the ranks": "waiting for the other ranks' data",
    "frozen trunks": "frozen trunks",
    "encoders": "heads and trained layers",
    "teacher": "the same of the teacher",
    "gather of keys": "gather of keys",
    "SIC": "SIC",
    "SIM": "SIM: negatives, fusion",
    "CMD": "CMD",
    "backward": "backward",
    "optimizer": "optimizer",
    "teacher's average, queue": "teacher's average, queue",
    REST: "rest",
}

# Collectives as a trace calls them.
_COLLECTIVE = re.compile(r"(?:gloo:|ncclDevKernel_|ncclKernel_)([A-Za-z]+(?:_[a-z]+)*)")


@dataclasses.dataclass
class Profile:
    """What was found; times in seconds a step, mean over the timed steps.

    Attributes:
        ranks: World size.
        device: Its name.
        precision: Of the weights.
        steps: That were timed.
        step: A whole step, mean over steps and ranks.
        fastest: The shortest step.
        slowest: The longest.
        parts: By span, mean over the ranks; they add up to `step`.
        parts_slowest: The same of the rank that takes longest for it.
        collectives: By kind, while something else may run beside; of the traced steps, mean over the ranks.
        pairs_per_second: Of all ranks, as the next two.
        audio_per_second: Seconds of speech, padding not counted.
        frames_per_second: Speech frames, padding not counted.
        patches_per_second: Of pictures.
        padding: Share of the encoded speech that is padding.
        flops: Model FLOPs a step and rank, by part.
        tflops: Model TFLOP/s a rank.
        peak: TFLOP/s of the device, mean over the ranks.
        peak_source: Where that is from.
        utilisation: `tflops` / `peak`.
    """

    ranks: int
    device: str
    precision: str
    steps: int
    step: float
    fastest: float
    slowest: float
    parts: dict[str, float]
    parts_slowest: dict[str, float]
    collectives: dict[str, float]
    pairs_per_second: float
    audio_per_second: float
    frames_per_second: float
    patches_per_second: float
    padding: float
    flops: dict[str, float]
    tflops: float
    peak: float
    peak_source: str
    utilisation: float

    def text(self) -> str:
        """The figures for people."""
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
            f"  collectives in all that, waits and overlapped time included: {1e3 * total:.2f} ms"
            + (f" ({kinds})" if kinds else ""),
            f"{self.pairs_per_second:,.1f} pairs/s, {self.audio_per_second:,.1f} s of speech a second, "
            f"{self.frames_per_second + self.patches_per_second:,.0f} tokens/s "
            f"({self.frames_per_second:,.0f} speech frames, {self.patches_per_second:,.0f} patches), "
            f"padding {self.padding:.1%} of the speech",
            f"model FLOPs a step and rank: {sum(self.flops.values()) / 1e12:.4g} T ("
            + ", ".join(f"{part} {flops / sum(self.flops.values()):.0%}" for part, flops in self.flops.items())
            + ")",
            f"utilisation: {self.tflops:.3g} of {self.peak:.4g} TFLOP/s a rank ({self.peak_source}) = "
            f"{self.utilisation:.1%}; trained parts count 3x, frozen 1x, padding and recomputation nothing",
        ]
        return "\n".join(lines)


@dataclasses.dataclass
class _Timed:
    """Of one rank: the timed steps by span, the work in them, padded speech in them, collectives of the traced ones."""

    steps: list[dict[str, float]]
    work: Amount
    padded: float
    collectives: dict[str, float]


def profile_training(config: Config, rank: int, world_size: int, device: torch.device, steps: int = STEPS) -> Profile:
    """Time and trace some steps; every rank calls this.

    Args:
        config: Of the run.
        rank: This process.
        world_size: Number of processes.
        device: Where this process computes.
        steps: How many are timed.

    Returns:
        The same on all ranks.

    Raises:
        UserError: The configuration or the shards do not fit.
    """
    folder = Path(config.run) / FOLDER
    run_on_rank_zero(lambda: _make(folder), rank)
    config = dataclasses.replace(
        config,
        wandb=dataclasses.replace(config.wandb, mode="disabled"),
        training=dataclasses.replace(config.training, resume="auto"),  # the folder is empty: from the beginning
    )
    trainer = Trainer(config, folder, rank, world_size, device)
    peak, source = peak_of(device, config.training.precision)
    own = _run(trainer, steps, folder / f"trace-rank{rank}.json")
    timed: list[Any] = [None] * world_size
    dist.all_gather_object(timed, (own, peak))
    found = _put_together([one for one, _ in timed], trainer, sum(each for _, each in timed) / world_size, source)
    if rank == 0:
        with atomic_write(folder / "profile.json") as file:
            file.write(json.dumps(dataclasses.asdict(found), indent=1).encode())
        print(found.text(), flush=True)
        print(f"traces: {folder}/trace-rank*.json, for chrome://tracing or ui.perfetto.dev", flush=True)
    trainer.close()
    return found


def _make(folder: Path) -> None:
    """An empty folder; what a former profile left is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _run(trainer: Trainer, steps: int, trace: Path) -> "_Timed":
    """Warm up, time, trace."""
    lengths: list[tuple[int, ...]] = []
    first = trainer.config.objectives.coarse_steps  # from there all losses are computed
    warm, timed_steps, traced = _ranges(first, WARM_UP, steps, TRACED)
    batches = _noted(trainer.stream(range(warm.start, traced.stop)), lengths)

    def take(numbers: range, recorder: Recorder | None = None) -> None:
        for step in numbers:
            trainer.train_step(step, batches)
            trainer.watchdog.beat()
            if recorder:
                recorder.end_step()
            if trainer.stop:
                raise UserError("the profile was stopped by a signal before it was complete")

    with trainer.watchdog:
        take(warm)
        trainer.log.work = Amount()
        lengths.clear()
        with Recorder(trainer.device) as recorder:
            take(timed_steps, recorder)
        work, timed = trainer.log.work, lengths.copy()
        trainer.log.work = Amount()  # what follows is traced, not timed
        collectives = _traced(trainer.device, trace, lambda: take(traced))
    groups = trainer.config.model.speech.groups
    padded = sum(padded_length(each, groups) for each in timed) / SAMPLE_RATE
    return _Timed(recorder.seconds(), work, padded, collectives)


def _ranges(first: int, *lengths: int) -> list[range]:
    """Ranges of such lengths, one behind the other."""
    ends = list(itertools.accumulate(lengths, initial=first))
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def _noted(batches: Iterator[Batch], lengths: list[tuple[int, ...]]) -> Iterator[Batch]:
    """The same batches; the lengths of their utterances are written down."""
    for batch in batches:
        lengths.append(batch.host_lengths or (batch.waveforms.shape[1],) * len(batch.ids))
        yield batch


def _traced(device: torch.device, path: Path, steps: Callable[[], None]) -> dict[str, float]:
    """Take steps under torch's profiler; seconds of all of them by kind of collective."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its stages on stderr
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as tracer, Recorder(device):  # for its labels
        steps()
    tracer.export_chrome_trace(str(path))
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in tracer.events() or ():
        if kind := _COLLECTIVE.match(event.name):
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind[1]).lower()
            spans.setdefault(name, []).append((event.time_range.start, event.time_range.end))
    return {name: _covered(each) / 1e6 for name, each in sorted(spans.items())}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _put_together(timed: "list[_Timed]", trainer: Trainer, peak: float, source: str) -> Profile:
    """The figures of all ranks, in their order, as one."""
    ranks, steps = len(timed), len(timed[0].steps)
    parts = [{name: sum(step.get(name, 0.0) for step in one.steps) / steps for name in _PARTS} for one in timed]
    found = [name for name in _PARTS if any(part[name] for part in parts)]
    whole = [sum(step.values()) for one in timed for step in one.steps]
    seconds = sum(whole) / ranks
    work = Amount()
    for one in timed:
        work.add(one.work)
    kinds = sorted({kind for one in timed for kind in one.collectives})
    tflops = work.total() / ranks / seconds / 1e12
    return Profile(
        ranks=ranks,
        device=torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else _processor(),
        precision=trainer.config.training.precision,
        steps=steps,
        step=seconds / steps,
        fastest=min(whole),
        slowest=max(whole),
        parts={name: sum(part[name] for part in parts) / ranks for name in found},
        parts_slowest={name: max(part[name] for part in parts) for name in found},
        collectives={kind: sum(one.collectives.get(kind, 0.0) for one in timed) / ranks / TRACED for kind in kinds},
        pairs_per_second=work.pairs / seconds,
        audio_per_second=work.seconds / seconds,
        frames_per_second=work.frames / seconds,
        patches_per_second=work.patches / seconds,
        padding=max(0.0, 1 - work.seconds / sum(one.padded for one in timed)),
        flops={part: flops / ranks / steps for part, flops in work.flops.items()},
        tflops=tflops,
        peak=peak,
        peak_source=source,
        utilisation=tflops / peak,
    )


def _processor() -> str:
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''} a rank)"
