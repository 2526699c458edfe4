"""The evaluation command: its results, their file names, and errors of one line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shards.errors import UserError
from shards.manifest import load
from shards.writing.writer import Format, write_shards
from tests.toolkit.evaluation import test_retrieve
from tests.toolkit.evaluation.test_retrieve import CPU, item, random_model, settings
from toolkit import evaluate
from toolkit.run_folder import to_yaml

ROOT = Path(__file__).resolve().parents[2]

folder = test_retrieve.folder


@pytest.fixture
def run(folder, tmp_path):
    """A run folder as training leaves it."""
    (tmp_path / "config.yaml").write_text(to_yaml(settings(folder)))
    export = tmp_path / "export" / "best"
    random_model().save_pretrained(export)
    (export / "progress.json").write_text(json.dumps({"step": 1234}))
    return tmp_path


def test_command_writes_recall_and_picture_and_prints_a_table(run, monkeypatch, capsys):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    evaluate.main(["--run", str(run)])
    report = json.loads((run / "recall.json").read_text())
    figures = {"R@1", "R@5", "R@10"}
    assert set(report) == {
        "split", "pictures", "captions", "max_seconds", "coarse", "reranked", "twins", "shards", "checkpoint", "step",
    }  # fmt: skip
    assert (report["split"], report["checkpoint"], report["step"]) == ("test", "best", 1234)
    assert set(report["coarse"]) == {"speech_to_image", "image_to_speech", "mean_R@1"}
    assert set(report["reranked"]) == {*report["coarse"], "k", "fuse", "seconds_per_query"}
    assert set(report["coarse"]["image_to_speech"]) == set(report["reranked"]["speech_to_image"]) == figures
    assert set(report["twins"]) == {"coarse", "matching", "questions", "kinds"}
    assert set(report["twins"]["kinds"]) == {"colour", "relation"}
    with Image.open(run / "retrieved.png") as page:
        assert page.format == "PNG"
        assert page.width > 500
    printed = capsys.readouterr().out
    assert "toy test, checkpoint best (step 1,234): 13 pictures" in printed
    assert f"{report['reranked']['mean_R@1']:.1f}" in printed
    assert not [path.name for path in run.iterdir() if "tmp" in path.name]


def results(run):
    """The bytes of the results in a run folder, by name."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name.startswith(("recall", "retrieved"))}


def moved(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "moved")
    return ["--data.shards", str(tmp_path / "moved")]


def others(folder, tmp_path, monkeypatch):
    write_shards([item(7, "other", "test")], tmp_path / "others", "toy", Format(), {})
    return ["--data.shards", str(tmp_path / "others")]


def made_again(folder, tmp_path, monkeypatch):
    """Other data at the location in the run's configuration."""
    shards = tmp_path / "again"
    write_shards([item(8, "again", "test")], shards, "toy", Format(), {})
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text().replace(str(folder), str(shards)))
    return []


def checkpoint(run, data):
    """The marker of a checkpoint that was trained on some data."""
    shared = {"name": "shared.safetensors", "bytes": 0, "sha256": ""}
    state = {"format": 2, "config": "", "data": data, "files": [shared], "applied_steps": 1}
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "checkpoints/step-00000001/progress.json").write_text(json.dumps(state))


OF = r"-{}-[0-9a-f]{{8}}"


@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        ([], ""),
        (["--split", "test", "--rerank", "4", "--checkpoint", "best"], ""),
        (["--evaluation.batch_size", "3", "--data.workers", "0"], ""),
        (moved, ""),
        (["--split", "train"], OF.format("train")),
        (["--final.split", "train"], OF.format("train")),
        (["--rerank", "3"], OF.format("test") + "-rerank-3"),
        (["--rerank", "0", "--checkpoint", "last"], OF.format("test") + "-rerank-0-checkpoint-last"),
        (["--data.max_seconds", "0.5"], ""),
        (["--evaluation.max_seconds", "0.5"], OF.format("test") + "-max_seconds-0.5"),
        (["--evaluation.fuse", "matching"], OF.format("test") + "-fuse-matching"),
        (["--data.resize", "squash"], OF.format("test") + "-resize-squash"),
        (others, OF.format("test")),
        (made_again, OF.format("test")),
    ],
)
def test_only_the_final_evaluation_is_written_to_the_plain_file_names(
    run, folder, tmp_path, monkeypatch, capsys, arguments, suffix
):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    random_model().save_pretrained(run / "export" / "last")
    checkpoint(run, [load(folder).hash])
    evaluate.main(["--run", str(run)])
    before = results(run)
    assert set(before) == {"recall.json", "retrieved.png"}
    capsys.readouterr()
    given = arguments if isinstance(arguments, list) else arguments(folder, tmp_path, monkeypatch)
    evaluate.main(["--run", str(run), *given])
    printed, after = capsys.readouterr().out, results(run)
    if not suffix:
        assert set(after) == set(before)
        assert f"recall: {run / 'recall.json'}\n" in printed
        return
    assert before.items() <= after.items(), "the run's own result was overwritten"
    names = sorted(set(after) - set(before))
    for name, pattern in zip(names, (rf"recall{suffix}\.json", rf"retrieved{suffix}\.png"), strict=True):
        assert re.fullmatch(pattern, name)
        assert str(run / name) in printed
    report = json.loads(after[names[0]])
    assert f"{report['split']}-{load(report['shards']).hash[:8]}" in names[0]


@pytest.mark.parametrize("made", [moved, others])
def test_without_a_checkpoint_training_data_is_recognized_by_location(run, folder, tmp_path, monkeypatch, made):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    evaluate.main(["--run", str(run), *made(folder, tmp_path, monkeypatch)])
    assert "recall.json" not in results(run)
    evaluate.main(["--run", str(run), "--data.shards", str(folder / ".." / folder.name)])
    assert "recall.json" in results(run)


def test_a_run_without_matching_is_written_to_the_plain_file_names(run, folder, monkeypatch):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    evaluate.main(["--run", str(run)])
    assert set(results(run)) == {"recall.json", "retrieved.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "no split 'val'"),
        (["--checkpoint", "last"], "no exported model last: .* holds best"),
        (["--rerank", "-1"], "--rerank -1"),
        (["--run", "/nowhere/at/all"], "/nowhere/at/all is not a run folder"),
        (["--data.shards", "/nowhere"], "no shards in /nowhere"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(["--run", str(run), *arguments])
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_export_is_one_line(run, monkeypatch):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    weights = run / "export" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded as a model") as caught:
        evaluate.main(["--run", str(run)])
    assert "\n" not in str(caught.value)
    (run / "export" / "best" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no exported model yet"):
        evaluate.main(["--run", str(run)])


def test_a_run_without_matching_is_not_reranked(run, folder, capsys):
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    assert evaluate.read_arguments(["--run", str(run), "--rerank", "8"])[2] == 0
    assert "not re-ranked" in capsys.readouterr().err


def test_help_and_errors_need_no_torch():
    script = str(ROOT / "toolkit" / "evaluate.py")
    shown = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--rerank" in shown.stdout
    assert " torch\n" not in shown.stderr
    wrong = subprocess.run([sys.executable, script, "--run", "/nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: /nowhere")
    assert wrong.stderr.count("\n") == 1
