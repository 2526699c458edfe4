"""The job of one rank: it finds its place among the ranks, trains, evaluates, and leaves its status in a file."""

import gc
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shards.errors import UserError

LOST = os.EX_UNAVAILABLE  # 69, exit code of a rank that failed because another one was gone
_ASKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_TRANSPORT = re.compile(r"gloo/|NCCL|Connection (closed|reset) by peer|Broken pipe|Connection refused")


@dataclass(frozen=True)
class Job:
    """What submitit calls in every rank. It is pickled by name: the node needs the repository on its PYTHONPATH.

    A rank that fails ends with its status as exit code, so that srun's --kill-on-bad-exit ends the others too.
    """

    config: str  # YAML file of this submission
    folder: str  # of the logs
    port: int | None = None  # of the rendezvous on this machine; none: derived from the SLURM job
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES as the user set it, which submitit's local executor overwrites
    directory: str | None = None  # where the command was given: relative paths begin there, also in a container
    cores: int | None = None  # of the allocation that a job of this machine was started in; none: all that it may use

    def __call__(self) -> None:
        """Run this rank to its end."""
        place = self.place()
        os.environ.update(place)
        self._restore_gpus()
        status = Status(Path(self.folder), int(place["RANK"]))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the controller was started with it ignored
        for asking in _ASKING:  # in place of submitit's handlers, which act on rank 0 alone
            signal.signal(asking, _leave)
        status.write()
        code = self._run()
        status.write(code)
        if code:
            sys.exit(code)

    def work(self) -> None:
        """What the rank is there for."""
        train_and_evaluate(self.config)

    def place(self) -> dict[str, str]:
        """The environment that torch.distributed and DeepSpeed read."""
        from submitit import JobEnvironment

        environment = JobEnvironment()
        ranks_here = environment.num_tasks // environment.num_nodes
        local = self.port is not None
        restart = restart_count(os.environ)  # it has a port of its own: a former incarnation's rank may still hold one
        return {
            "RANK": str(environment.global_rank),
            "WORLD_SIZE": str(environment.num_tasks),
            "LOCAL_RANK": str(environment.local_rank),
            "LOCAL_WORLD_SIZE": str(ranks_here),
            "MASTER_ADDR": "127.0.0.1" if local else environment.hostnames[0],
            "MASTER_PORT": str(self.port if local else 20000 + (int(environment.raw_job_id) + 977 * restart) % 10000),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(self._threads(ranks_here)),
        }

    def _threads(self, ranks_here: int) -> int:
        """This rank's share of the cores."""
        given = os.environ.get("SLURM_CPUS_PER_TASK")
        if self.port is None and given:
            return int(given)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores, self.cores or cores) // ranks_here)

    def _enter(self) -> None:
        if self.directory is not None:
            try:
                os.chdir(self.directory)
            except OSError as error:
                what = f"{self.directory}, where the command was given, cannot be entered on {platform.node()}"
                raise UserError(f"{what}: {error.strerror}; a container has to have it mounted") from None

    def _restore_gpus(self) -> None:
        if self.port is None:
            return
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus

    def _run(self) -> int:
        """Train and evaluate; an error's text goes to the rank's log.

        Returns:
            0, 2 for a user's mistake, 70 for what may go well if it is tried again, 75 when a signal asked to stop and
            all is saved, 69 when another rank was gone, 130 when interrupted, 1 for any other error.
        """
        try:
            self._enter()
            self.work()
            _leave_group()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.code
        except KeyboardInterrupt:
            return 130
        except BaseException as error:
            code = _exit_code(error)
            if code != os.EX_TEMPFAIL:  # that is how a training leaves that a signal stopped: nothing failed
                traceback.print_exc()
            return code
        return 0


def train_and_evaluate(config_file: str) -> None:
    """Train, and once the last step is done, evaluate, in this process.

    Raises:
        UserError: Whatever training and evaluation refuse.
    """
    from toolkit import evaluate, train
    from toolkit.config.load import load_config

    arguments = ["--config", config_file]
    config = load_config(arguments)
    train.main(arguments)
    if config.final.split and config.training.stop_after is None:
        evaluate.main([*arguments, "--split", config.final.split, "--rerank", str(config.final.rerank)])


@dataclass(frozen=True)
class Status:
    """A rank's file beside its log: there while it runs, and with its exit code afterwards.

    It names the incarnation of the job (SLURM's restart count) that it is of. For a rank that ended before it could
    write one, the batch script writes it, with `began` false.
    """

    folder: Path
    rank: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"rank{self.rank}.json"

    def write(self, code: int | None = None) -> None:
        """Say that this process is the rank, and how it ended; one of a former incarnation writes nothing any more."""
        self._write({"pid": os.getpid(), "host": platform.node(), "exit": code}, restart_count(os.environ))

    def write_unbegun(self, code: int, restart: int) -> None:
        """Say for a rank that it ended before it could say so itself."""
        self._write({"pid": None, "host": "", "exit": code, "began": False}, restart)

    def _write(self, values: dict[str, Any], restart: int) -> None:
        if ((self.read() or {}).get("restart") or 0) > restart:
            return
        status = {**values, "time": time.time(), "restart": restart}
        temporary = self.path.with_suffix(f".{restart}.tmp")
        temporary.write_text(json.dumps(status))
        temporary.replace(self.path)

    def read(self) -> dict[str, Any] | None:
        """What the rank wrote last; None before it began."""
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None


def restart_count(environment: Mapping[str, str]) -> int:
    """How often SLURM has started this job again."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def _leave(number: int, frame: FrameType | None) -> None:
    """A signal asks to stop while nothing is being trained: there is nothing to save."""
    sys.exit(os.EX_TEMPFAIL)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return LOST if _of_transport(error) else 1


def _of_transport(error: BaseException) -> bool:
    """Is it what a collective or the rendezvous raises when another rank is gone? That rank is the one to ask why."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(_TRANSPORT.search(str(error)))


def _leave_group() -> None:
    """Close the process group, after what holds on to it: else a rank now and then aborts while it exits."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
