"""The job of one rank: set up torch.distributed's environment, train, evaluate, and record the exit code in a file."""

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

from shards.errors import ExitCode, UserError

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_CONNECTION_LOST = re.compile(r"gloo/|NCCL|Connection (closed|reset) by peer|Broken pipe|Connection refused")


@dataclass(frozen=True)
class Job:
    """The function that submitit calls in every rank; pickled by name, so that the node needs it on its PYTHONPATH.

    A rank that fails exits with its code, so that srun's --kill-on-bad-exit ends the others too.
    """

    config: str  # YAML file of this submission
    folder: str  # of the logs
    port: int | None = None  # of the rendezvous on this machine; None: derived from the SLURM job
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES as the user set it, which submitit's local executor overwrites
    directory: str | None = None  # working directory of the command, to which paths are relative, also in a container
    cores: int | None = None  # of the allocation that a job of this machine was started in; None: all that it may use

    def __call__(self) -> None:
        """Run this rank to its end."""
        environment = self.rank_environment()
        os.environ.update(environment)
        self._restore_gpus()
        status = Status(Path(self.folder), int(environment["RANK"]))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the controller was started with it ignored
        for number in _STOP_SIGNALS:  # in place of submitit's handlers, which act on rank 0 alone
            signal.signal(number, _stop)
        status.write()
        code = self._run()
        status.write(code)
        if code:
            sys.exit(code)

    def work(self) -> None:
        """Train and evaluate; a test's job does something else."""
        train_and_evaluate(self.config)

    def rank_environment(self) -> dict[str, str]:
        """Return the environment that torch.distributed and DeepSpeed read."""
        from submitit import JobEnvironment

        environment = JobEnvironment()
        ranks_here = environment.num_tasks // environment.num_nodes
        local = self.port is not None
        # Each attempt uses another port; a rank of an earlier attempt may still hold the old one.
        restart = restart_count(os.environ)
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
        """Return this rank's share of the cores."""
        given = os.environ.get("SLURM_CPUS_PER_TASK")
        if self.port is None and given:
            return int(given)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores, self.cores or cores) // ranks_here)

    def _enter_directory(self) -> None:
        if self.directory is not None:
            try:
                os.chdir(self.directory)
            except OSError as error:
                where = f"{self.directory}, the working directory of the command, on {platform.node()}"
                raise UserError(f"cannot enter {where}: {error.strerror}; a container needs it mounted") from None

    def _restore_gpus(self) -> None:
        if self.port is None:
            return
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus

    def _run(self) -> int:
        """Train and evaluate; an error's text goes to the rank's log.

        Returns:
            0, or the `ExitCode` of the failure.
        """
        try:
            self._enter_directory()
            self.work()
            _destroy_group()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.code
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
        except BaseException as error:
            code = _exit_code(error)
            if code != ExitCode.REQUEUE:  # a training that a signal stopped: nothing failed
                traceback.print_exc()
            return code
        return 0


def train_and_evaluate(config_file: str) -> None:
    """Train, and evaluate after the last step, in this process.

    Raises:
        UserError: As of training and evaluation.
    """
    from toolkit import evaluate, train
    from toolkit.config.load import load_config

    arguments = ["--config", config_file]
    config = load_config(arguments)
    train.main(arguments)
    if config.final.split and config.training.stop_after is None:
        evaluate.main(arguments)  # by default on final.split with final.rerank


@dataclass(frozen=True)
class Status:
    """A rank's status file beside its log, written when the rank begins and, with its exit code, when it ends.

    It holds the restart count of the job's attempt. For a rank that ended before it could write the file, the batch
    script writes it, with `began` false.
    """

    folder: Path
    rank: int

    @property
    def path(self) -> Path:
        """Status file."""
        return self.folder / f"rank{self.rank}.json"

    def write(self, code: int | None = None) -> None:
        """Write this process, with the exit code at its end; a rank of an earlier attempt writes nothing."""
        self._write({"pid": os.getpid(), "host": platform.node(), "exit": code}, restart_count(os.environ))

    def write_failed_start(self, code: int, restart: int) -> None:
        """Write the status of a rank that ended before it could."""
        self._write({"pid": None, "host": "", "exit": code, "began": False}, restart)

    def _write(self, values: dict[str, Any], restart: int) -> None:
        if ((self.read() or {}).get("restart") or 0) > restart:
            return
        status = {**values, "time": time.time(), "restart": restart}
        temporary = self.path.with_suffix(f".{restart}.tmp")
        temporary.write_text(json.dumps(status))
        temporary.replace(self.path)

    def read(self) -> dict[str, Any] | None:
        """Return what the rank wrote last; None before it began."""
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None


def restart_count(environment: Mapping[str, str]) -> int:
    """Return how often SLURM has restarted this job."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit on a signal outside the training, where there is nothing to save."""
    sys.exit(ExitCode.REQUEUE)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.ERROR
    return ExitCode.PEER_LOST if _is_connection_error(error) else ExitCode.ERROR


def _is_connection_error(error: BaseException) -> bool:
    """Return whether a collective or the rendezvous failed because another rank was gone."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(_CONNECTION_LOST.search(str(error)))


def _destroy_group() -> None:
    """Destroy the process group after the objects that use it: else a rank may abort while it exits."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
