"""Progress: a bar in a terminal, elsewhere log lines with the time left; optional."""

import io
import logging
import sys

import pytest

from shards import progress as module
from shards.progress import progress_bar, progress_range


def test_log_lines_count_and_estimate_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with progress_bar(4000, "pictures") as progress:
        progress(1000)  # kept from an earlier run
        for _ in range(6):
            now[0] += 10
            progress(100)
    assert caplog.messages == ["1,300 of 4,000 pictures, 1.0 minutes left", "1,600 of 4,000 pictures, 4.0 minutes left"]


def test_a_range_is_counted_under_its_title(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL", 0.0)
    caplog.set_level(logging.INFO)
    assert list(progress_range(3, "batches", "encoding")) == [0, 1, 2]
    assert [line.partition(",")[0] for line in caplog.messages] == [f"encoding: {n} of 3 batches" for n in (1, 2, 3)]
    assert list(progress_range(3, "batches", "encoding", show=False)) == [0, 1, 2]
    assert len(caplog.messages) == 3


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(20, "samples", "checking") as progress:
        progress(20)
    assert "20/20" in sys.stderr.getvalue()
    assert " samples/s" in sys.stderr.getvalue()
