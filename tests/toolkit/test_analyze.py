"""The command analyze.py: results in the run folder, continued where it stopped, and errors of one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.toolkit.evaluation.test_retrieve import random_model
from toolkit import analyze
from toolkit.evaluation.perturbations.suite import Suite
from toolkit.evaluation.robustness import load_robustness

ROOT = Path(__file__).resolve().parents[2]


def robustness(run, *arguments):
    analyze.main(["robustness", "--run", str(run), *arguments])


def test_robustness_is_saved_and_printed(run, capsys):
    robustness(run, "--kinds", "white=10,0", "blur=4", "--limit", "6")
    (result,) = load_robustness(run)
    assert [(each.kind, each.level) for each in result.conditions] == [
        ("clean", None), ("white", 10.0), ("white", 0.0), ("blur", 4.0),
    ]  # fmt: skip
    assert (result.pictures, result.protocol["limit"], result.step) == (6, 6, 1234)
    assert result.augmentation == {"noise": 0.25}
    text = capsys.readouterr().out
    assert "training augmentation: noise 0.25" in text
    assert str(result.path) in text


def test_what_was_measured_stays_and_the_next_run_goes_on(run, monkeypatch):
    measure, measured = Suite.measure, []

    def stops_at_two(suite, kind, level):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(kind)
        return measure(suite, kind, level)

    monkeypatch.setattr(Suite, "measure", stops_at_two)
    with pytest.raises(KeyboardInterrupt):
        robustness(run, "--kinds", "white=0", "jpeg=5")
    (before,) = load_robustness(run)
    assert [each.kind for each in before.conditions] == ["clean", "white"]
    monkeypatch.setattr(Suite, "measure", lambda *call: measured.append(call[1]) or measure(*call))
    robustness(run, "--kinds", "white=0", "jpeg=5")
    (after,) = load_robustness(run)
    assert measured == ["clean", "white", "jpeg"], "a condition was measured twice"
    assert after.conditions[:2] == before.conditions
    monkeypatch.setattr("toolkit.analyze.load_model", None)
    robustness(run, "--kinds", "jpeg=5")  # loads no model: nothing is missing


def test_another_model_of_the_same_name_has_its_own_file(run):
    robustness(run, "--kinds", "blur=4")
    model = random_model()
    model.match_head.weight.data.mul_(2)
    model.save_pretrained(run / "export" / "best")
    robustness(run, "--kinds", "blur=4")
    assert len(load_robustness(run)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guess"], r"guess: expected one of robustness, "),
        (["robustness", "--run", "/nowhere"], r"/nowhere is not a run folder"),
        (["robustness", "--run", "RUN", "--split", "nope"], r"no split 'nope'"),
        (["robustness", "--run", "RUN", "--limit", "0"], r"--limit 0: expected"),
        (["robustness", "--run", "RUN", "--suite-seed", "-1"], r"--suite-seed -1: expected 0 or more"),
        (["robustness", "--run", "RUN", "--kinds", "echo"], r"--kinds echo: no such kind"),
        (["robustness", "--run", "RUN", "--checkpoint", "first"], r"no exported model first"),
        (["robustness", "--run", "RUN", "--noise", "/nowhere"], r"--noise /nowhere: no audio files"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        analyze.main([str(run) if word == "RUN" else word for word in arguments])
    assert "\n" not in str(caught.value)


def test_help_lists_the_analyses_without_heavy_imports():
    shown = "analyze.main(['--help']); analyze.parse_kinds([], True)"
    code = f"import sys; from toolkit import analyze; {shown}; print({{'torch', 'numpy'}} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in analyze.ANALYSES)
    assert output.strip().endswith("set()")
