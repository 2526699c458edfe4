"""Work behind the training: a thread that does one thing, what came of it, and the line that tells."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def background(work: Callable[[], T]) -> "Future[T]":
    """Run something in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def outcome_of(future: "Future[T]") -> "T | str":
    """Wait for what runs behind the training: its result, or why there is none."""
    try:
        return future.result()
    except Exception as error:
        return reason_of(error)


def tell(line: str) -> None:
    """Print a line; a job's output is often on the disk that is full, and that ends no run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def reason_of(error: BaseException) -> str:
    """Say what an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
