import multiprocessing
import os
import signal
import time

import pytest

from shards.errors import UserError
from shards.worker_pool import run_tasks


def square(task, progress):
    progress(1)
    progress(2)
    return task * task


def misbehave(task, progress):
    if task == "mistake":
        raise UserError("no such file: x.wav")
    if task == "bug":
        raise KeyError("wave")
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(3)
    time.sleep(60 if task == "sleep" else 0)
    return task


def large(task, progress):
    return task[::-1]


def run(function, tasks, jobs):
    done = []
    return dict(run_tasks(function, tasks, jobs, done.append)), sum(done)


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_every_task_is_done_once(jobs):
    tasks = {f"task {n}": n for n in range(7)}
    assert run(square, tasks, jobs) == ({f"task {n}": n * n for n in range(7)}, 21)


def test_large_tasks_and_results():
    tasks = {str(n): bytes([n]) * 3_000_000 + b"end" for n in range(4)}
    results, _ = run(large, tasks, 2)
    assert results == {name: task[::-1] for name, task in tasks.items()}


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("mistake", UserError, r"^no such file: x\.wav$"),
        ("bug", RuntimeError, "worker . failed on shard 1:(.|\n)*KeyError: 'wave'"),
        ("kill", UserError, r"worker . \(pid \d+\) was killed by SIGKILL while making shard 1; if memory ran out"),
        ("exit", UserError, r"worker . \(pid \d+\) ended with exit code 3 while making shard 1"),
    ],
)
def test_errors_of_a_worker_are_named_and_stop_the_others(task, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run(misbehave, {"shard 0": "sleep", "shard 1": task, "shard 2": "fine"}, 2)
    assert time.monotonic() - start < 30, "waited for the sleeping worker"
    assert not multiprocessing.active_children()


def test_no_workers_are_left_when_the_caller_stops_early():
    results = run_tasks(misbehave, {"a": "fine", "b": "sleep", "c": "sleep"}, 2, lambda done: None)
    assert next(results) == ("a", "fine")
    results.close()
    assert not multiprocessing.active_children()
