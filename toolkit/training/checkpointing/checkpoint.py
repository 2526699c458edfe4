"""Atomic, asynchronous checkpoints of a run, loaded at any world size and ZeRO stage.

    RUN/checkpoints/step-00000600/
        fragments-00003.safetensors   rank 3's fragments of float32 weights, Adam's moments and momentum average (see
                                      `zero/state.py`); at ZeRO stage 0 rank 0 saves all of them
        tokens-00003.safetensors      rank 3's token sequences in SIM's queue, if there is one
        shared.safetensors            SIC's queue, buffers
        progress.json                 the marker of a complete checkpoint: progress, data, all files with checksums
    RUN/checkpoints/.step-...         a checkpoint that is being written
        rank-00003.json               rank 3's receipt: its files are on the disk; removed before the marker is written

Random numbers and the position in the data are functions of seed and step, so neither is saved.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError
from shards.files import atomic_write, sync
from toolkit.config.schema import Config
from toolkit.rank_sync import run_on_all_ranks, run_on_rank_zero
from toolkit.run_folder import fingerprint
from toolkit.training.checkpointing.background import reason_of, result_or_reason, run_in_background
from toolkit.training.checkpointing.files import (
    CheckpointReader,
    FileInfo,
    PinnedBuffers,
    named_tensors,
    problem_of,
    write_tensors,
)
from toolkit.training.checkpointing.progress import (
    FORMAT,
    MARKER,
    SHARED,
    Marker,
    Progress,
    find_checkpoints,
    read_marker,
)
from toolkit.training.checkpointing.queues import index_in, load_shared, load_token_queue, shared_state, token_file
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue, TokenQueue
from toolkit.training.zero.fragments import Fragment
from toolkit.training.zero.state import applied_steps, editable, fragments

logger = logging.getLogger(__name__)

_POLL_INTERVAL = 0.2  # seconds between rank 0's checks for the other ranks' receipts
_EXIT_TIMEOUT = 30.0  # seconds that a process which exits without `wait` waits for a pending save


@dataclass
class _PendingSave:
    """A save that is being written."""

    step: int
    folder: Path  # where it is written, under a unique name
    marker: dict[str, Any]  # content of the marker, without the files
    written: "Future[list[FileInfo]]"  # this rank's files, once they are on the disk
    # On rank 0, whether the background thread completed the checkpoint; False: `wait` has to.
    completed: "Future[bool] | None" = None
    # Set when `wait` takes over from the background thread.
    stop: threading.Event = field(default_factory=threading.Event)


class Checkpoints:
    """The checkpoints of one run folder.

    `save` copies the state and returns; a background thread of every rank writes it. When the receipts of all ranks are
    in the folder, a thread of rank 0 writes the marker and renames the folder. The next `save` or `wait` logs failures.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        data_hashes: list[str],
        rank: int,
        world_size: int,
        before_complete: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to save and load.

        Args:
            run: The run folder.
            config: The run's configuration.
            data_hashes: Hashes of the data sets that are trained on.
            rank: This process.
            world_size: Number of processes.
            before_complete: Called on rank 0, in a background thread, before a checkpoint is completed; may wait, and
                raises if the run folder has another owner by now.
        """
        self.run, self.folder = run, run / "checkpoints"
        self.config_fingerprint, self.data_hashes = fingerprint(config), data_hashes
        self.resume, self.steps = config.training.resume, config.training.steps
        self.keep = config.training.keep_checkpoints
        self.rank, self.world_size = rank, world_size
        self._copies = PinnedBuffers()
        self._pending: _PendingSave | None = None
        self._damaged: set[Path] = set()
        self._before_complete = before_complete

    def save(
        self,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        progress: Progress,
        token_queue: TokenQueue | None = None,
    ) -> None:
        """Copy the state of the run and write it in a background thread; every rank calls this.

        Takes as long as the copy to the CPU's memory, and on a GPU less: there the copy is only queued before the next
        step. Waits for the previous save, which uses the same memory.
        """
        self.wait()
        try:
            folder = run_on_rank_zero(lambda: self._make_folder(progress.step), self.rank)
        except OSError as error:
            self._warn_failed(progress.step, 0, reason_of(error))
            return
        local_fragments: list[Fragment] = []
        if self.rank == 0 or engine.zero_optimization_stage():
            local_fragments = [*fragments(engine), *(teacher.local_fragments() if teacher else ())]
        tensors = {_fragments(self.rank): {k: v for each in local_fragments for k, v in named_tensors(each).items()}}
        if token_queue:
            tensors[token_file(self.rank)] = token_queue.state(index_in(token_queue, self.rank, self.world_size))
        if self.rank == 0:
            tensors[SHARED] = shared_state(engine.module, queue)
        copies = {name: self._copies.copy(name, values) for name, values in tensors.items() if values}
        ready = torch.cuda.Event(blocking=True) if torch.cuda.is_available() else None
        if ready:
            ready.record()
        shapes = {each.name: json.dumps(each.shape) for each in local_fragments}
        marker = asdict(progress) | {
            "format": FORMAT,
            "applied_steps": applied_steps(engine),
            "world_size": self.world_size,
            "zero": engine.zero_optimization_stage(),
            "config": self.config_fingerprint,
            "data": self.data_hashes,
        }
        written = run_in_background(lambda: self._write(folder, copies, shapes, ready))
        self._pending = pending = _PendingSave(progress.step, folder, marker, written)
        if self.rank == 0:
            pending.completed = run_in_background(lambda: self._complete_when_written(pending))
        atexit.register(self._wait_at_exit)

    def wait(self) -> None:
        """Wait until the pending save is complete or has failed, which is logged; every rank calls this."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        atexit.unregister(self._wait_at_exit)
        results: list[Any] = [None] * self.world_size
        dist.all_gather_object(results, result_or_reason(pending.written))
        run_on_rank_zero(lambda: self._finish(pending, results), self.rank)

    def _finish(self, pending: _PendingSave, results: list[Any]) -> None:
        """On rank 0: complete the checkpoint if the background thread has not, or log which rank could not write."""
        assert pending.completed
        pending.stop.set()
        if pending.completed.result():
            return
        failures = [(rank, result) for rank, result in enumerate(results) if isinstance(result, str)]
        if not failures:
            try:
                self._complete(pending, results)
            except OSError as error:
                failures = [(0, reason_of(error))]
        if failures:
            _remove(pending.folder)
            self._warn_failed(pending.step, *failures[0])

    def maybe_load_latest(
        self,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        token_queue: TokenQueue | None = None,
    ) -> Progress:
        """Load the newest complete checkpoint, if there is one; without one the run starts at step 0.

        Every rank calls this and reads only what it needs. A damaged checkpoint is skipped with a warning. From another
        run's checkpoint on other data only weights and Adam's moments are loaded, and the run starts at step 0: the
        pairs in its queues are of other pictures.

        Returns:
            Progress of the run.

        Raises:
            UserError: The data set of this run changed, the checkpoint is of another model, all checkpoints are
                damaged, the source that `training.resume` names has none, or another run's leaves no step to train.
        """
        candidates = run_on_rank_zero(self._candidates, self.rank)
        for folder, marker in candidates:
            problem = marker if isinstance(marker, str) else self._problem_of(marker)
            if isinstance(marker, Marker) and problem is None:
                own, same_data = folder.parent == self.folder, marker.data_hashes == self.data_hashes
                step = marker.progress.step if own or same_data else 0
                if not own and step >= self.steps:
                    raise UserError(
                        f"--training.resume {self.resume}: {folder} has {step} steps, and --training.steps "
                        f"{self.steps} leaves none to train: raise --training.steps above {step}"
                    )
                queues = (queue, token_queue) if own or same_data else (None, None)
                self._load(marker, engine, teacher, *queues)
                if own:
                    return dataclasses.replace(marker.progress, restarts=marker.progress.restarts + 1)
                logger.info("starts from the checkpoint %s at step %d", folder, step)
                return Progress(step=step)
            if self.rank == 0:
                logger.warning("checkpoint %s is skipped: %s", folder, problem)
            self._damaged.add(folder)
        if candidates:
            raise UserError(
                f"no checkpoint in {candidates[0][0].parent} is complete: restore the files, or remove the folder to "
                "start at step 0"
            )
        return Progress()

    def _make_folder(self, step: int) -> Path:
        folder = self.folder / f".{_name(step)}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        return folder

    def _write(
        self,
        folder: Path,
        tensors: dict[str, dict[str, Tensor]],
        shapes: dict[str, str],
        ready: torch.cuda.Event | None,
    ) -> list[FileInfo]:
        """Write this rank's files, then its receipt, in a background thread."""
        if ready:
            ready.synchronize()
        written: list[FileInfo] = []
        for name, values in tensors.items():
            try:
                written.append(write_tensors(folder / name, values, shapes if name == _fragments(self.rank) else {}))
            except OSError:
                (folder / name).unlink(missing_ok=True)  # frees the disk for the log
                raise
        with atomic_write(folder / _receipt(self.rank)) as file:
            file.write(json.dumps([asdict(info) for info in written]).encode())
        return written

    def _complete_when_written(self, pending: _PendingSave) -> bool:
        """Wait for the receipts of all ranks and complete the checkpoint, in a background thread of rank 0."""
        receipts = [pending.folder / _receipt(rank) for rank in range(self.world_size)]
        while not all(path.exists() for path in receipts):
            if pending.stop.wait(_POLL_INTERVAL):
                return False
        with contextlib.suppress(OSError):  # `wait` tries again, and logs why if it fails, too
            self._complete(pending, [[FileInfo(**info) for info in json.loads(path.read_bytes())] for path in receipts])
            return True
        return False

    def _complete(self, pending: _PendingSave, receipts: list[list[FileInfo]]) -> None:
        """Complete a checkpoint: write the marker, rename the folder, then remove old checkpoints."""
        self._before_complete()
        files = [info for receipt in receipts for info in receipt]
        for info in files:
            if (pending.folder / info.name).stat().st_size != info.bytes:
                raise OSError(f"{info.name} is incomplete")
        for path in pending.folder.glob(_receipt("*")):
            path.unlink()
        with atomic_write(pending.folder / MARKER) as file:
            file.write(json.dumps(pending.marker | {"files": [asdict(info) for info in files]}, indent=1).encode())
        target = self.folder / _name(pending.step)
        if target.exists():
            target.rename(self.folder / f".{target.name}-{uuid.uuid4().hex[:8]}")
        pending.folder.rename(target)
        sync(self.folder)
        self._damaged.discard(target)
        self._remove_old(self.folder / _name(pending.marker["best_step"]))

    def _remove_old(self, best: Path) -> None:
        """Remove all but the newest `keep` and the best, and remains of interrupted saves."""
        complete = {path.parent for path in self.folder.glob(f"step-*/{MARKER}")} - self._damaged
        kept = {*sorted(complete)[-self.keep :], best}
        for path in (*self.folder.glob("step-*"), *self.folder.glob(".step-*")):
            if path not in kept:
                _remove(path)

    def _candidates(self) -> list[tuple[Path, "Marker | str"]]:
        """List the checkpoints to start from, newest first, with their markers or what is wrong with them."""
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if not own and self.resume not in ("auto", "never"):
            own = find_checkpoints(Path(self.resume))
        return [(folder, read_marker(folder)) for folder in own]

    def _problem_of(self, marker: Marker) -> str | None:
        """Check the files of a checkpoint, distributed over the ranks; all return the same problem."""
        own = marker.files[self.rank :: self.world_size]
        problems = [problem for info in own if (problem := problem_of(marker.folder, info))]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, problems)
        return next((problem for problems in gathered for problem in problems), None)

    def _load(
        self,
        marker: Marker,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue | None,
        token_queue: TokenQueue | None,
    ) -> None:
        def prepare() -> CheckpointReader:
            reader = self._open(marker, engine, teacher)
            load_shared(marker.folder / SHARED, engine.module, queue)
            if token_queue and (reason := load_token_queue(marker, token_queue, self.rank, self.world_size)):
                logger.info(
                    "objectives.matching.queue starts empty, that of %s does not load: %s", marker.folder, reason
                )
            return reader

        # Errors of the files are raised here, on all ranks: what follows has collectives.
        reader = run_on_all_ranks(prepare, self.rank, self.world_size)
        with editable(engine, marker.applied_steps) as local_fragments:
            for fragment in local_fragments:
                reader.read_into(fragment)
        if teacher:
            with teacher.editable() as averages:
                for average in averages:
                    reader.read_into(average)

    def _open(self, marker: Marker, engine: Any, teacher: MomentumEncoder | None) -> CheckpointReader:
        """Check that a checkpoint is of this run and has all parts that this rank needs, and open it."""
        if marker.data_hashes != self.data_hashes and marker.folder.parent == self.folder:
            raise UserError(
                f"{marker.folder} was trained on other data than is there now: restore the shards, "
                f"or start another run from it with --resume {self.run} --run DIR"
            )
        if marker.config_fingerprint != self.config_fingerprint:
            logger.info("checkpoint %s was written with another configuration than this run's", marker.folder)
        own = _fragments(self.rank)
        names = sorted(
            (info.name for info in marker.files if info.name.startswith("fragments-")), key=lambda name: name != own
        )
        reader = CheckpointReader(marker.folder / name for name in names)
        for part in (*fragments(engine), *(teacher.local_fragments() if teacher else ())):
            reader.check(part)
        return reader

    def _warn_failed(self, step: int, rank: int, reason: str) -> None:
        if self.rank:
            return
        newest = max((path.parent.name for path in self.folder.glob(f"step-*/{MARKER}")), default="none")
        logger.warning(
            "no checkpoint of step %d: rank %d could not write (%s); training goes on, the newest checkpoint is %s",
            *(step, rank, reason, newest),
        )

    def _wait_at_exit(self) -> None:
        """Wait for a pending save when the process exits without `wait`; the other ranks may have exited."""
        if self._pending:
            for future in (self._pending.written, self._pending.completed):
                if future:
                    with contextlib.suppress(Exception):
                        future.result(_EXIT_TIMEOUT)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / MARKER).unlink(missing_ok=True)  # first, so that a partly removed folder is not taken for complete
    shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _fragments(rank: int) -> str:
    return f"fragments-{rank:05d}.safetensors"


def _receipt(rank: int | str) -> str:
    return f"rank-{rank:05d}.json" if isinstance(rank, int) else f"rank-{rank}.json"
