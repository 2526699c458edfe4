"""Worker processes for many independent tasks: no shared lock that a dying worker could hold; its death is named."""

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

Task = TypeVar("Task")
Result = TypeVar("Result")
Progress = Callable[[int], object]  # told how many units of work were done since the last call


def run_tasks(
    function: Callable[[Task, Progress], Result], tasks: Mapping[str, Task], jobs: int, progress: Progress
) -> Iterator[tuple[str, Result]]:
    """Apply `function` to every task and give (name, result) as they come, in no fixed order.

    Args:
        function: importable by name; called with a task and a `Progress`.
        tasks: what to do, by a name that a message can show.
        jobs: processes; with one the work is done here.
        progress: told what the function reports, in this process.

    Raises:
        UserError: the first that a task raises, or a worker that was killed. The other workers are stopped.
        RuntimeError: any other exception of a task, with the worker's traceback.
    """
    if jobs <= 1 or len(tasks) <= 1:
        for name, task in tasks.items():
            yield name, function(task, progress)
        return
    workers: dict[Connection, _Worker] = {}
    todo = iter(tasks.items())
    try:
        with _no_interrupt():
            for number in range(min(jobs, len(tasks))):
                worker = _start(number, function)
                workers[worker.connection] = worker
        for worker in workers.values():
            worker.give(next(todo, None))
        while busy := [worker.connection for worker in workers.values() if worker.task is not None]:
            for connection in wait(busy):
                worker = workers[connection]  # type: ignore[index]
                kind, value = worker.receive()
                if kind == "progress":
                    progress(value)
                    continue
                name = str(worker.task)
                worker.give(next(todo, None))
                yield name, value
    finally:
        for worker in workers.values():
            worker.stop()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    task: str | None = None  # name of the task it works on

    def give(self, task: tuple[str, Any] | None) -> None:
        self.task = task[0] if task else None
        try:
            self.connection.send(task and task[1])
        except OSError:
            raise UserError(self._worker_death_error()) from None

    def receive(self) -> tuple[str, Any]:
        """Wait for the worker's next word: kind and value; its death, or an error in it, is raised here."""
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
    # Spawned, not forked: the parent may have threads, whose locks a fork would copy as they happen to be.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), name=f"worker {number}", daemon=True)
    process.start()
    theirs.close()  # so that the death of the worker is the end of the stream
    return _Worker(number, process, ours)


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(count: int) -> None:
        connection.send(("progress", count))

    while (task := connection.recv()) is not None:
        try:
            answer = ("done", function(task, progress))
        except UserError as error:
            answer = ("user error", str(error))
        except Exception:
            answer = ("failure", traceback.format_exc())
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Start children deaf to Ctrl-C, which a terminal sends to all: this process alone stops them, in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
