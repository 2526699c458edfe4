"""What a run tells: one readable line an interval, `log.jsonl` with everything, wandb; all from the same records."""

import contextlib
import json
import math
import netrc
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError
from toolkit.config import Config
from toolkit.training.checkpoint import Progress

T = TypeVar("T")


class Log:
    """The log of one run; rank 0 writes, every rank takes part in the averages."""

    def __init__(
        self, run: Path, config: Config, progress: Progress, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.run, self.config, self.rank, self.world_size = run, config, rank, world_size
        self.device = device
        self.first = progress.step
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.steps = 0
        self.began = self.interval_began = time.perf_counter()
        self.before = progress.seconds
        self.waited = self.paused_for = self.interval_paused = 0.0
        self.file = (run / "log.jsonl").open("a") if rank == 0 else None
        self.wandb = _wandb(config, run) if rank == 0 else None

    def start(self, trainer: Any) -> None:
        """Say what is about to run, and keep the environment beside the configuration."""
        c = self.config
        model = trainer.learner
        trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
        total = sum(_size(p) for p in model.parameters())
        if self.rank == 0:
            (self.run / "environment.json").write_text(json.dumps(_environment(self.world_size), indent=1))
        self.say(
            f"{len(trainer.order.rows):,} pictures, batch {c.training.batch_size} on {self.world_size} ranks "
            f"({self.device.type}, {c.training.precision}, ZeRO {c.training.zero}), {trained / 1e6:.1f} M of "
            f"{total / 1e6:.1f} M parameters trained, steps {self.first} to {c.training.steps}"
        )
        if self.first:
            self.say(f"continued from the checkpoint at step {self.first}")
        self.began = self.interval_began = time.perf_counter()

    def waiting(self, fetch: Callable[[], T]) -> T:
        """Call `fetch` and count its time as waiting for data."""
        begin = time.perf_counter()
        result = fetch()
        self.waited += time.perf_counter() - begin
        return result

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Leave the time inside out of the training rate."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.paused_for += spent
        self.interval_paused += spent
        self._write({"event": what, "seconds": spent})

    def step(self, losses: dict[str, Tensor], lr: float) -> None:
        """Add a step's scalars to the interval; nothing is read back from the device."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.names, self.lr = list(losses), lr
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1

    def flush(self, progress: Progress) -> None:
        """Average the interval over steps and ranks, and write it.

        Raises:
            UserError: A loss is not finite.
        """
        if self.sums is None:
            return
        dist.all_reduce(self.sums)
        means = (self.sums / (self.steps * self.world_size)).tolist()
        losses = dict(zip(self.names, means, strict=True))
        now = time.perf_counter()
        elapsed = max(1e-9, now - self.interval_began - self.interval_paused)
        progress.seconds = self.before + now - self.began
        record = {
            "step": progress.step,
            **losses,
            "lr": self.lr,
            "pairs_per_second": self.steps * self.config.training.batch_size / elapsed,
            "waiting": self.waited / elapsed,
            "skipped": progress.skipped,
            "seconds": progress.seconds,
        }
        self._write(record)
        self.say(self._line(record))
        _check(losses, progress.step)
        self.sums, self.steps, self.waited, self.interval_paused = None, 0, 0.0, 0.0
        self.interval_began = now

    def recall(self, progress: Progress, recall: dict[str, Any], best: bool) -> None:
        """Write an evaluation on dev."""
        self._write({"step": progress.step, "dev": recall})
        for stage in ("coarse", "reranked"):
            if recall.get(stage):
                s2i, i2s = recall[stage]["speech_to_image"], recall[stage]["image_to_speech"]
                figures = "   ".join(
                    f"{name} " + " ".join(f"{k} {way[k]:.1f}" for k in ("R@1", "R@5", "R@10"))
                    for name, way in (("speech to image", s2i), ("image to speech", i2s))
                )
                self.say(f"{self.config.data.dev} {stage}: {figures}" + ("   best so far" if best else ""))

    def close(self, progress: Progress) -> None:
        """Finish the files."""
        self.say(f"step {progress.step} done after {_duration(progress.seconds)}; run folder {self.run}")
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps({"time": time.time(), **record}) + "\n")
            self.file.flush()
        if self.wandb and "step" in record:
            self.wandb.log(_flat(record), step=record["step"])

    def _line(self, r: dict[str, Any]) -> str:
        parts = [f"step {r['step']:>{len(str(self.config.training.steps))}}/{self.config.training.steps}"]
        parts.append(f"loss {r['loss']:.3f}  sic {r['contrastive']:.3f}")
        if "matching" in r:
            parts.append(f"sim {r['matching']:.3f}")
        if "denoising" in r:
            parts.append(f"cmd {r['denoising']:.3f} (alone {r['denoising_withheld']:.3f})")
        parts.append(f"tau {r['temperature']:.3f}  lr {r['lr']:.1e}  {r['pairs_per_second']:.0f} pairs/s")
        parts.append(f"wait {100 * r['waiting']:.0f}%")
        if r["skipped"]:
            parts.append(f"skipped {r['skipped']}")
        trained = r["seconds"] - self.before
        left = trained / max(1, r["step"] - self.first) * (self.config.training.steps - r["step"])
        return "  ".join([*parts, f"eta {_duration(left)}"])


def _check(losses: dict[str, float], step: int) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} not finite by step {step}: lower --training.lr or look for bad samples; "
            "the last checkpoint is kept"
        )


def _wandb(config: Config, run: Path) -> Any:
    """Open the run's wandb record: one id for all its restarts, offline where no key is found."""
    if config.wandb.mode == "disabled":
        return None
    import wandb

    mode: Any = config.wandb.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    identity = run / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        project=config.wandb.project,
        name=run.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(run),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )


def _has_wandb_key() -> bool:
    """Whether `wandb login` was done here, or the key is in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _environment(world_size: int) -> dict[str, Any]:
    """Collect what a reader needs to repeat the run: versions, machine, git state."""
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "deepspeed", "transformers")
    }
    root = Path(__file__).resolve().parents[2]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "host": platform.node(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "git": {"commit": _git(root, "rev-parse", "HEAD"), "changed": _git(root, "status", "--porcelain")},
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def _size(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
