"""Run a function on real ranks, one process each: gloo ranks on the CPU, or with RANKS=cuda NCCL ranks, one a GPU.

The processes are forked from a server that has imported torch, transformers and DeepSpeed once: a rank costs
milliseconds. Runs share nothing: each meets through a file of its own, and each has a deadline after which no process
is left.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRELOADED = ["torch", "torch.distributed", "toolkit.model.retrieval"]
if os.environ.get("RANKS") != "cuda":  # DeepSpeed looks for GPUs when it is imported, which no fork may inherit
    PRELOADED += ["toolkit.training.trainer", "deepspeed.compile.backend"]
GRACE = 3.0  # seconds after the deadline in which a rank may show where it stands and end itself
SETTLE = (
    0.5  # seconds after a rank has failed in which the others may fail too, so that the cause is known from the effects
)


def device_of(rank: int) -> "torch.device":
    """Where a rank computes."""
    import torch

    return torch.device("cuda", rank) if os.environ.get("RANKS") == "cuda" else torch.device("cpu")


class RankError(AssertionError):
    """A rank failed: its number and its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank of a process group.

    Args:
        function: What each rank runs, from the top of a module; torch uses one thread.
        world_size: Number of ranks.
        args: Further arguments, pickled.
        timeout: Seconds for all of it, start included.

    Returns:
        What the ranks returned, by rank.

    Raises:
        RankError: A rank raised or died; of several the first in time.
        TimeoutError: A rank did not finish; the message shows where each one stood.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    deadline = time.time() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = (function, world_size, args, Path(folder), deadline, dict(os.environ))
        ranks = [context.Process(target=_run_rank, args=(rank, *call)) for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            _await(ranks, deadline)
            exit_codes = [process.exitcode for process in ranks]
            late = time.time() >= deadline
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return _results(Path(folder), exit_codes, f" in {timeout} s" if late else "")


def _await(ranks: list[BaseProcess], deadline: float) -> None:
    """Wait until all have ended, one has failed a moment ago, or the deadline is well past."""
    running, end = ranks, deadline + GRACE
    while running and (left := end - time.time()) > 0:
        wait([process.sentinel for process in running], left)
        running = [process for process in ranks if process.is_alive()]
        if time.time() < deadline and any(process.exitcode for process in ranks):
            end = min(end, time.time() + SETTLE)


def _results(folder: Path, exit_codes: list[int | None], late: str) -> list[Any]:
    """Read what the ranks left in the folder; an exit code of None is a rank that still ran."""
    of = f"of {len(exit_codes)}"
    outcomes = {int(path.stem): pickle.loads(path.read_bytes()) for path in folder.glob("*.outcome")}
    missing = [rank for rank in range(len(exit_codes)) if rank not in outcomes]
    died = [f"rank {rank} {of} died with exit code {exit_codes[rank]}" for rank in missing if exit_codes[rank]]
    failures = sorted((when, rank, error) for rank, (when, error, _) in outcomes.items() if error)
    first_failed = [f"rank {rank} {of} failed:\n{error}" for _, rank, error in failures[:1]]
    if (died and not late) or first_failed:  # who died could not say why; the others' errors may follow from that
        raise RankError("\n".join([*([] if late else died), *first_failed]))
    if missing:
        stacks = [f"rank {path.stem}:\n{path.read_text()}" for path in sorted(folder.glob("*.stacks"))]
        raise TimeoutError(f"ranks {missing} {of} did not finish{late}\n" + "\n".join(stacks))
    return [outcomes[rank][2] for rank in range(len(exit_codes))]


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    folder: Path,
    deadline: float,
    environment: dict[str, str],
) -> None:
    """A process: leave (time, traceback or None, result) in `rank.outcome`, or the stacks at the deadline."""
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.dump_traceback_later(max(deadline - time.time(), 0.1), exit=True, file=stacks)  # and end, by itself
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        result = _in_group(rank, function, world_size, args, folder, deadline)
        failed, outcome = False, pickle.dumps((time.time(), None, result))
    except BaseException:
        failed, outcome = True, pickle.dumps((time.time(), traceback.format_exc(), None))
    partial = folder / f"{rank}.partial"
    partial.write_bytes(outcome)
    partial.rename(folder / f"{rank}.outcome")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)  # at once: other ranks see it go only now that the reason is on record


def _in_group(
    rank: int, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], folder: Path, deadline: float
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whether or not the machine can resolve its own name
    meeting = f"file://{folder}/meeting"
    patience = timedelta(seconds=max(deadline - time.time(), 0) + GRACE)  # past the deadline, which shows the stacks
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # ranks agree by tensors on the CPU
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world_size, timeout=patience)
    result = function(rank, world_size, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result
