"""The job of one rank: it finds its place among the ranks, trains, evaluates, and leaves its status in a file."""

import gc
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError


@dataclass(frozen=True)
class Job:
    """What submitit calls in every rank. It is pickled by name: the node needs the repository on its PYTHONPATH.

    A rank that fails ends with its status as exit code, so that srun's --kill-on-bad-exit ends the others too.
    """

    config: str  # YAML file of this submission
    folder: str  # of the logs
    port: int | None = None  # of the rendezvous on this machine; none: derived from the SLURM job
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES as the user set it, which submitit's local executor overwrites

    def __call__(self) -> None:
        """Run this rank to its end."""
        place = self.place()
        os.environ.update(place)
        self._restore_gpus()
        status = Status(Path(self.folder), int(place["RANK"]))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the controller was started with it ignored
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
        return {
            "RANK": str(environment.global_rank),
            "WORLD_SIZE": str(environment.num_tasks),
            "LOCAL_RANK": str(environment.local_rank),
            "LOCAL_WORLD_SIZE": str(ranks_here),
            "MASTER_ADDR": "127.0.0.1" if local else environment.hostnames[0],
            "MASTER_PORT": str(self.port if local else 20000 + int(environment.raw_job_id) % 10000),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(_threads(ranks_here)),
        }

    def _restore_gpus(self) -> None:
        if self.port is None:
            return
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus

    def _run(self) -> int:
        """Train and evaluate; an error's text goes to the rank's log.

        Returns:
            0, 2 for a user's mistake, 75 when a signal asked to stop and all is saved, 130 when interrupted, 1 for any
            other error.
        """
        try:
            self.work()
            _leave_group()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
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
    from toolkit.config_loader import load_config

    arguments = ["--config", config_file]
    config = load_config(arguments)
    train.main(arguments)
    if config.final.split and config.training.stop_after is None:
        evaluate.main([*arguments, "--split", config.final.split, "--rerank", str(config.final.rerank)])


@dataclass(frozen=True)
class Status:
    """A rank's file beside its log: there while it runs, and with its exit code afterwards."""

    folder: Path
    rank: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"rank{self.rank}.json"

    def write(self, code: int | None = None) -> None:
        """Say that this process is the rank, and how it ended."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": os.getpid(), "exit": code, "time": time.time()}))
        temporary.replace(self.path)

    def read(self) -> dict[str, Any] | None:
        """What the rank wrote last; None before it began."""
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None


def _threads(ranks_here: int) -> int:
    """This rank's share of the cores."""
    if given := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_here)


def _exit_code(error: BaseException) -> int:
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else 1


def _leave_group() -> None:
    """Close the process group, after what holds on to it: else a rank now and then aborts while it exits."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
