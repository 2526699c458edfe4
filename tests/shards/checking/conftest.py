"""Fixtures of these tests."""

import shutil
from pathlib import Path

import pytest

from tests.shards.checking import damage


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.write(tmp_path_factory.mktemp("healthy") / "shards")


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "shards"))
