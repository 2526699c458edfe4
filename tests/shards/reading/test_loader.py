"""Worker processes: killed, stuck or slow ones, and none that is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from shards.errors import TransientError, UserError
from shards.manifest import Manifest
from shards.reading import loader as module
from shards.reading.reader import Reader
from tests.shards.media.noise import noise
from tests.shards.reading.test_dataset import Stuck, assert_same, batches, opened, order_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return noise(tmp_path / "shards")


def children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}


def stat(pid: int) -> str:
    """State of a process, "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""


def ignores_sigterm(pid: int) -> bool:
    """Does a process ignore SIGTERM?"""
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(ignored and int(ignored[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("kill", "cause"), [(signal.SIGKILL, "memory ran out"), (signal.SIGBUS, "/dev/shm")])
def test_a_killed_worker_is_named_while_waiting_for_a_batch(manifest: Manifest, kill: int, cause: str) -> None:
    before = children()
    stream = opened(Reader(manifest), order_for(manifest), range(200), workers=2)
    next(stream)
    (first, second) = sorted(children() - before)
    os.kill(first, kill)
    time.sleep(0.3)  # the death alone must not interrupt what runs now
    with pytest.raises(TransientError, match=cause) as caught:
        for _ in stream:
            pass
    assert f"(pid {first})" in str(caught.value)
    assert signal.Signals(kill).name in str(caught.value)
    assert stat(second) in ("", "Z"), "the other worker goes on"


class Failing(Reader):
    """A reader that ends its process, or fails as a disk does."""

    how: Any

    def picture(self, sample: int) -> bytes:
        return self.how()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_does_not_respond_is_no_mistake_of_the_user(manifest: Manifest, workers: int) -> None:
    reader = Failing(manifest)
    reader.how = Mock(side_effect=TransientError("no answer"))
    with pytest.raises(TransientError, match="no answer"):
        batches(manifest, range(1), workers=workers, reader=reader)


def test_a_worker_that_ends_by_itself_is_not_tried_again(manifest: Manifest) -> None:
    reader = Failing(manifest)
    reader.how = lambda: os._exit(3)
    with pytest.raises(UserError, match="ended with exit code 3") as caught:
        batches(manifest, range(1), workers=1, reader=reader)
    assert not isinstance(caught.value, TransientError)


def test_a_worker_that_hangs_is_named_after_the_time_given(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.2)
    before, start = children(), time.monotonic()
    stream = opened(Stuck(manifest), order_for(manifest), range(9), workers=2, timeout=1.0)
    with pytest.raises(TransientError, match=r"no batch came .* in 1 s: .*--data\.timeout"):
        next(stream)
    assert time.monotonic() - start < 9
    assert children() == before, "a stuck worker is left"


def test_a_slow_worker_is_waited_for(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.1)
    real = Reader.picture
    monkeypatch.setattr(Reader, "picture", lambda self, sample: time.sleep(0.06) or real(self, sample))
    assert_same(batches(manifest, range(3)), batches(manifest, range(3), workers=1, timeout=30.0))


def test_batches_that_are_left_early_leave_no_worker(manifest: Manifest) -> None:
    before = children()
    stream = opened(Reader(manifest), order_for(manifest), range(200), workers=2)
    next(stream)
    assert children() != before
    stream.close()
    assert children() == before


PARENT = """
import sys, time
from shards.manifest import load
from tests.shards.reading.test_loader import Stuck, opened, order_for
manifest = load(sys.argv[1])
reader = Stuck(manifest)
reader.answers = 8
stream = opened(reader, order_for(manifest), range(99), workers=2)
next(stream)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_parent_leaves_no_worker_even_if_stuck(manifest: Manifest) -> None:
    command = [sys.executable, "-c", PARENT, str(manifest.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        workers = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        while not all(ignores_sigterm(pid) for pid in workers):  # the second may still begin
            time.sleep(0.05)
        for pid in workers:
            os.kill(pid, signal.SIGTERM)  # which asks the trainer to save: a worker goes on
        time.sleep(0.3)
        assert len(workers) == 2
        assert all(stat(pid) not in ("", "Z") for pid in workers)
        parent.kill()
    deadline = time.monotonic() + 10
    while any(stat(pid) not in ("", "Z") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if stat(pid) not in ("", "Z")]


FAILS = """
import sys
from shards.manifest import load
from tests.shards.reading.test_loader import Reader, opened, order_for
manifest = load(sys.argv[1])
stream = opened(Reader(manifest), order_for(manifest), range(200), workers=2)
next(stream)
raise ValueError("nobody catches this")
"""


def test_a_process_that_fails_ends_although_its_workers_are_alive(manifest: Manifest) -> None:
    command = [sys.executable, "-c", FAILS, str(manifest.folder)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: nobody catches this"), done.stderr


def private_memory(pid: int) -> int:
    """Bytes that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


EPOCHS = """
import sys
from shards.manifest import load
from tests.shards.reading.test_loader import Reader, children, opened, order_for, private_memory
manifest = load(sys.argv[1])
for step, _ in enumerate(opened(Reader(manifest), order_for(manifest, batch_size=6), range(10 * 22), workers=1)):
    if step % 10 == 9:
        print(private_memory(*children()))
"""


def test_a_workers_memory_is_flat_over_twenty_epochs(tmp_path: Path) -> None:
    """In a process of its own: a worker would take over, page by page, what a process that tests much holds."""
    noise(tmp_path / "shards", pictures=60, captions=2, samples_per_shard=4)
    command = [sys.executable, "-c", EPOCHS, str(tmp_path / "shards")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=100)
    sizes = [int(size) for size in done.stdout.split()]
    assert len(sizes) == 22
    # By then everything that is kept has been made; a kilobyte left behind by each picture would come to 840 kB.
    assert sizes[-1] - sizes[7] < 1_000_000, [size // 1024 for size in sizes]
