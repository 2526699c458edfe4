"""Checkpoints of a run: complete or absent, written behind the training, read by any number of ranks at any ZeRO stage.

    RUN/checkpoints/step-00000600/
        fragments-00003.safetensors   what rank 3 held of float32 weights and Adam's moments (see `fragments.py`);
                                      and of the momentum average; under ZeRO 0 all of it, from rank 0
        tokens-00003.safetensors      token sequences of SIM's queue that rank 3 holds, where there is one
        shared.safetensors            SIC's queue, buffers
        progress.json                 how far the run is, what it trains on, every file with size and checksum
    RUN/checkpoints/.step-...         one that is being written

The random numbers of a run are a function of its seed and the step, and so is its place in the data: neither is saved.
"""

import atexit
import contextlib
import dataclasses
import json
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from toolkit.training.zero.slices import Slice
from toolkit.training.zero.state import applied_steps, editable, fragments
from torch import Tensor

from shards.errors import UserError
from shards.files import atomic_write, sync_folder
from toolkit.config.schema import Config
from toolkit.rank_sync import run_on_all_ranks, run_on_rank_zero
from toolkit.run_folder import fingerprint
from toolkit.training.checkpointing.background import background, outcome_of, reason_of, tell
from toolkit.training.checkpointing.files import (
    CheckpointReader,
    FileInfo,
    PinnedBuffers,
    problem_of,
    tensor_names,
    write_tensors,
)
from toolkit.training.checkpointing.progress import FORMAT, MARKER, SHARED, Progress, Saved, read_marker
from toolkit.training.checkpointing.queues import load_shared, load_token_queue, place_in, shared_state, token_file
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue, TokenQueue

T = TypeVar("T")

_LOOK_EVERY = 0.2  # seconds between rank 0's looks for the other ranks' receipts
_LINGER = 30.0  # seconds that a process which ends without `finish` leaves to a save under way


@dataclass
class _Attempt:
    """A save under way.

    Attributes:
        step: That it is of.
        folder: Where it is written; the name is of this attempt alone.
        marker: What `progress.json` will hold, without the files.
        written: This rank's files, when they are on the disk.
        marked: On rank 0: whether the checkpoint was made complete; False once it is left to `settle`.
        stop: Set when `settle` takes over.
    """

    step: int
    folder: Path
    marker: dict[str, Any]
    written: "Future[list[FileInfo]]"
    marked: "Future[bool] | None" = None
    stop: threading.Event = field(default_factory=threading.Event)


