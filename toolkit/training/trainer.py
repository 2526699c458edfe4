"""The trainer: a visible loop over steps, around a DeepSpeed engine."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from toolkit.training.zero.engine import backward, gathered_parameters, make_engine
from toolkit.training.zero.float32 import ExactTemperature, gather_masters
from torch import Tensor, nn

from shards.errors import UserError
from shards.manifest import load as load_manifest
from shards.media.audio import SAMPLE_RATE
from shards.reading.dataset import Batch, open_stream
from shards.reading.order import rank_slice
from toolkit.config.schema import Config, micro_batch
from toolkit.data import open_order, open_reader
from toolkit.evaluation.encode import Process
from toolkit.evaluation.examples import keep_examples
from toolkit.evaluation.retrieve import retrieve
from toolkit.model.build import build_model
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.rank_sync import run_on_all_ranks_with_max, run_on_rank_zero
from toolkit.training.activation_checkpointing import recompute_activations
from toolkit.training.checkpointing.background import tell
from toolkit.training.checkpointing.checkpoint import Checkpoints
from toolkit.training.checkpointing.export import Exports, exported_config
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.fault_tolerance import lease
from toolkit.training.fault_tolerance.nonfinite import NonFiniteDetector
from toolkit.training.fault_tolerance.signals import StopSignals
from toolkit.training.fault_tolerance.watchdog import Watchdog
from toolkit.training.grad_cache import make_caches
from toolkit.training.learner import Learner, Pairs, StepRandomness
from toolkit.training.metrics.flops import Work, count_frames, count_patches
from toolkit.training.metrics.log import Log
from toolkit.training.metrics.spans import span
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue, TokenQueue


class Trainer:
    """One training run on this rank.

    Attributes:
        stop: The signal by which any rank was asked to stop, the same on all ranks; 0: none.
    """

    def __init__(self, config: Config, run: Path, rank: int, world_size: int, device: torch.device) -> None:
        """Build everything that the run needs and continue from its newest checkpoint.

        Args:
            config: The resolved configuration.
            run: The run folder.
            rank: This process.
            world_size: Number of processes.
            device: Where this process computes.
        """
        self.signals, self.stop = StopSignals(), 0
        self.config, self.run = config, run
        self.rank, self.world_size, self.device = rank, world_size, device
        self.lease = run_on_rank_zero(lambda: lease.take(run), rank)
        self.watchdog = Watchdog(run, rank, config.training.watchdog)
        self.micro_batch = micro_batch(config, world_size)
        self.manifest = load_manifest(config.data.shards)
        self.training_manifests, self.order = open_order(config, world_size)

        torch.manual_seed(config.seed)
        before = exported_config(run)
        model = build_model(config.model, config.objectives.contrastive, config.data.resize, before)
        momentum = config.objectives.momentum
        self.teacher = MomentumEncoder(model, momentum.decay) if momentum.enabled else None
        self.learner = Learner(model, config.objectives, rank, world_size)
        self.work = Work(self.learner, config, world_size)
        if config.training.activation_checkpointing:
            recompute_activations(self.learner)
        self.engine = make_engine(self.learner, config, world_size, device)
        if self.teacher:
            self.teacher.follow(self.engine, rank, world_size)
        self.nonfinite_detector = None
        if config.training.detect_nonfinite:
            watched: dict[str, nn.Module] = {"": self.learner} | (
                {"teacher": self.teacher.encoder} if self.teacher else {}
            )
            self.nonfinite_detector = NonFiniteDetector(watched)
        self.queue = EmbeddingQueue(config.objectives.contrastive.queue, config.model.embed_dim).to(device)
        self.tokens = self._make_token_queue()

        data = [manifest.hash for manifest in self.training_manifests]
        self.checkpoints = Checkpoints(run, config, data, rank, world_size)
        self.exports = Exports(run, config, self.manifest.arguments)
        self.exports.check_lease = self.lease.check
        self.checkpoints.check_lease = self._before_complete
        self.progress = self.checkpoints.resume(self.engine, self.teacher, self.queue, self.tokens)
        self.exact_temperature = ExactTemperature(self.engine, model.temperature, world_size)
        self.exact_temperature.refresh()
        self._see_best()
        self.log = Log(run, config, self.progress, rank, world_size, device)

    def train(self) -> Progress:
        """Run the remaining steps; evaluate, save and log as configured.

        When a signal asks to stop, the step under way is the last: it is saved, and an evaluation that is due is left
        out, since who sends the signal will not wait for it. While steps are being skipped no checkpoint takes the
        place of an older one, which may be the last with good weights.

        Raises:
            UserError: Too many steps in a row had numbers that are not finite.
        """
        training = self.config.training
        last = min(training.steps, self.progress.step + (training.stop_after or training.steps))
        self.log.start(self)
        with self.watchdog:
            self._train_until(last)
            with self.watchdog.paused():
                self._finish_writing()
        self.stop = self.stop if self.progress.step < last else 0
        self.log.close(self.progress, self.stop)
        return self.progress

    def _train_until(self, last: int) -> None:
        training, evaluation = self.config.training, self.config.evaluation
        batches = self.stream(range(self.progress.step, last))
        for step in range(self.progress.step, last):
            losses = self.train_step(step, batches)
            self.progress.step = step + 1
            self.watchdog.beat()
            skipping = self.progress.skipped_in_a_row
            self.log.step(None if skipping else losses, self.lr(step))
            if skipping >= training.max_skipped_in_a_row:
                self._give_up()
            complete = self.progress.step == last
            done = complete or bool(self.stop)
            if self.progress.step % training.log_every == 0 or done:
                self._check_lease()
                self.log.flush(self.progress)
            due = evaluation.every and (step + 1 == training.steps or (step + 1) % evaluation.every == 0)
            if due and (complete or not self.stop):
                self.evaluate()
            best = self.progress.best_step == self.progress.step
            if (self.progress.step % training.save_every == 0 and not skipping) or best or done:
                self.save()
            if done:
                break

    def train_step(self, step: int, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take one optimizer step.

        Args:
            step: Its number; learning rate, alpha and all randomness are functions of it.
            batches: This rank's micro-batches.

        Returns:
            The losses and scalars of the step's last micro-batch, on the device.
        """
        self._set_lr(self.lr(step))
        collected: list[Pairs] = []
        if self.nonfinite_detector:
            self.nonfinite_detector.begin()
        for losses, pairs in self._micro_losses(step, batches):
            with span("backward"):
                backward(self.engine, losses["loss"])
            with span("optimizer"):
                self.engine.step()
            collected.append(pairs)
        if self.engine.was_step_applied():
            self.progress.skipped_in_a_row = 0
            self.exact_temperature.refresh()
            with span("teacher's average, queue"):
                self._follow(step, collected)
        else:
            self._skip()
        return losses

    def lr(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to `min_lr`."""
        t = self.config.training
        if step < t.warmup_steps:
            return t.lr * (step + 1) / t.warmup_steps
        done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
        return t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def alpha(self, step: int) -> float:
        """Weight of the soft targets at a step: a linear ramp from 0 (ALBEF)."""
        c = self.config.objectives.contrastive
        if _is_coarse(self.config, step):
            return 0.0
        return c.alpha * min(1.0, step / c.alpha_ramp) if c.alpha_ramp else c.alpha

    def evaluate(self) -> None:
        """Measure recall on dev, and export the model if it is the best so far."""
        e = self.config.evaluation
        self._check_lease()
        self._see_best()
        with self.watchdog.paused(), self.log.paused("evaluating on " + self.config.data.dev):
            self.learner.eval()
            process = Process(self.rank, self.world_size, self.device)
            dev = self.config.data.dev
            found = retrieve(self.learner.model, self.manifest, dev, self.config, e.rerank, process, fit=True)
            if found.report["reranked"]:
                self.progress.match_weight = found.report["reranked"].get("match_weight", -1.0)
            recall = found.report
            self.learner.train()
            self._check_lease()  # minutes later
            score = (recall.get("reranked") or recall["coarse"])["mean_R@1"]
            best = score > self.progress.best
            if best:
                self.progress.best, self.progress.best_step = score, self.progress.step
                self.export("best")
        examples = None
        if self.rank == 0:
            examples = keep_examples(self.run, self.progress.step, self.manifest, found, self.config)
        self.log.recall(self.progress, recall, best, examples)

    def save(self) -> None:
        """Save a checkpoint and export the model as it is now, behind the training; every rank takes part."""
        self._check_lease()
        with self.watchdog.paused(), self.log.paused("saving"):
            self.checkpoints.save(self.engine, self.teacher, self.queue, self.progress, self.tokens)
            self.export("last")

    def export(self, name: str) -> None:
        """Write the model alone, as `save_pretrained` does, to `RUN/export/NAME`."""
        exact = self.config.training.export_dtype == "fp32"
        masters = gather_masters(self.engine, self.rank, self.world_size) if exact else None
        with gathered_parameters(self.engine, list(self.learner.model.parameters())):
            if self.rank == 0:
                self.exports.write(self.learner.model, name, self.progress, masters)

    def close(self) -> None:
        """Let go of the signals and the engine: else a rank of ZeRO-3 now and then aborts while it exits."""
        self.signals.close()
        if self.teacher:
            self.teacher.wait_pending()
        if self.rank == 0:
            self.lease.release()
        self.engine.destroy()
        del self.engine
        gc.collect()

    def _micro_losses(self, step: int, batches: Iterator[Batch]) -> Iterator[tuple[dict[str, Tensor], Pairs]]:
        """Yield the losses and encoded pairs of a step's micro-batches, each to be followed by its backward pass."""
        count, coarse = self.config.training.accumulation, _is_coarse(self.config, step)
        others = (None if coarse else self.teacher, self.queue, self.alpha(step))
        logged = (step + 1) % self.config.training.log_every == 0
        further = {"tokens": None if coarse else self.tokens, "controls": logged, "coarse": coarse}

        def take() -> Batch:
            batch = self.log.waiting(lambda: self._next(batches)).to(self.device)
            self.log.bad_samples += len(batch.bad_samples)
            self.log.work.add(self.work.of(batch, coarse))
            return batch

        def draws(micro: int) -> StepRandomness:
            return self._draws(step, micro)

        if self.config.training.grad_cache and count > 1:
            local_shards = [take() for _ in range(count)]
            caches = make_caches(self.learner, local_shards, draws, *others)
            for micro, (batch, cache) in enumerate(zip(local_shards, caches, strict=True)):
                yield self.engine(batch, *others, draws(micro), cache, **further)
        else:
            for micro in range(count):
                yield self.engine(take(), *others, draws(micro), **further)

    def _follow(self, step: int, collected: list[Pairs]) -> None:
        """After an applied step: the teacher follows, and the queues take the step's pairs."""
        coarse = _is_coarse(self.config, step)
        if self.teacher:
            self.teacher.update(0.0 if coarse else None)  # equal to the student until the other losses begin
        filled = step >= self.config.objectives.contrastive.queue_from and not coarse
        for pairs in collected if filled else ():
            keys = pairs.keys.speech.detach(), pairs.keys.image.detach(), pairs.keys.ids
            self.queue.push(*keys)
            if self.tokens and pairs.speech and pairs.image:
                own = slice(self.rank * self.micro_batch, (self.rank + 1) * self.micro_batch)
                of = own if self.tokens.world_size < self.world_size else slice(None)
                self.tokens.push(pairs.speech, pairs.image, *(each[of] for each in keys))

    def _make_token_queue(self) -> TokenQueue | None:
        """The queue of SIM's negatives; None where they come from the batch alone."""
        config, model, matching = self.config, self.learner.model, self.config.objectives.matching
        if not (matching.weight and matching.queue):
            return None
        longest = np.array([int(config.data.max_seconds * SAMPLE_RATE)])
        return TokenQueue(
            matching.queue,
            self.micro_batch,
            self.world_size if matching.negatives == "global" else 1,
            config.model.embed_dim,
            (int(count_frames(model.speech, longest)[0]), model.speech.token_dim),
            (count_patches(model.image, config.data.image_size), model.image.token_dim),
            torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
            self.device,
            matching.queue_on == "host",
        )

    def _see_best(self) -> None:
        """The best so far is the one on the disk: an export may have failed, or have been taken away."""
        self.progress.best, self.progress.best_step = run_on_rank_zero(self.exports.best, self.rank)

    def _before_complete(self) -> None:
        """On rank 0, behind the training: a checkpoint that names a best model comes after that."""
        self.exports.wait("best")
        self.lease.check()

    def _check_lease(self) -> None:
        """Before rank 0 writes: if the run folder is another process's by now, all ranks end."""
        run_on_rank_zero(self.lease.check, self.rank)

    def _skip(self) -> None:
        """Count a step that was skipped; teacher and queue stay as they are. Every rank skips the same ones."""
        self._check_lease()
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        found = None
        if self.nonfinite_detector:
            names: list[str | None] = [None] * self.world_size
            dist.all_gather_object(names, self.nonfinite_detector.name())
            bad = [f"rank {rank}: {name}" for rank, name in enumerate(names) if name]
            found = "first in " + ", ".join(bad) if bad else "every module's output is finite: in the backward pass"
        self.log.skipped(self.progress, found)

    def _finish_writing(self) -> None:
        """Wait for what is written behind the training; a run that has lost its folder meanwhile ends here."""
        self.checkpoints.finish()
        self.exports.finish()
        self._check_lease()

    def _give_up(self) -> None:
        self.log.flush(self.progress)
        self._finish_writing()
        raise UserError(
            f"loss or gradient not finite by step {self.progress.step}, {self.progress.skipped_in_a_row} times in a "
            "row: lower --training.lr or look for bad samples (--training.detect_nonfinite true says where it begins); "
            "the last checkpoint is kept"
        )

    def stream(self, steps: range) -> Iterator[Batch]:
        """The micro-batches of this rank for some steps."""
        data = self.config.data
        return open_stream(
            open_reader(data, *self.training_manifests),
            self.order,
            steps,
            image_size=data.image_size,
            resize=data.resize,
            max_seconds=data.max_seconds,
            micros=self.config.training.accumulation,
            rank=self.rank,
            world_size=self.world_size,
            workers=data.workers,
            pin=self.device.type == "cuda",
            timeout=data.timeout,
            max_bad_samples=data.max_bad_samples,
            max_bad_samples_in_a_row=data.max_bad_samples_in_a_row,
            report=lambda line: tell(f"rank {self.rank}: {line}"),
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Take the next micro-batch; where one rank's stream ends or fails, all ranks end together, with its reason."""

        def take() -> Batch:
            try:
                with span("data"):
                    return next(batches)
            except StopIteration:
                raise RuntimeError("the stream ended before the last step") from None

        # Whether to stop is agreed on in the same reduction, so that no step has one more.
        with span("agreement of the ranks"):
            batch, stop = run_on_all_ranks_with_max(lambda: self.signals.number, take, self.rank, self.world_size)
        self.stop = self.stop or stop
        return batch

    def _draws(self, step: int, micro: int) -> StepRandomness:
        """Seed the randomness of a micro-batch by its number: a resumed run draws what an unbroken one would."""
        seed, micros = self.config.seed, self.config.training.accumulation
        number = step * micros + micro
        common = torch.Generator().manual_seed(_seed(seed, number, 0))
        uniforms = torch.rand(2, self.world_size * self.micro_batch, generator=common)
        torch.manual_seed(_seed(seed, number, self.rank + 1))  # dropout
        first = self.rank * self.micro_batch
        places = rank_slice(self.order.batch_size, micro, micros, self.rank, self.world_size, self.order.shard_groups)
        return StepRandomness(
            uniforms[:, first : first + self.micro_batch].to(self.device, non_blocking=True),
            CounterRNG(_seed(seed, step, 0), torch.from_numpy(places).to(self.device, non_blocking=True)),
        )

    def _set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr


def _is_coarse(config: Config, step: int) -> bool:
    """Whether a step is one of the first, which train SIC alone."""
    return step < config.objectives.coarse_steps


def _seed(seed: int, number: int, stream: int) -> int:
    """Mix a run's seed, a micro-batch's number and a stream into one 63-bit seed."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
