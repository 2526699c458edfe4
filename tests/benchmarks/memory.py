"""Peak memory of the benchmarks, by the kernel's count for a process."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def memory_growth(call: Callable[[], object]) -> float:
    """Return the peak growth of this process's resident memory during a call, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = _proc_status("VmRSS")
    call()
    return _proc_status("VmHWM") - before


def memory_growth_in_subprocess(name: str) -> float:
    """Return what this script prints with the same options and `--memory-of NAME`, measured in a separate process."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _proc_status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024.0 * int(found[1])
