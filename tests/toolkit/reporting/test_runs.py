"""Which folders are runs, their order and their configurations."""

import json
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.toolkit.reporting.run_folders import write_result, write_run
from toolkit.reporting.runs import differences, group_runs, load_runs


def grid(folder: Path) -> Path:
    for name, weight in (("with", 0.2), ("alone", 0.0)):
        for seed in (0, 1):
            write_run(folder / f"{name}_seed{seed}", seed, weight)
    return folder


def test_members_in_the_order_of_submission_and_grouped_without_the_seed(tmp_path: Path) -> None:
    grid(tmp_path)
    names = ["with_seed0", "with_seed1", "alone_seed0", "alone_seed1"]
    (tmp_path / "logs/1").mkdir(parents=True)
    members = {str(n): str(tmp_path / name / "logs/1") for n, name in enumerate(names)}
    (tmp_path / "logs/1/submission.json").write_text(json.dumps({"members": members}))
    runs = load_runs([tmp_path])
    assert [run.name for run in runs] == names
    groups = group_runs(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("with", 2), ("alone", 2)]
    head, rows = differences(groups)
    assert head == ["key", "with", "alone"]
    assert rows == [["objectives.denoising.weight", "0.2", "0.0"]]
    (tmp_path / "logs/1/submission.json").write_text('{"members": [')
    assert [run.name for run in load_runs([tmp_path])] == sorted(names)


def test_runs_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place / "run")
    assert [run.name for run in load_runs([tmp_path / "a", tmp_path / "b/run"])] == ["a/run", "b/run"]
    assert len(load_runs([tmp_path / "a", tmp_path / "a/run"])) == 1


def test_the_final_evaluation_is_the_result_of_recall_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_result(run, seed=9, data="b" * 64, time=2.0)
    (one,) = load_runs([run])
    assert [evaluation.final for evaluation in one.evaluations] == [True, False]
    assert one.final is not None
    assert one.final.data == "scenes test, shards aaaaaaaa"
    changed = json.loads((run / "recall.json").read_text())
    changed["coarse"]["mean_R@1"] = 12.5
    (run / "recall.json").write_text(json.dumps(changed))
    (one,) = load_runs([run])
    assert [evaluation.final for evaluation in one.evaluations] == [False, False, True]
    assert one.final is not None
    assert one.final.result is None
    assert "checksum not recorded" in one.final.data
    for content in ("", "[1]", "{}", '{"coarse": 5}'):
        (run / "recall.json").write_text(content)
        assert load_runs([run])[0].final is None


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("none", "no such folder"), ("empty", "is not a run folder and contains none")):
        with pytest.raises(UserError, match=words) as raised:
            load_runs([tmp_path / folder])
        assert "\n" not in str(raised.value)
