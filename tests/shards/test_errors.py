"""How entry points end, as processes with a shell's exit codes."""

import subprocess
import sys
from pathlib import Path

from shards.errors import ExitCode

PRINT = "for line in range(100_000): print(line)"
OTHER_PIPE = "print('before'); raise BrokenPipeError('a worker has ended')"


def run(body: str, reader: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point into a pipe, and return what the pipe's reader printed, its errors and its exit code."""
    script = f"from shards.errors import run_main\ndef main():\n    {body}\nrun_main(main)"
    command = f'"$0" -c "$1" | {reader}; exit ${{PIPESTATUS[0]}}'
    root = Path(__file__).parents[2]
    return subprocess.run(["bash", "-c", command, sys.executable, script], capture_output=True, text=True, cwd=root)


def test_a_reader_that_has_ended_is_no_traceback():
    ended = run(PRINT, "true")
    assert (ended.stderr, ended.returncode) == ("", ExitCode.OUTPUT_CLOSED)


def test_the_lines_that_were_read_are_there():
    ended = run(PRINT, "head -n 2")
    assert (ended.stdout, ended.stderr) == ("0\n1\n", "")


def test_another_broken_pipe_is_an_error_as_before():
    ended = run(OTHER_PIPE, "cat")
    assert ended.stdout == "before\n"
    assert "BrokenPipeError: a worker has ended" in ended.stderr
    assert ended.returncode == 1