class Checkpoints:
    """The checkpoints of one run folder.

    `save` copies and returns; a thread of every rank writes. Rank 0 makes the checkpoint complete when it sees the
    receipts of all ranks in the folder. What went wrong shows when the ranks meet again, in the next `save` or in
    `finish`: nothing waits for a file that may never come, and nothing incomplete gets its marker.

    Attributes:
        fence: Called on rank 0 before a checkpoint becomes complete, behind the training; it may wait for something,
            and raises if the folder is another run's by now.
    """

    def __init__(self, run: Path, config: Config, data: list[str], rank: int, world_size: int) -> None:
        """Prepare to save and resume.

        Args:
            run: The run folder.
            config: The run's configuration.
            data: Identities of the data sets that are trained on.
            rank: This process.
            world_size: Number of processes.
        """
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.config, self.data = config.training.keep_checkpoints, fingerprint(config), data
        self.source, self.steps = config.training.resume, config.training.steps
        self.rank, self.world_size = rank, world_size
        self._copies = PinnedBuffers()
        self._attempt: _Attempt | None = None
        self._damaged: set[Path] = set()
        self.check_lease: Callable[[], None] = lambda: None

    def save(
        self,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        progress: Progress,
        token_queue: TokenQueue | None = None,
    ) -> None:
        """Copy everything that the run needs to continue, and have it written; every rank calls this.

        Takes as long as the copy to the CPU's memory, on a GPU not even that: the copy is in the device's queue before
        the next step. A former save that is still being written is waited for, since it uses the same memory.
        """
        self.wait_pending()
        try:
            folder = run_on_rank_zero(lambda: self._begin(progress.step), self.rank)
        except OSError as error:
            self._say_failed(progress.step, 0, reason_of(error))
            return
        local_shards: list[Slice] = []
        if self.rank == 0 or engine.zero_optimization_stage():
            local_shards = [*fragments(engine), *(teacher.local_shards() if teacher else ())]
        tensors = {_fragments(self.rank): {k: v for each in local_shards for k, v in tensor_names(each).items()}}
        if token_queue:
            tensors[token_file(self.rank)] = token_queue.state(place_in(token_queue, self.rank, self.world_size))
        if self.rank == 0:
            tensors[SHARED] = shared_state(engine.module, queue)
        copies = {name: self._copies.copy(name, values) for name, values in tensors.items() if values}
        ready = torch.cuda.Event(blocking=True) if torch.cuda.is_available() else None
        if ready:
            ready.record()
        shapes = {each.name: json.dumps(each.shape) for each in local_shards}
        marker = asdict(progress) | {
            "format": FORMAT,
            "applied_steps": applied_steps(engine),
            "world_size": self.world_size,
            "zero": engine.zero_optimization_stage(),
            "config": self.config,
            "data": self.data,
        }
        written = background(lambda: self._write(folder, copies, shapes, ready))
        self._attempt = attempt = _Attempt(progress.step, folder, marker, written)
        if self.rank == 0:
            attempt.marked = background(lambda: self._mark_when_whole(attempt))
        atexit.register(self._linger)

    def wait_pending(self) -> None:
        """Wait until the save under way is complete or has failed; every rank calls this. A failure is one line."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        atexit.unregister(self._linger)
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, outcome_of(attempt.written))
        run_on_rank_zero(lambda: self._complete(attempt, outcomes), self.rank)

    def _complete(self, attempt: _Attempt, outcomes: list[Any]) -> None:
        """On rank 0: make complete what is whole and not complete yet, or say which rank could not write."""
        assert attempt.marked
        attempt.stop.set()
        if attempt.marked.result():
            return
        failures = [(rank, outcome) for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if not failures:
            try:
                self._mark(attempt, outcomes)
            except OSError as error:
                failures = [(0, reason_of(error))]
        if failures:
            _remove(attempt.folder)
            self._say_failed(attempt.step, *failures[0])

    def finish(self) -> None:
        """Wait for all that is still being written; every rank calls this before the run ends or leaves."""
        self.wait_pending()

    def resume(
        self,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        token_queue: TokenQueue | None = None,
    ) -> Progress:
        """Load the newest complete checkpoint into the parts given; without one, start at step 0.

        Every rank calls this and reads what it needs. A damaged checkpoint is passed over with a line. Where another
        run's is on other data, its weights and Adam's moments are where this run begins, at step 0: the pairs in its
        queues are of other pictures.

        Raises:
            UserError: The data set of this run changed, the checkpoint is of another model, all that are there are
                damaged, there are none where `training.resume` says that there should be, or another run's leaves no
                step to train.
        """
        found = run_on_rank_zero(self._candidates, self.rank)
        for folder, saved in found:
            problem = saved if isinstance(saved, str) else self._problem_of(saved)
            if isinstance(saved, Saved) and problem is None:
                own, same_data = folder.parent == self.folder, saved.data == self.data
                step = saved.progress.step if own or same_data else 0
                if not own and step >= self.steps:
                    raise UserError(
                        f"--training.resume {self.source}: {folder} has {step} steps, and --training.steps "
                        f"{self.steps} leaves none to train: raise --training.steps above {step}"
                    )
                queues = (queue, token_queue) if own or same_data else (None, None)
                self._load(saved, engine, teacher, *queues)
                if own:
                    return dataclasses.replace(saved.progress, restarts=saved.progress.restarts + 1)
                anew = "" if same_data else ", whose data are others, at step 0"
                self._say(f"begins from the checkpoint {folder}{anew}")
                return Progress(step=step)
            self._say(f"checkpoint {folder} is passed over: {problem}")
            self._damaged.add(folder)
        if found:
            where = found[0][0].parent
            raise UserError(
                f"no checkpoint in {where} is whole: mend the files, or remove the folder to begin at step 0"
            )
        return Progress()

    def _begin(self, step: int) -> Path:
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
        """Write this rank's files, then its receipt; behind the training."""
        if ready:
            ready.synchronize()
        written = []
        for name, values in tensors.items():
            try:
                written.append(write_tensors(folder / name, values, shapes if name == _fragments(self.rank) else {}))
            except OSError:
                (folder / name).unlink(missing_ok=True)  # room for those who write the log
                raise
        with atomic_write(folder / _receipt(self.rank)) as file:
            file.write(json.dumps([asdict(info) for info in written]).encode())
        return written

    def _mark_when_whole(self, attempt: _Attempt) -> bool:
        """Look for the receipts of all ranks and make the checkpoint complete; behind the training, on rank 0."""
        receipts = [attempt.folder / _receipt(rank) for rank in range(self.world_size)]
        while not all(path.exists() for path in receipts):
            if attempt.stop.wait(_LOOK_EVERY):
                return False
        with contextlib.suppress(OSError):  # `settle` tries again, and says why if it cannot either
            self._mark(attempt, [[FileInfo(**info) for info in json.loads(path.read_bytes())] for path in receipts])
            return True
        return False

    def _mark(self, attempt: _Attempt, receipts: list[list[FileInfo]]) -> None:
        """Make a checkpoint complete: the marker, then the name; then forget old ones."""
        self.check_lease()
        files = [info for receipt in receipts for info in receipt]
        for info in files:
            if (attempt.folder / info.name).stat().st_size != info.bytes:
                raise OSError(f"{info.name} is not whole")
        for path in attempt.folder.glob(_receipt("*")):
            path.unlink()
        with atomic_write(attempt.folder / MARKER) as file:
            file.write(json.dumps(attempt.marker | {"files": [asdict(info) for info in files]}, indent=1).encode())
        target = self.folder / _name(attempt.step)
        if target.exists():
            target.rename(self.folder / f".{target.name}-{uuid.uuid4().hex[:8]}")
        attempt.folder.rename(target)
        sync_folder(self.folder)
        self._damaged.discard(target)
        self._forget(self.folder / _name(attempt.marker["best_step"]))

    def _forget(self, best: Path) -> None:
        """Remove all but the newest `keep` and the best, and what saves that were cut short have left."""
        whole = {path.parent for path in self.folder.glob(f"step-*/{MARKER}")} - self._damaged
        kept = {*sorted(whole)[-self.keep :], best}
        for path in (*self.folder.glob("step-*"), *self.folder.glob(".step-*")):
            if path not in kept:
                _remove(path)

    def _candidates(self) -> list[tuple[Path, "Saved | str"]]:
        """The checkpoints to begin from, newest first, with what their markers say or what is wrong with them."""
        own = sorted(self.folder.glob("step-*"), reverse=True)
        if not own and self.source not in ("auto", "never"):
            own = _checkpoints_at(Path(self.source))
        return [(folder, read_marker(folder)) for folder in own]

    def _problem_of(self, saved: Saved) -> str | None:
        """Check the files of a checkpoint, shared out among the ranks; all learn what any of them finds."""
        own = saved.files[self.rank :: self.world_size]
        problems = [problem for info in own if (problem := problem_of(saved.folder, info))]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, problems)
        return next((problem for problems in found for problem in problems), None)

    def _load(
        self,
        saved: Saved,
        engine: Any,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue | None,
        token_queue: TokenQueue | None,
    ) -> None:
        def prepare() -> CheckpointReader:
            pieces = self._open(saved, engine, teacher)
            load_shared(saved.folder / SHARED, engine.module, queue)
            if token_queue and (reason := load_token_queue(saved, token_queue, self.rank, self.world_size)):
                self._say(f"objectives.matching.queue begins empty: the one of {saved.folder} does not fit: {reason}")
            return pieces

        # What can fail comes first: in what follows the ranks exchange weights and need one another.
        pieces = run_on_all_ranks(prepare, self.rank, self.world_size)
        with editable(engine, saved.applied_steps) as local_shards:
            for fragment in local_shards:
                pieces.read_into(fragment)
        if teacher:
            with teacher.editable() as averages:
                for average in averages:
                    pieces.read_into(average)

    def _open(self, saved: Saved, engine: Any, teacher: MomentumEncoder | None) -> CheckpointReader:
        """Make sure that a checkpoint is of this run and holds all that this rank needs."""
        if saved.data != self.data and saved.folder.parent == self.folder:
            raise UserError(
                f"{saved.folder} was trained on other data than is there now: bring the shards back as they were, "
                f"or begin another run from it with --resume {self.run} --run DIR"
            )
        if saved.config != self.config:
            self._say(f"checkpoint {saved.folder} was written with another configuration than this run's")
        own = _fragments(self.rank)
        names = sorted(
            (info.name for info in saved.files if info.name.startswith("fragments-")), key=lambda name: name != own
        )
        pieces = CheckpointReader(saved.folder / name for name in names)
        for part in (*fragments(engine), *(teacher.local_shards() if teacher else ())):
            pieces.check(part)
        return pieces

    def _say_failed(self, step: int, rank: int, reason: str) -> None:
        newest = max((path.parent.name for path in self.folder.glob(f"step-*/{MARKER}")), default="none")
        self._say(
            f"no checkpoint of step {step}: rank {rank} could not write ({reason}); training goes on, "
            f"the newest checkpoint is {newest}"
        )

    def _say(self, line: str) -> None:
        if self.rank == 0:
            tell(line)

    def _linger(self) -> None:
        """Leave a save under way some time when the process ends without `finish`; the other ranks may be gone."""
        if self._attempt:
            for future in (self._attempt.written, self._attempt.marked):
                if future:
                    with contextlib.suppress(Exception):
                        future.result(_LINGER)


def _checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints, newest first, of a run folder; or the one that the path is."""
    found = [path] if (path / MARKER).is_file() else sorted((path / "checkpoints").glob("step-*"), reverse=True)
    if not found:
        raise UserError(
            f"--training.resume {path}: no checkpoint there; give auto, never, a run folder or a checkpoint's"
        )
    return found


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / MARKER).unlink(missing_ok=True)  # first: what is half removed is not complete
    shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _fragments(rank: int) -> str:
    return f"fragments-{rank:05d}.safetensors"


def _receipt(rank: int | str) -> str:
    return f"rank-{rank:05d}.json" if isinstance(rank, int) else f"rank-{rank}.json"
