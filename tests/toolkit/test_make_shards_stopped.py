"""make_shards stopped or killed: finished shards are kept, and the next run resumes."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import contents, identities
from tests.toolkit.shard_runs import finished, make, start


@pytest.fixture
def slow_corpus(tmp_path):
    """Pictures that take a while to read, as links to one file."""
    root = tmp_path / "corpus"
    tiny.photo(root / "large.png", (2000, 1000))
    tiny.speech(root / "speech.wav")
    rows = []
    for n in range(60):
        os.link(root / "large.png", root / f"{n}.png")
        os.link(root / "speech.wav", root / f"{n}.wav")
        rows.append({"image": f"{n}.png", "audio": f"{n}.wav"})
    return tiny.table(root, rows)


def slow_arguments(root, out):
    return ("table", "--root", str(root), "--out", str(out), "--jobs", "2", "--samples-per-shard", "3")


def start_slow(root, out):
    """Start two workers on the slow corpus and wait until they have finished a shard."""
    before = len(finished(out))
    job = start(*slow_arguments(root, out), start_new_session=True)
    deadline = time.monotonic() + 60
    while len(finished(out)) == before:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "no shard after a minute"
        time.sleep(0.02)
    return job


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_stopping_keeps_finished_shards(slow_corpus, tmp_path, number, code, line):
    job = start_slow(slow_corpus, tmp_path / "out")
    os.killpg(job.pid, number)  # as a terminal or a scheduler does: all processes
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code
    assert re.fullmatch(
        rf"warning: {tmp_path}/out: \d+ of 20 shards are finished and kept: the same command.*\n{line}", errors
    )
    assert not list(tmp_path.glob("out/**/*.tmp"))
    assert finished(tmp_path / "out")


def test_stopping_before_the_first_shard_leaves_nothing(slow_corpus, tmp_path):
    job = start(*slow_arguments(slow_corpus, tmp_path / "out")[:-1], "80")
    deadline = time.monotonic() + 60
    # With something in it: until then modules are imported, where Python itself may lose an interrupt.
    while not any(path.stat().st_size for path in tmp_path.glob("out/*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_killed_worker_is_named(slow_corpus, tmp_path):
    job = start_slow(slow_corpus, tmp_path / "out")
    workers = [pid for pid in children(job.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert f"(pid {workers[1]}) was killed by SIGKILL while making train-0000" in errors
    assert "of 20 shards are finished and kept: the same command" in errors
    assert errors.count("\n") == 1
    assert finished(tmp_path / "out")


def test_rerun_after_kills_ends_with_the_same_bytes(slow_corpus, tmp_path):
    out, chance = tmp_path / "out", random.Random(1)
    kept = {}
    for _ in range(3):
        job = start_slow(slow_corpus, out)
        time.sleep(chance.uniform(0, 0.2))
        job.kill()
        job.communicate(timeout=60)
        assert not (out / "manifest.json").exists()
        now = finished(out)
        assert kept.items() <= now.items()
        kept = now
    make(*slow_arguments(slow_corpus, out))
    assert kept.items() <= identities(out).items()
    make(*slow_arguments(slow_corpus, tmp_path / "undisturbed"))
    assert contents(out) == contents(tmp_path / "undisturbed")
