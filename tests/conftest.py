"""Set-up of all tests."""

import os
import signal

import pytest

import shards  # noqa: F401  sets its torchaudio import hook, which must precede the import of transformers

# A shell that starts pytest in the background makes it, and all processes that it starts, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, all requirements of the tests are installed: a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and (skipped := reporter.stats.get("skipped")):
        reporter.write_line(f"CI: {len(skipped)} skipped tests count as failures")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
