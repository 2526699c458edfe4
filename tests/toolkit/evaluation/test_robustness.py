"""Files of the robustness suite: they load as they were saved, and other files are refused."""

import json
from dataclasses import asdict, replace

import pytest

from shards.errors import UserError
from toolkit.evaluation.robustness import (
    FOLDER,
    Condition,
    Robustness,
    format_robustness,
    load_robustness,
    read_robustness,
    result_name,
    save_robustness,
)


def recall(*values):
    return dict(zip(("R@1", "R@5", "R@10"), values, strict=True))


CLEAN = Condition("clean", None, None, "", None, recall(50.0, 80.0, 90.0), recall(40.0, 70.0, 80.0), 45.0)
WHITE = Condition("white", "speech", 10.0, "dB", None, recall(20.0, 50.0, 60.0), recall(10.0, 40.0, 50.0), 15.0)


def result(run, **values):
    protocol = {"limit": None, "seed": 0, "max_seconds": 60.0, "image_size": 64, "resize": "crop"}
    fixed = {"corpus": "toy", "split": "test", "manifest": "ab" * 32, "checkpoint": "best", "step": 7}
    more = {"model": "cd" * 32, "protocol": protocol, "pictures": 13, "captions": 25, "augmentation": {"noise": 0.3}}
    made = Robustness(
        **{"path": run, "run": str(run), "shards": "x", **fixed, **more, "conditions": (CLEAN,), **values}
    )
    return replace(made, path=run / FOLDER / f"{result_name(asdict(made))}.json")


def test_results_load_as_saved_beside_one_another(tmp_path):
    first = result(tmp_path)
    others = [result(tmp_path, step=8), result(tmp_path, model="ef" * 32), result(tmp_path, split="dev")]
    others += [result(tmp_path, protocol={**first.protocol, "limit": 3})]
    others += [result(tmp_path, protocol={**first.protocol, "seed": 3})]
    for each in (first, *others):
        save_robustness(each)
    assert sorted(load_robustness(tmp_path), key=str) == sorted([first, *others], key=str)
    grown = replace(first, conditions=(CLEAN, WHITE))
    save_robustness(grown)
    assert read_robustness(first.path) == grown
    assert len(load_robustness(tmp_path)) == 6
    assert json.loads(first.path.read_text())["conditions"][1]["mean_R@1"] == 15.0


def test_a_run_without_results_has_none(tmp_path):
    assert load_robustness(tmp_path) == []
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_robustness(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "conditions": [1]}', "[" * 9999])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "robustness" / "x.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json is not a result of the robustness suite"):
        load_robustness(tmp_path)


def test_table_has_levels_by_kind_and_the_change_from_clean(tmp_path):
    louder = replace(WHITE, level=0.0, mean=5.0)
    blur = replace(WHITE, kind="blur", modality="image", unit="% side")
    text = format_robustness(result(tmp_path, conditions=(CLEAN, WHITE, blur, louder)))
    lines = text.splitlines()
    assert "training augmentation: noise 0.3" in text
    assert [line.split()[:2] for line in lines[4:]] == [
        ["clean", "50.0"],
        ["white", "10"],
        ["white", "0"],
        ["blur", "10"],
    ]
    assert lines[5].split()[-2:] == ["15.0", "-30.0"]
    assert lines[4].split()[-1] == "45.0", "clean has no change"
