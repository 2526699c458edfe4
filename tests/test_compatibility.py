"""Files of earlier versions can be read: shards, configuration, checkpoint and export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.make import ROOT, call, read_losses, read_recall
from toolkit.model.retrieval import SpeechImageModel

VERSIONS = sorted(path.parent for path in (ROOT / "tests/compatibility").glob("*/expected.json"))


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the files of a version."""
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def expected(version: Path) -> dict[str, Any]:
    return json.loads((version / "expected.json").read_text())


def test_there_is_a_version() -> None:
    assert VERSIONS


@pytest.mark.timeout(280)
def test_a_stopped_run_resumes_and_is_evaluated(version: Path) -> None:
    where = ("--run", version / "run", "--data.shards", version / "shards")
    assert sorted(read_losses(version / "run")) == ["1", "2", "3"]
    call("toolkit/train.py", *where, "--training.stop_after", "null")  # on one rank instead of two
    losses_now = read_losses(version / "run")
    for step, losses in expected(version)["losses"].items():
        assert losses_now[step] == pytest.approx(losses, rel=1e-4), f"step {step}"
    call("toolkit/evaluate.py", *where)
    assert read_recall(version / "run") == expected(version)["recall"]


def test_an_export_loads(version: Path) -> None:
    for name in ("best", "last"):
        model = SpeechImageModel.from_pretrained(version / "run/export" / name)
        assert model.config.match_weight is not None


def test_shards_pass_the_check(version: Path) -> None:
    call("toolkit/check_shards.py", version / "shards")


def test_its_configuration_starts_a_new_run(version: Path, tmp_path: Path) -> None:
    config = version / "tiny.yaml"
    arguments = ("--data.shards", version / "shards", "--run", tmp_path / "new", "--training.steps", "1")
    call("toolkit/train.py", "--config", config, *arguments)
    first = expected(version)["losses"]["1"]
    assert read_losses(tmp_path / "new")["1"] == pytest.approx(first, rel=1e-4)
