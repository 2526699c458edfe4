"""Metrics of a run: one line an interval on the terminal, all records in `log.jsonl`, and wandb."""

import contextlib
import itertools
import json
import logging
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.errors import ExitCode
from shards.files import read_records
from shards.manifest import Manifest
from toolkit.config.schema import Config
from toolkit.config.validate import batch_warnings
from toolkit.data import shared_pictures
from toolkit.reporting.curves import flat
from toolkit.reporting.run_report import NAME, write_report
from toolkit.run_folder import ENVIRONMENT, LOG, git_state
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.metrics.flops import BatchStats
from toolkit.training.metrics.wandb_run import open_wandb
from toolkit.training.schedules import trunk_rate

logger = logging.getLogger(__name__)

# SIM and CMD with the tokens of another pair, measured at the last step of an interval only.
CONTROLS = ("matching_control", "matching_accuracy", "matching_control_accuracy", "denoising_control")


class MetricsLogger:
    """The log of one run; rank 0 writes, and every rank takes part in the averages."""

    def __init__(
        self, run: Path, config: Config, progress: Progress, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.run, self.config, self.rank, self.world_size = run, config, rank, world_size
        self.device = device
        self.first_step = progress.step
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by the names of the scalars, which can change with the step
        self.counts: dict[str, int] = {}
        self.controls: dict[str, Tensor] = {}
        self.steps = self.bad_samples = 0
        self.stats = BatchStats()  # of this rank, in the interval
        self.begin = self.interval_begin = time.perf_counter()
        self.seconds_before = progress.seconds  # of training before this process
        self.waited = self.interval_paused = 0.0
        self.dev: float | None = None  # mean R@1 of the last evaluation
        self.unwritten: set[str] = set()  # files that could not be written
        self.file = (run / LOG).open("a") if rank == 0 else None
        if self.file:
            self._continue_file(run / LOG)
        self.wandb = open_wandb(config.wandb, run, progress) if rank == 0 else None

    def start(self, learner: nn.Module, pictures: int, manifests: Sequence[Manifest]) -> None:
        """Log the size of the run, and save the environment beside the configuration."""
        c = self.config
        trained = sum(_size(p) for p in learner.parameters() if p.requires_grad)
        total = sum(_size(p) for p in learner.parameters())
        if self.rank == 0:
            with self._writing(ENVIRONMENT):
                (self.run / ENVIRONMENT).write_text(json.dumps(_environment(self.world_size), indent=1))
            for line in (*batch_warnings(c, self.world_size), *shared_pictures(manifests, c.data.train)):
                logger.warning(line)
        logger.info(
            f"{pictures:,} pictures, batch {c.training.batch_size} on {self.world_size} ranks "
            f"({self.device.type}, {c.training.precision}, ZeRO {c.training.zero_stage}), {trained / 1e6:.1f} M of "
            f"{total / 1e6:.1f} M parameters trained, steps {self.first_step} to {c.training.steps}"
        )
        if self.first_step:
            logger.info("continued from the checkpoint at step %d", self.first_step)
        self._write({"event": "began", "at": self.first_step, "ranks": self.world_size})
        self.begin = self.interval_begin = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self, event: str) -> Iterator[None]:
        """Leave the time inside out of the training rate, and write it as an event."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.interval_paused += seconds
        self._write({"event": event, "seconds": seconds})

    def step(self, losses: dict[str, Tensor] | None, lr: float) -> None:
        """Add a step's scalars to the interval, None for a skipped step; nothing is read from the device."""
        self.lr = lr
        self.steps += 1
        if losses is not None:
            self.controls = {name: losses[name] for name in losses if name in CONTROLS}
            losses = {name: losses[name] for name in losses if name not in CONTROLS}
            values = torch.stack([value.detach().float() for value in losses.values()])
            names = tuple(losses)
            self.sums[names] = self.sums[names] + values if names in self.sums else values
            self.counts |= {name: self.counts.get(name, 0) + 1 for name in names}

    def skipped(self, progress: Progress, bad_modules: str | None) -> None:
        """Write that the step was skipped; of several in a row only the first is shown on the terminal.

        Args:
            progress: Progress of the run, with this step counted as skipped.
            bad_modules: Modules with the first outputs that are not finite; None: not detected.
        """
        self._write({"event": "skipped", "at": progress.step + 1, "first bad module": bad_modules})
        if self.rank == 0 and progress.skipped_in_a_row == 1:
            where = f" ({bad_modules})" if bad_modules else ""
            logger.warning("step %d skipped: loss or gradient not finite%s", progress.step + 1, where)

    def flush(self, progress: Progress) -> None:
        """Average each scalar over the interval's applied steps that have it and over the ranks, and write it."""
        if self.steps == 0:
            return
        sums = torch.cat([torch.zeros(0, device=self.device), *self.sums.values()])
        stats = self.stats
        own = [self.bad_samples, stats.seconds, stats.tokens, stats.total_flops / 1e12, *self._memory_by_rank()]
        last = [value.detach().float() for value in self.controls.values()]
        totals = torch.cat([sums, *(value.view(1) for value in last), sums.new_tensor(own)])
        dist.all_reduce(totals)
        values = totals.tolist()
        means, controls = values[: len(sums)], values[len(sums) : len(sums) + len(last)]
        bad_samples, seconds, tokens, tera, *memory = values[len(sums) + len(last) :]
        losses = dict.fromkeys(self.counts, 0.0)
        for name, value in zip(itertools.chain(*self.sums), means, strict=True):
            losses[name] += value / (self.counts[name] * self.world_size)
        losses |= {name: value / self.world_size for name, value in zip(self.controls, controls, strict=True)}
        now = time.perf_counter()
        elapsed = max(1e-9, now - self.interval_begin - self.interval_paused)
        progress.seconds = self.seconds_before + now - self.begin
        record = {
            "step": progress.step,
            **losses,
            "lr": self.lr,
            **trunk_rate(self.config.training, self.lr),
            "pairs_per_second": self.steps * self.config.training.batch_size / elapsed,
            "audio_per_second": seconds / elapsed,
            "tokens_per_second": tokens / elapsed,
            "tflops": tera / elapsed / self.world_size,
            "waiting": self.waited / elapsed,
            "skipped": progress.skipped,
            "bad_samples": round(bad_samples),
            "memory_gb": max(memory),
            "seconds": progress.seconds,
        }
        self._write(record)
        logger.info(self._line(record))
        self.steps, self.bad_samples, self.stats = 0, 0, BatchStats()
        self.sums, self.counts, self.controls = {}, {}, {}
        self.waited = self.interval_paused = 0.0
        self.interval_begin = now

    def recall(self, progress: Progress, recall: dict[str, Any], best: bool, examples: str | None = None) -> None:
        """Write an evaluation on dev, and the report with it."""
        self._write({"step": progress.step, "dev": recall} | ({"examples": examples} if examples else {}))
        self.dev = _mean_recall(recall)
        self._report()
        for stage in ("coarse", "reranked"):
            if recall.get(stage):
                s2i, i2s = recall[stage]["speech_to_image"], recall[stage]["image_to_speech"]
                figures = "   ".join(
                    f"{name} " + " ".join(f"{k} {way[k]:.1f}" for k in ("R@1", "R@5", "R@10"))
                    for name, way in (("speech to image", s2i), ("image to speech", i2s))
                )
                suffix = "   best so far" if best else ""
                logger.info("%s %s: %s%s", self.config.data.dev, stage, figures, suffix)

    def close(self, progress: Progress, stop: int = 0) -> None:
        """Write the last records, and close files and wandb.

        Args:
            progress: Progress of the run.
            stop: The signal that stopped the run before its last step; 0: none.
        """
        if stop:
            logger.info(
                f"{signal.Signals(stop).name}: stopped after step {progress.step} of {self.config.training.steps}, "
                f"exit code {ExitCode.REQUEUE}; the same command continues the run"
            )
            self._write({"event": f"stopped by {signal.Signals(stop).name}", "at": progress.step})
        else:
            done = f"step {progress.step} done after {_duration(progress.seconds)}; run folder {self.run}"
            logger.info(done)
        self._report()
        if self.file:
            with self._writing(LOG):
                self.file.close()
        if self.wandb:
            self.wandb.finish(4.0 if stop else 20.0)  # who sent the signal will not wait for an upload
            if not stop and (parts := self.wandb.parts()) > 1:
                logger.info(
                    f"wandb: {parts} parts were written offline, and overwrite one another when they are synced; "
                    f"`python launch/runs.py wandb {self.run}` makes one run of them"
                )

    def _continue_file(self, path: Path) -> None:
        """Continue the file of an earlier process of this run, which may have been killed in the middle of a line."""
        assert self.file
        for record in read_records(path):
            if isinstance(record.get("dev"), dict):
                self.dev = _mean_recall(record["dev"])
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                self.file.write("\n")

    def _memory_by_rank(self) -> list[float]:
        """Peak memory of this rank in GB, of its GPU or else of the host, at its index in a list of zeros."""
        own = [0.0] * self.world_size
        if self.device.type == "cuda":
            own[self.rank] = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            own[self.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        return own

    def _report(self) -> None:
        if self.file:
            with self._writing(NAME):
                write_report(self.run)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Log once for each file that it cannot be written, and continue: a full disk must not end the run."""
        try:
            yield
        except OSError as error:
            if name not in self.unwritten:
                logger.warning("%s was not written: %s; training goes on", self.run / name, error.strerror)
            self.unwritten.add(name)

    def _write(self, record: dict[str, Any]) -> None:
        if self.file:
            with self._writing(LOG):
                self.file.write(json.dumps({"time": time.time(), **record}) + "\n")
                self.file.flush()
        if self.wandb and "step" in record:
            self.wandb.log(flat(record))

    def _line(self, r: dict[str, Any]) -> str:
        parts = [f"step {r['step']:>{len(str(self.config.training.steps))}}/{self.config.training.steps}"]
        if "loss" in r:
            parts.append(f"loss {r['loss']:.3f}  sic {r['contrastive']:.3f}")
        if "matching" in r:
            parts.append(f"sim {r['matching']:.3f}" + _control(r, "matching_control"))
        if "denoising" in r:
            parts.append(f"cmd {r['denoising']:.3f}" + _control(r, "denoising_control"))
        if "temperature" in r:
            parts.append(f"tau {r['temperature']:.3f}")
        trunk = f" (trunk {r['trunk_lr']:.1e})" if "trunk_lr" in r else ""
        parts.append(f"lr {r['lr']:.1e}{trunk}  {r['pairs_per_second']:.0f} pairs/s")
        parts.append(f"wait {100 * r['waiting']:.0f}%  mem {r['memory_gb']:.1f} GB")
        if self.dev is not None:
            parts.append(f"{self.config.data.dev} R@1 {self.dev:.1f}")
        if r["skipped"]:
            parts.append(f"skipped {r['skipped']}")
        if r["bad_samples"]:
            parts.append(f"unreadable {r['bad_samples']}")
        trained = r["seconds"] - self.seconds_before
        left = trained / max(1, r["step"] - self.first_step) * (self.config.training.steps - r["step"])
        return "  ".join([*parts, f"eta {_duration(left)}"])


def _environment(world_size: int) -> dict[str, Any]:
    """Collect what is needed to reproduce the run: versions, machine, git state."""
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "deepspeed", "transformers")
    }
    root = Path(__file__).resolve().parents[3]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "host": platform.node(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "git": _git_state(root),
    }


def _git_state(root: Path) -> dict[str, str | None]:
    """Commit and changes of the code; for a snapshot in a run folder, those of the original."""
    try:
        return dict(json.loads(root.with_name(f"{root.name}.json").read_text())["git"])
    except (OSError, ValueError, KeyError, TypeError):
        return git_state(root)


def _control(record: dict[str, Any], name: str) -> str:
    """Format the loss with the tokens of another pair, if it was measured."""
    return f" (other {record[name]:.3f})" if name in record else ""


def _mean_recall(recall: dict[str, Any]) -> float | None:
    best = recall.get("reranked") or recall.get("coarse") or {}
    return best.get("mean_R@1")


def _size(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
