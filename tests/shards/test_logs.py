"""Log messages on the terminal: levels, streams, ranks, and failures to write."""

import argparse
import io
import logging
import sys

import pytest

from shards.logs import LEVELS, PACKAGES, TerminalHandler, add_log_level, setup_logging


@pytest.fixture(autouse=True)
def restored():
    """Leave the loggers as they were."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


def log_all(package="toolkit"):
    logger = logging.getLogger(f"{package}.somewhere")
    for level in LEVELS:
        getattr(logger, level)("%s at 50 %% of %d", level, 7)


def shown(capsys):
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        (
            "debug",
            ["debug: toolkit.somewhere: debug at 50 % of 7", "info at 50 % of 7"],
            ["warning: warning at 50 % of 7", "error: error at 50 % of 7"],
        ),
        ("info", ["info at 50 % of 7"], ["warning: warning at 50 % of 7", "error: error at 50 % of 7"]),
        ("warning", [], ["warning: warning at 50 % of 7", "error: error at 50 % of 7"]),
        ("error", [], ["error: error at 50 % of 7"]),
    ],
)
def test_levels_and_streams(capsys, level, out, err):
    setup_logging(level, rank=0)
    log_all()
    assert shown(capsys) == (out, err)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_set_up_and_the_root_is_not(capsys, package):
    root = list(logging.getLogger().handlers)
    setup_logging(rank=0)
    log_all(package)
    assert shown(capsys)[0] == ["info at 50 % of 7"]
    assert logging.getLogger().handlers == root


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        ("info", [], ["warning: rank 3: warning at 50 % of 7", "error: rank 3: error at 50 % of 7"]),
        ("error", [], ["error: rank 3: error at 50 % of 7"]),
        (
            "debug",
            ["debug: toolkit.somewhere: rank 3: debug at 50 % of 7", "rank 3: info at 50 % of 7"],
            ["warning: rank 3: warning at 50 % of 7", "error: rank 3: error at 50 % of 7"],
        ),
    ],
)
def test_other_ranks_log_warnings_and_at_debug_everything(capsys, monkeypatch, level, out, err):
    monkeypatch.setenv("RANK", "3")
    setup_logging(level)
    log_all()
    assert shown(capsys) == (out, err)
    setup_logging(level, rank=3)
    log_all()
    assert shown(capsys) == (out, err)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_rank_is_0_without_a_launcher(capsys, monkeypatch, value):
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    setup_logging()
    log_all()
    assert shown(capsys)[0] == ["info at 50 % of 7"]


def test_a_second_set_up_replaces_the_first_and_leaves_other_handlers(capsys):
    other = logging.NullHandler()
    logger = logging.getLogger("toolkit")
    logger.addHandler(other)
    setup_logging("debug", rank=0)
    setup_logging("info", rank=0)
    log_all()
    assert shown(capsys)[0] == ["info at 50 % of 7"], "a message was shown twice"
    assert sum(isinstance(handler, TerminalHandler) for handler in logger.handlers) == 1
    assert other in logger.handlers


def test_streams_are_those_of_the_moment(monkeypatch):
    setup_logging(rank=0)
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    log_all()
    assert out.getvalue() == "info at 50 % of 7\n"
    assert err.getvalue() == "warning: warning at 50 % of 7\nerror: error at 50 % of 7\n"


class FullDisk(io.StringIO):
    """A stream that cannot be written."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_stream_that_cannot_be_written_ends_nothing(monkeypatch, capsys):
    setup_logging(rank=0)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", FullDisk())
        patched.setattr(sys, "stderr", FullDisk())
        log_all()
    log_all()
    assert shown(capsys)[0] == ["info at 50 % of 7"]


def test_an_exception_is_shown_with_its_traceback(capsys):
    setup_logging(rank=0)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("shards.x").exception("failed")
    err = shown(capsys)[1]
    assert (err[0], err[-1]) == ("error: failed", "ValueError: broken")


def test_the_option():
    parser = argparse.ArgumentParser()
    add_log_level(parser)
    assert parser.parse_args([]).log_level == "info"
    for level in LEVELS:
        assert parser.parse_args(["--log-level", level]).log_level == level
    with pytest.raises(SystemExit):
        parser.parse_args(["--log-level", "loud"])
