"""The cluster that the tests of this folder share: one at a time on a machine."""

import fcntl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.logs import setup_logging
from tests.slurm.cluster import Cluster, wait_for, why_not
from tests.test_whole_way import run, write_config, write_table


@pytest.fixture(autouse=True)
def _logging() -> None:
    setup_logging(rank=0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Eight nodes of two CPUs. Another session's cluster is waited for; nothing of ours is left afterwards."""
    if reason := why_not():
        pytest.skip(reason)
    with open(Path(tempfile.gettempdir()) / "slurm-testbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(tempfile.mkdtemp(prefix="slurm-testbed-"))
        there = Cluster(folder)
        try:
            there.up()
            yield there
        finally:
            there.down()
        left = subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True).stdout
        assert not left, f"still running: {left}"
        assert not folder.exists()
        assert not Path("/run/netns/testbed-controller").exists()


@pytest.fixture
def quiet(cluster: Cluster) -> Cluster:
    """The cluster with nothing running on it and all nodes there."""
    cluster.run("scancel", "--user=root", "--full")
    cluster.resume()
    wait_for(cluster.idle, lambda: cluster.run("sinfo", "-R").stdout)
    return cluster


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on 100 pictures, each step logged and every tenth saved."""
    folder = tmp_path_factory.mktemp("slurm")
    table = write_table(folder / "corpus", pictures=100)
    run("toolkit/make_shards.py", "table", "--root", str(table), "--out", str(folder / "shards"), "--jobs", "1")
    return write_config(folder / "tiny.yaml", folder / "shards")
