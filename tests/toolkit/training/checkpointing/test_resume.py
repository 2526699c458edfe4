"""Exact resumption at any world size and stage, and runs that begin from another's checkpoint."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shards.errors import UserError
from shards.files import read_records
from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.checkpointing.resumed_runs import assert_equal, losses, settings, train
from toolkit.config import schema as config


@pytest.mark.timeout(400)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(shards: Path, tmp_path: Path, precision: str) -> None:
    runs = []
    for zero in range(4):
        options = {"zero_stage": zero, "precision": precision, "accumulation": 2 if zero == 1 else 1}
        runs.append((settings(shards, tmp_path / f"unbroken{zero}", **options), None, ""))
        broken = settings(shards, tmp_path / f"broken{zero}", **options)
        for each in (broken, runs[-1][0]):
            each.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 300}}
            each.objectives.coarse_steps = 1 if zero % 2 == 0 else 0
        runs += [(broken, 1 + zero % 3, "raise"), (broken, None, "")]
    run_ranks(train, 2, runs, timeout=350)
    for zero in range(4):
        assert_equal(tmp_path / f"broken{zero}", tmp_path / f"unbroken{zero}")


@pytest.mark.timeout(240)
def test_killed_while_saving_equals_unbroken(shards: Path, tmp_path: Path) -> None:
    broken, unbroken = (
        settings(shards, tmp_path / name, zero_stage=2, keep_checkpoints=1) for name in ("broken", "unbroken")
    )
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(train, 2, [(broken, 3, "kill")], timeout=100)
    assert not (tmp_path / "broken" / "checkpoints" / "step-00000004").exists()
    run_ranks(train, 2, [(broken, None, ""), (unbroken, None, "")], timeout=100)
    assert_equal(tmp_path / "broken", tmp_path / "unbroken")
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.timeout(300)
def test_continued_on_other_ranks_at_other_stages(shards: Path, tmp_path: Path) -> None:
    def run(name: str, zero: int) -> config.Config:
        made = settings(shards, tmp_path / name, zero_stage=zero)
        made.model.fusion.dropout = made.objectives.denoising.weight = 0.0  # these depend on the rank
        return made

    changing = tmp_path / "changing"
    run_ranks(train, 2, [(run("unbroken", 1), None, ""), (run("changing", 2), 1, "raise")], timeout=100)
    run_ranks(train, 4, [(run("changing", 3), 2, "raise")], timeout=100)
    run_ranks(train, 1, [(run("changing", 0), 3, "raise"), (run("changing", 1), None, "")], timeout=100)
    markers = [json.loads((changing / f"checkpoints/step-0000000{n}/progress.json").read_text()) for n in (2, 3, 4)]
    assert [(marker["world_size"], marker["zero"]) for marker in markers] == [(4, 3), (1, 0), (1, 1)]
    unbroken = losses(tmp_path / "unbroken")
    for step, actual in losses(changing).items():
        assert actual == pytest.approx(unbroken[step], rel=1e-5, abs=1e-5)


def refused(rank: int, world_size: int, run: config.Config) -> str:
    with pytest.raises(UserError) as caught:
        train(rank, world_size, [(run, None, "")])
    return str(caught.value)


@pytest.mark.timeout(240)
def test_a_run_begins_from_anothers_checkpoint_or_never_from_one(shards: Path, tmp_path: Path) -> None:
    first = settings(shards, tmp_path / "first", keep_checkpoints=9)
    run_ranks(train, 2, [(first, None, "")], timeout=100)
    marked = tmp_path / "first" / "checkpoints" / "step-00000002"
    branch, again = (settings(shards, tmp_path / "branch", resume=str(each)) for each in (marked, tmp_path / "first"))
    # The second begins where the branch is, not at the end of the first, which it names.
    run_ranks(train, 2, [(branch, 3, "raise"), (again, None, "")], timeout=100)
    records = list(read_records(tmp_path / "branch" / "log.jsonl"))
    actual = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert actual == {step: losses(tmp_path / "first")[step]["loss"] for step in (3, 4)}
    assert [record["at"] for record in records if record.get("event") == "began"] == [2, 3]

    never = settings(shards, tmp_path / "first", resume="never")
    assert "holds checkpoints" in run_ranks(refused, 1, never, timeout=60)[0]
    nowhere = settings(shards, tmp_path / "nowhere", resume=str(tmp_path / "nothing"))
    assert "no checkpoint there" in run_ranks(refused, 1, nowhere, timeout=60)[0]
    run_ranks(train, 1, [(settings(shards, tmp_path / "new", resume="never", steps=1), None, "")], timeout=60)
    done = settings(shards, tmp_path / "done", resume=str(tmp_path / "first"))
    assert "has 4 steps, and --training.steps 4 leaves none to train" in run_ranks(refused, 1, done, timeout=60)[0]


@pytest.mark.timeout(240)
def test_a_run_on_other_data_begins_at_step_0_with_what_another_has_learned(shards: Path, tmp_path: Path) -> None:
    from shards.manifest import load
    from tests.shards.media.noise import noise

    other = tmp_path / "shards"
    noise(other, captions=2)
    assert load(other).hash != load(shards).hash
    first, tuned = (
        settings(shards, tmp_path / "first"),
        settings(other, tmp_path / "tuned", steps=2, keep_checkpoints=9),
    )
    tuned.training.resume = str(tmp_path / "first")
    run_ranks(train, 1, [(first, None, ""), (tuned, 0, "raise")], timeout=100)
    run_ranks(train, 1, [(tuned, None, "")], timeout=100)
    assert [record["step"] for record in test_trainer.losses(tmp_path / "tuned")] == [1, 2]
    old, new = (
        load_file(tmp_path / name / "checkpoints" / step / "fragments-00000.safetensors")
        for name, step in (("first", "step-00000004"), ("tuned", "step-00000001"))
    )
    name = "master:0:model.match_head.weight"
    assert 0 < (old[name] - new[name]).abs().max() < 3e-3, "a step of warm-up away"
    ids = load_file(tmp_path / "tuned/checkpoints/step-00000001/shared.safetensors")["queue:ids"]
    assert (ids >= 0).sum() == 8, "keys of the other data were kept"
    mine = settings(shards, tmp_path / "tuned", steps=2)
    assert "was trained on other data than is there now" in run_ranks(refused, 1, mine, timeout=60)[0]
    moved = settings(other.rename(tmp_path / "moved"), tmp_path / "tuned", steps=2)
    run_ranks(train, 1, [(moved, None, "")], timeout=60)
