"""The trainer: a loop over optimizer steps around a DeepSpeed engine."""

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from shards.manifest import Manifest
from shards.manifest import load as load_manifest
from shards.reading.dataset import Batch
from shards.reading.order import Order
from toolkit.config.schema import Config
from toolkit.data import open_order
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.examples import save_examples
from toolkit.evaluation.retrieve import retrieve
from toolkit.model.build import build_model
from toolkit.rank_sync import raise_on_all_ranks, run_on_rank_zero
from toolkit.training.activation_checkpointing import recompute_activations
from toolkit.training.checkpointing.checkpoint import Checkpoints
from toolkit.training.checkpointing.export import Exports, exported_config
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.fault_tolerance import lease
from toolkit.training.fault_tolerance.nonfinite import NonFiniteDetector
from toolkit.training.fault_tolerance.signals import StopSignals
from toolkit.training.fault_tolerance.watchdog import Watchdog
from toolkit.training.from_config import make_token_queue, open_batches
from toolkit.training.grad_cache import cache_gradients
from toolkit.training.learner import Learner, QueueEntries
from toolkit.training.metrics.flops import FlopCounter
from toolkit.training.metrics.log import MetricsLogger
from toolkit.training.metrics.spans import span
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue
from toolkit.training.schedules import is_coarse, learning_rate, set_learning_rates, soft_target_weight
from toolkit.training.step_randomness import StepRandomness, seed_micro_batch
from toolkit.training.zero.engine import backward, gathered_parameters, make_engine
from toolkit.training.zero.float32 import ExactTemperature, gather_masters


