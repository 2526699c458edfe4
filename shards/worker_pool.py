"""Worker processes for independent tasks, each with its own pipe.

In contrast to `concurrent.futures.ProcessPoolExecutor`, workers share no queue whose lock a killed worker could hold,
an error names the worker that died and its task, and an error stops workers that are still busy.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from shards.errors import UserError
from shards.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task, Progress], Result], tasks: Mapping[str, Task], jobs: int, progress: Progress
) -> Iterator[tuple[str, Result]]:
    """Apply `function` to every task and yield (name, result) in order of completion.

    Args:
        function: Importable by name; called with a task and a `Progress`.
        tasks: The tasks by name, as shown in messages.
        jobs: Number of processes; with one, the tasks run in this process.
        progress: Called in this process with what the function reports.

    Raises:
        UserError: The first that a task raises, or a worker was killed. The other workers are stopped.
        RuntimeError: A task raised another exception; the message has the worker's traceback.
    """
    if jobs <= 1 or len(tasks) <= 1:
        for name, task in tasks.items():
            yield name, function(task, progress)
        return
    workers: dict[Connection, _Worker] = {}
    remaining = iter(tasks.items())
    try:
        with _no_interrupt():
            for number in range(min(jobs, len(tasks))):
                worker = _start(number, function)
                workers[worker.connection] = worker
        for worker in workers.values():
            worker.send(next(remaining, None))
        while busy := [worker.connection for worker in workers.values() if worker.task is not None]:
            for connection in wait(busy):
                worker = workers[connection]  # type: ignore[index]
                kind, value = worker.receive()
                if kind == "progress":
                    progress(value)
                    continue
                name = str(worker.task)
                worker.send(next(remaining, None))
                yield name, value
    finally:
        for worker in workers.values():
            worker.stop()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    task: str | None = None  # name of its current task

    def send(self, task: tuple[str, Any] | None) -> None:
        self.task = task[0] if task else None
        try:
            self.connection.send(task and task[1])
        except OSError:
            raise UserError(self._worker_death_error()) from None

    def receive(self) -> tuple[str, Any]:
        """Wait for the worker's next message: kind and value. Raises its error, or an error if it died."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise UserError(self._worker_death_error()) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "failure":
            raise RuntimeError(f"worker {self.number} failed on {self.task}:\n{value}")
        return kind, value

    def _worker_death_error(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; if memory ran out, take fewer --jobs" if code == -signal.SIGKILL else ""
        return f"worker {self.number} (pid {self.process.pid}) {how} while making {self.task}{hint}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _start(number: int, function: Callable[..., Any]) -> _Worker:
    # Spawned, not forked: the parent may have threads, and a fork would copy their locks in any state.
    context = multiprocessing.get_context("spawn")
    connection, worker_connection = context.Pipe()
    process = context.Process(target=_serve, args=(worker_connection, function), name=f"worker {number}", daemon=True)
    process.start()
    worker_connection.close()  # so that `recv` raises EOFError when the worker dies
    return _Worker(number, process, connection)


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def progress(count: int) -> None:
        connection.send(("progress", count))

    while (task := connection.recv()) is not None:
        try:
            message = ("done", function(task, progress))
        except UserError as error:
            message = ("user error", str(error))
        except Exception:
            message = ("failure", traceback.format_exc())
        connection.send(message)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Start children that ignore SIGINT, which a terminal sends to all processes; this process stops them in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
