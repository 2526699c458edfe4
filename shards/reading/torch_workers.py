"""The worker processes of a torch DataLoader: the one module that uses private fields of its iterator.

The public API neither names the worker processes nor stops them at a given moment. The fields used here (`_workers`,
`_shutdown`, `_pin_memory_thread` and `_shutdown_workers` of `_MultiProcessingDataLoaderIter`) are known to hold for
torch 2.13. In a version without `_shutdown_workers`, workers are killed; in one without `_workers`, none is waited for.
"""

import threading
from multiprocessing.process import BaseProcess
from typing import Any

_PATIENCE = 3.0  # seconds in which workers may end by themselves


def worker_processes(iterator: Any) -> list[BaseProcess]:
    """Worker processes of a DataLoader's iterator; none if it loads in this process."""
    return list(getattr(iterator, "_workers", []))


def stop_workers(iterator: Any, workers: list[BaseProcess]) -> None:
    """Stop the workers; one that is stuck is killed, as it holds nothing that another process needs."""

    def kill() -> None:
        for worker in workers:
            worker.kill()

    if not workers:
        return
    if any(worker.exitcode is not None for worker in workers) and hasattr(iterator, "_pin_memory_thread"):
        # A killed worker may leave a message half written, and the regular shutdown waits for the thread that reads it.
        iterator._shutdown = True
    else:
        killer = threading.Timer(_PATIENCE, kill)
        killer.start()
        getattr(iterator, "_shutdown_workers", kill)()
        killer.cancel()
    kill()
    for worker in workers:
        worker.join()