class Trainer:
    """One training run on this rank.

    Attributes:
        progress: Steps done, best recall, skipped steps.
        stop: The signal by which any rank was requested to stop, the same on all ranks; 0: none.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        rank: int,
        world_size: int,
        device: torch.device,
        data: tuple[list[Manifest], Order] | None = None,
        deepspeed_settings: dict[str, Any] | None = None,
    ) -> None:
        """Build everything that the run needs, and load its newest checkpoint.

        Args:
            config: The resolved configuration.
            run: The run folder.
            rank: This process.
            world_size: Number of processes.
            device: Where this process computes.
            data: Result of `open_order` for this configuration and world size; default: computed here.
            deepspeed_settings: Result of `deepspeed_config`; default: computed here.
        """
        self.signals, self.stop = StopSignals(), 0
        self.config, self.run = config, run
        self.rank, self.world_size, self.device = rank, world_size, device
        self.lease = run_on_rank_zero(lambda: lease.take(run), rank)
        self.watchdog = Watchdog(run, rank, config.training.watchdog)
        self.training_manifests, self.order = data or open_order(config, world_size)
        # Recall on dev is measured on this data set, which need not be part of the mixture.
        self.manifest = load_manifest(config.data.shards) if config.data.mixture else self.training_manifests[0]

        torch.manual_seed(config.seed)
        model = build_model(config.model, config.objectives.contrastive, config.data.resize, exported_config(run))
        momentum = config.objectives.momentum
        self.teacher = MomentumEncoder(model, momentum.decay) if momentum.enabled else None
        self.learner = Learner(model, config.objectives, rank, world_size)
        self.flop_counter = FlopCounter(self.learner, config, world_size)
        if config.training.activation_checkpointing:
            recompute_activations(self.learner)
        self.engine = make_engine(self.learner, config, world_size, device, deepspeed_settings)
        if self.teacher:
            self.teacher.attach(self.engine, rank, world_size)
        self.nonfinite_detector = None
        if config.training.detect_nonfinite:
            teacher = {"teacher": self.teacher.encoder} if self.teacher else {}
            self.nonfinite_detector = NonFiniteDetector({"": self.learner, **teacher})
        self.queue = EmbeddingQueue(config.objectives.contrastive.queue, config.model.embed_dim).to(device)
        self.token_queue = make_token_queue(config, model, world_size, device)

        self.exports = Exports(run, config, self.manifest.arguments, self.lease.check)
        hashes = [manifest.hash for manifest in self.training_manifests]
        self.checkpoints = Checkpoints(run, config, hashes, rank, world_size, self._before_complete)
        self.progress = self.checkpoints.maybe_load_latest(self.engine, self.teacher, self.queue, self.token_queue)
        self.exact_temperature = ExactTemperature(self.engine, model.temperature, world_size)
        self.exact_temperature.refresh()
        self._refresh_best()
        self.metrics = MetricsLogger(run, config, self.progress, rank, world_size, device)

    def train(self) -> Progress:
        """Take the remaining steps; evaluate, save and log as configured.

        A signal that requests a stop lets the step under way complete; it is saved, and an evaluation that is due is
        left out unless training is complete, since the sender will not wait for it. While steps are being skipped,
        periodic checkpoints are left out: an older one may be the last with finite weights.

        Raises:
            UserError: Too many steps in a row had a loss or gradient that is not finite.
        """
        training, progress = self.config.training, self.progress
        last = min(training.steps, progress.step + (training.stop_after or training.steps))
        self.metrics.start(self.learner, self.order.pictures, self.training_manifests)
        gc.collect()
        gc.freeze()  # collections during steps skip what exists now: all ranks would wait for the one that collects
        with self.watchdog:
            batches = self.batches(range(progress.step, last))
            for step in range(progress.step, last):
                losses = self.train_step(step, batches)
                progress.step = step + 1
                self.watchdog.beat()

                applied = progress.skipped_in_a_row == 0
                self.metrics.step(losses if applied else None, learning_rate(training, step))
                if progress.skipped_in_a_row >= training.max_skipped_in_a_row:
                    self._give_up()
                complete = progress.step == last
                done = complete or bool(self.stop)
                if progress.step % training.log_every == 0 or done:
                    self._check_lease()
                    self.metrics.flush(progress)

                if self._evaluation_is_due() and (complete or not self.stop):
                    self.evaluate()
                is_best = progress.best_step == progress.step
                if (progress.step % training.save_every == 0 and applied) or is_best or done:
                    self.save()
                if done:
                    break
            with self.watchdog.paused():
                self.wait()
        self.stop = self.stop if progress.step < last else 0
        self.metrics.close(progress, self.stop)
        return progress

    def train_step(self, step: int, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take one optimizer step.

        Args:
            step: Its number; learning rate, alpha and all randomness are functions of it.
            batches: This rank's micro-batches.

        Returns:
            The losses and scalars of the step's last micro-batch, on the device.
        """
        training = self.config.training
        accumulation, coarse = training.accumulation, is_coarse(self.config.objectives, step)
        teacher, token_queue = (None, None) if coarse else (self.teacher, self.token_queue)
        alpha = soft_target_weight(self.config.objectives, step)
        measure_controls = (step + 1) % training.log_every == 0
        set_learning_rates(self.engine.optimizer.param_groups, training, step)
        if self.nonfinite_detector:
            self.nonfinite_detector.reset()

        fetched: list[Batch] = []
        if training.grad_cache and accumulation > 1:  # SIC over all micro-batches at once
            fetched = [self.fetch(batches, coarse) for _ in range(accumulation)]
            seed = partial(self.seed, step)
            caches = cache_gradients(self.learner, fetched, seed, teacher, self.queue, alpha)

        entries: list[QueueEntries] = []
        for micro in range(accumulation):
            batch = fetched[micro] if fetched else self.fetch(batches, coarse)
            cached = caches[micro] if fetched else None
            randomness = self.seed(step, micro)
            losses, added = self.engine(  # Learner.forward
                batch=batch,
                teacher=teacher,
                queue=self.queue,
                alpha=alpha,
                randomness=randomness,
                cached=cached,
                token_queue=token_queue,
                measure_controls=measure_controls,
                coarse=coarse,
            )
            with span("backward"):
                backward(self.engine, losses["loss"])
            with span("optimizer"):
                self.engine.step()  # DeepSpeed updates the weights after the last micro-batch only
            entries.append(added)

        if self.engine.was_step_applied():
            self.progress.skipped_in_a_row = 0
            self.exact_temperature.refresh()  # the optimizer's float32 value has changed
            with span("update teacher and queues"):
                self.update_teacher_and_queues(step, entries)
        else:
            self._count_skipped()
        return losses

    def batches(self, steps: range) -> Iterator[Batch]:
        """Read this rank's micro-batches of some steps."""
        ranks = self.rank, self.world_size
        return open_batches(self.config, self.training_manifests, self.order, steps, *ranks, self.device)

    def fetch(self, batches: Iterator[Batch], coarse: bool) -> Batch:
        """Take the next micro-batch to the device, and count it for the log."""
        with self.metrics.waiting():
            batch = self.next_batch(batches)
        batch = batch.to(self.device)
        self.metrics.bad_samples += len(batch.bad_samples)
        self.metrics.stats.add(self.flop_counter.count(batch, coarse))
        return batch

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take the next micro-batch; if reading fails on one rank, all ranks raise.

        The ranks' stop signals are reduced in the same collective, so that all of them stop after the same step.
        """
        failure: Exception | None = None
        with span("rank synchronization"):
            try:
                with span("data"):
                    batch = next(batches)
            except StopIteration:
                failure = RuntimeError("the reader ended before the last step")
            except Exception as error:
                failure = error
            stop = raise_on_all_ranks(failure, self.rank, self.world_size, reduce_max=self.signals.number)
        self.stop = self.stop or stop
        return batch

    def seed(self, step: int, micro: int) -> StepRandomness:
        """Seed a micro-batch: dropout through torch's generators, the rest through what is returned."""
        accumulation = self.config.training.accumulation
        ranks = self.rank, self.world_size
        return seed_micro_batch(self.config.seed, step, micro, accumulation, self.order, *ranks, self.device)

    def update_teacher_and_queues(self, step: int, entries: list[QueueEntries]) -> None:
        """After an applied step: update the teacher's average, and push the step's entries to the queues."""
        coarse = is_coarse(self.config.objectives, step)
        if self.teacher:
            self.teacher.update(0.0 if coarse else None)  # equal to the student until the other losses begin
        if coarse or step < self.config.objectives.contrastive.queue_from:
            return
        for each in entries:
            keys = each.keys.detach()
            self.queue.push(keys.speech, keys.image, keys.ids)
            if self.token_queue and each.speech and each.image:
                if self.token_queue.is_local:
                    rows = self.token_queue.rows
                    keys = keys[self.rank * rows : (self.rank + 1) * rows]
                self.token_queue.push(each.speech, each.image, keys.speech, keys.image, keys.ids)

    def evaluate(self) -> None:
        """Measure recall on dev, and export the model if it is the best so far."""
        data, progress = self.config.data, self.progress
        self._check_lease()
        self._refresh_best()
        with self.watchdog.paused(), self.metrics.paused("evaluating on " + data.dev):
            self.learner.eval()
            process = ProcessInfo(self.rank, self.world_size, self.device)
            rerank = self.config.evaluation.rerank
            retrieval = retrieve(self.learner.model, self.manifest, data.dev, self.config, rerank, process, fit=True)
            self.learner.train()
            recall = retrieval.report
            if recall["reranked"]:
                progress.match_weight = recall["reranked"].get("match_weight", -1.0)
            self._check_lease()  # again: an evaluation is long enough for another process to take the run folder
            score = (recall.get("reranked") or recall["coarse"])["mean_R@1"]
            is_best = score > progress.best
            if is_best:
                progress.best, progress.best_step = score, progress.step
                self.export("best")
        examples = None
        if self.rank == 0:
            examples = save_examples(self.run, progress.step, self.manifest, retrieval, self.config)
        self.metrics.recall(progress, recall, is_best, examples)

    def save(self) -> None:
        """Save a checkpoint and export the model, both asynchronously; every rank calls this."""
        self._check_lease()
        with self.watchdog.paused(), self.metrics.paused("saving"):
            self.checkpoints.save(self.engine, self.teacher, self.queue, self.progress, self.token_queue)
            self.export("last")

    def export(self, name: str) -> None:
        """Write the model alone, as `save_pretrained` does, to `RUN/export/NAME`; every rank calls this."""
        exact = self.config.training.export_dtype == "fp32"
        masters = gather_masters(self.engine, self.rank, self.world_size) if exact else None
        with gathered_parameters(self.engine, list(self.learner.model.parameters())):
            if self.rank == 0:
                self.exports.save(self.learner.model, name, self.progress, masters)

    def wait(self) -> None:
        """Wait for asynchronous writes; raise if the run folder has another owner by now."""
        self.checkpoints.wait()
        self.exports.wait()
        self._check_lease()

    def close(self) -> None:
        """Release signal handlers, lease and engine; without this a rank under ZeRO-3 may abort at exit."""
        self.signals.close()
        if self.teacher:
            self.teacher.wait_pending()
        if self.rank == 0:
            self.lease.release()
        self.engine.destroy()
        del self.engine
        gc.unfreeze()
        gc.collect()

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.evaluation.every, self.progress.step
        return bool(every) and (step % every == 0 or step == self.config.training.steps)

    def _refresh_best(self) -> None:
        """Read the best recall from the export on the disk: it may have failed to be written, or been removed."""
        self.progress.best, self.progress.best_step = run_on_rank_zero(self.exports.best, self.rank)

    def _before_complete(self) -> None:
        """On rank 0, in a background thread: a checkpoint that names a best export is completed after that export."""
        self.exports.wait_for("best")
        self.lease.check()

    def _check_lease(self) -> None:
        """Before rank 0 writes: raise on all ranks if the run folder has another owner by now."""
        run_on_rank_zero(self.lease.check, self.rank)

    def _count_skipped(self) -> None:
        """Count a skipped step, which is one on every rank; teacher and queues stay as they are."""
        self._check_lease()
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        detector = self.nonfinite_detector
        self.metrics.skipped(self.progress, detector.describe(self.world_size) if detector else None)

    def _give_up(self) -> None:
        self.metrics.flush(self.progress)
        self.wait()
        raise UserError(
            f"loss or gradient not finite by step {self.progress.step}, {self.progress.skipped_in_a_row} times in a "
            "row: lower --training.lr or look for bad samples (--training.detect_nonfinite true names the first "
            "module); the last checkpoint is kept"
        )
