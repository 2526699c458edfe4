"""Run a function in a background thread, and describe an error in one line."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_in_background(function: Callable[[], T]) -> "Future[T]":
    """Run a function in a daemon thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def result_or_reason(future: "Future[T]") -> "T | str":
    """Wait for a future and return its result, or the reason of its failure in one line."""
    try:
        return future.result()
    except Exception as error:
        return reason_of(error)


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    return getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
