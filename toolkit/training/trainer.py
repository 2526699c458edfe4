"""The trainer: a visible loop over steps, around a DeepSpeed engine."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shards.manifest import load as load_manifest
from shards.order import order_of
from shards.stream import Batch, open_stream
from toolkit.config import Config, micro_batch
from toolkit.evaluation.run import evaluate
from toolkit.model.build import build_model
from toolkit.training.checkpoint import Checkpoints, Progress
from toolkit.training.engine import make_engine, whole
from toolkit.training.learner import Draws, Keys, Learner
from toolkit.training.log import Log
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


class Trainer:
    """One training run on this rank."""

    def __init__(self, config: Config, run: Path, rank: int, world_size: int, device: torch.device) -> None:
        """Build everything that the run needs and continue from its newest checkpoint.

        Args:
            config: The resolved configuration.
            run: The run folder.
            rank: This process.
            world_size: Number of processes.
            device: Where this process computes.
        """
        self.config, self.run = config, run
        self.rank, self.world_size, self.device = rank, world_size, device
        self.micro_batch = micro_batch(config, world_size)
        self.manifest = load_manifest(Path(config.data.shards))
        self.order = order_of(
            self.manifest, config.data.train, config.training.batch_size, config.seed, config.data.window
        )

        torch.manual_seed(config.seed)
        model = build_model(config.model, config.objectives.contrastive)
        momentum = config.objectives.momentum
        self.teacher = MomentumEncoder(model, momentum.decay) if momentum.enabled else None
        self.learner = Learner(model, config.objectives, rank, world_size)
        self.engine = make_engine(self.learner, config, world_size, device)
        if self.teacher:
            self.teacher.to(device, next(model.parameters()).dtype)
        self.queue = EmbeddingQueue(config.objectives.contrastive.queue, config.model.embed_dim).to(device)

        self.checkpoints = Checkpoints(run, config.training.keep, rank, world_size)
        self.progress = self.checkpoints.resume(self.engine, self.teacher, self.queue)
        self.log = Log(run, config, self.progress, rank, world_size, device)

    def train(self) -> Progress:
        """Run the remaining steps; evaluate, save and log as configured."""
        training, evaluation = self.config.training, self.config.evaluation
        last = min(training.steps, self.progress.step + (training.stop_after or training.steps))
        self.log.start(self)
        batches = self._stream(range(self.progress.step, last))
        for step in range(self.progress.step, last):
            losses = self.train_step(step, batches)
            self.progress.step = step + 1
            self.log.step(losses, self.lr(step))
            done = self.progress.step == last
            if self.progress.step % training.log_every == 0 or done:
                self.log.flush(self.progress)
            if evaluation.every and (
                self.progress.step % evaluation.every == 0 or self.progress.step == training.steps
            ):
                self.evaluate()
            if self.progress.step % training.save_every == 0 or done:
                self.save()
        self.log.close(self.progress)
        return self.progress

    def train_step(self, step: int, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take one optimizer step.

        Args:
            step: Its number; learning rate, alpha and all randomness are functions of it.
            batches: This rank's micro-batches.

        Returns:
            The losses and scalars of the step's last micro-batch, on the device.
        """
        self._set_lr(self.lr(step))
        collected: list[Keys] = []
        for micro in range(self.config.training.accumulation):
            batch = self.log.waiting(lambda: next(batches)).to(self.device)
            draws = self._draws(step * self.config.training.accumulation + micro)
            losses, keys = self.engine(batch, self.teacher, self.queue, self.alpha(step), draws)
            self.engine.backward(losses["loss"])
            self.engine.step()
            collected.append(keys)
        if self.engine.was_step_applied():
            self._follow(step, collected)
        else:
            self.progress.skipped += 1
        return losses

    def lr(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to `min_lr`."""
        t = self.config.training
        if step < t.warmup:
            return t.lr * (step + 1) / t.warmup
        done = (step - t.warmup) / max(1, t.steps - t.warmup)
        return t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def alpha(self, step: int) -> float:
        """Weight of the soft targets at a step: a linear ramp from 0 (ALBEF)."""
        c = self.config.objectives.contrastive
        return c.alpha * min(1.0, step / c.alpha_ramp) if c.alpha_ramp else c.alpha

    def evaluate(self) -> None:
        """Measure recall on dev, and export the model if it is the best so far."""
        e = self.config.evaluation
        with self.log.paused("evaluating on " + self.config.data.dev):
            self.learner.eval()
            recall = evaluate(
                self.learner.model, self.manifest, self.config.data.dev, self.config, e.rerank,
                self.rank, self.world_size, self.device,
            )  # fmt: skip
            self.learner.train()
            score = (recall.get("reranked") or recall["coarse"])["mean_R@1"]
            best = score > self.progress.best
            if best:
                self.progress.best, self.progress.best_step = score, self.progress.step
                self.export("best")
        self.log.recall(self.progress, recall, best)

    def save(self) -> None:
        """Save a checkpoint and export the model as it is now; every rank takes part."""
        with self.log.paused("saving"):
            self.checkpoints.save(self.engine, self.teacher, self.queue, self.progress)
            self.export("last")

    def export(self, name: str) -> None:
        """Write the model alone, as `save_pretrained` does, to `RUN/export/NAME`."""
        with whole(self.engine, list(self.learner.model.parameters())):
            if self.rank == 0:
                self.checkpoints.export(self.learner.model, name, self.config, self.progress)

    def close(self) -> None:
        """Let go of the engine: without it a rank of ZeRO-3 now and then aborts while it exits."""
        self.engine.destroy()
        del self.engine
        gc.collect()

    def _follow(self, step: int, collected: list[Keys]) -> None:
        """After an applied step: the teacher follows, and the queue takes the step's keys."""
        if self.teacher:
            with whole(self.engine, self.teacher.student):
                self.teacher.update()
        for keys in collected if step >= self.config.objectives.contrastive.queue_from else ():
            self.queue.push(keys.speech.detach(), keys.image.detach(), keys.ids)

    def _stream(self, steps: range) -> Iterator[Batch]:
        data = self.config.data
        return open_stream(
            self.manifest,
            self.order,
            steps,
            image_size=data.image_size,
            max_seconds=data.max_seconds,
            micros=self.config.training.accumulation,
            rank=self.rank,
            world_size=self.world_size,
            workers=data.workers,
            pin=self.device.type == "cuda",
        )

    def _draws(self, number: int) -> Draws:
        """Seed the randomness of a micro-batch by its number: a resumed run draws what an unbroken one would."""
        common = torch.Generator().manual_seed(_seed(self.config.seed, number, 0))
        uniforms = torch.rand(2, self.world_size * self.micro_batch, generator=common)
        own = _seed(self.config.seed, number, self.rank + 1)
        torch.manual_seed(own)  # dropout
        first = self.rank * self.micro_batch
        return Draws(
            uniforms[:, first : first + self.micro_batch].to(self.device, non_blocking=True),
            torch.Generator(self.device).manual_seed(own),
        )

    def _set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr


def _seed(seed: int, number: int, stream: int) -> int:
    """Mix a run's seed, a micro-batch's number and a stream into one 63-bit seed."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
