"""An evaluation that is interrupted or killed leaves results whole."""

import json
import re
import subprocess
import sys

import pytest

from tests.toolkit.test_evaluate import FINAL, ROOT, results
from toolkit import evaluate
from toolkit.evaluation.results import load_results


def test_an_evaluation_that_is_interrupted_leaves_earlier_results_whole(run, monkeypatch):
    evaluate.main(["--run", str(run)])
    before = results(run)
    for place in (
        "toolkit.evaluation.results.json.dumps",
        "toolkit.evaluation.example_sheet.draw_example_sheet",
        "os.replace",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                evaluate.main(["--run", str(run), "--rerank", "3"])
        after = results(run)
        assert before.items() <= after.items()
        (result, *_) = load_results(run)
        assert len(result.ranks("speech_to_image").query) == result.report["captions"]
        assert not [path.name for path in run.rglob("*.tmp")]


KILLS = """
import os, signal, sys
from toolkit import evaluate
evaluate.main(sys.argv[1:])  # what it imports late is there before a process is forked
replace = os.replace
def killed(*paths):
    left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
for file in range(5):
    if not (child := os.fork()):
        left, os.replace = [None] * file, killed
        evaluate.main(sys.argv[1:])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, file
"""


def test_an_evaluation_that_is_killed_before_any_of_its_files_leaves_results_whole(run, monkeypatch):
    """By SIGKILL, once it has written a file and before it gives it its name."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    evaluate.main(["--run", str(run), "--split", "train"])
    evaluate.main(["--run", str(run)])
    before = results(run)
    subprocess.run([sys.executable, "-c", KILLS, "--run", str(run)], cwd=ROOT, check=True, capture_output=True)
    after = {name: content for name, content in results(run).items() if not name.endswith(".tmp")}
    assert set(after) == set(before)
    changed = {name for name in before if before[name] != after[name]}
    assert all(re.fullmatch(rf"recall\.json|{FINAL}\.json", name) for name in changed), "their times alone"
    assert json.loads((run / "recall.json").read_text())["split"] == "test"
    stored = load_results(run)
    assert [result.split for result in stored] == ["train", "test"]
    for result in stored:
        assert len(result.ranks("speech_to_image").query) == result.report["captions"]


def interrupt(*arguments, **options):
    raise KeyboardInterrupt
