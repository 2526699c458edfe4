"""The evaluation command: its results, their file names, and errors of one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from shards.errors import UserError
from shards.manifest import load
from shards.writing.writer import Format, write_shards
from tests.toolkit.evaluation.test_retrieve import item, random_model, settings
from toolkit import evaluate
from toolkit.evaluation.results import describe_protocol, load_results
from toolkit.run_folder import to_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_command_writes_recall_and_picture_and_prints_a_table(run, capsys):
    evaluate.main(["--run", str(run)])
    report = json.loads((run / "recall.json").read_text())
    figures = {"R@1", "R@5", "R@10"}
    assert set(report) == {
        "split", "pictures", "captions", "max_seconds", "coarse", "reranked", "twins", "shards", "checkpoint", "step",
        "run", "corpus", "manifest", "protocol", "time", "intervals", "measures", "groups",
    }  # fmt: skip
    (result,) = load_results(run)
    assert {name: value for name, value in result.report.items() if name != "ranks_sha256"} == report
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
    assert not [path.name for path in run.rglob("*") if "tmp" in path.name]


def results(run):
    """The bytes of the results in a run folder, by name."""
    paths = [run / "recall.json", run / "retrieved.png", *(run / "results").glob("*")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def moved(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    return ["--data.shards", str(tmp_path / "moved")]


def others(folder, tmp_path):
    write_shards([item(7, "other", "test")], tmp_path / "others", "toy", Format(), {})
    return ["--data.shards", str(tmp_path / "others")]


def made_again(folder, tmp_path):
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


FINAL = "toy-test-[0-9a-f]{8}-best-step-1234-rerank-4-sum-1.0s-32-crop"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], FINAL),
        (["--split", "test", "--rerank", "4", "--checkpoint", "best"], FINAL),
        (["--evaluation.batch_size", "3", "--data.workers", "0"], FINAL),
        (moved, FINAL),
        (["--data.max_seconds", "0.5"], FINAL),
        (["--split", "train"], FINAL.replace("test", "train")),
        (["--final.split", "train"], FINAL.replace("test", "train")),
        (["--rerank", "3"], FINAL.replace("rerank-4", "rerank-3")),
        (["--rerank", "0", "--checkpoint", "last"], "toy-test-[0-9a-f]{8}-last-coarse-1.0s-32-crop"),
        (["--evaluation.max_seconds", "0.5"], FINAL.replace("1.0s", "0.5s")),
        (["--evaluation.fuse", "matching"], FINAL.replace("sum", "matching")),
        (["--data.resize", "squash"], FINAL.replace("crop", "squash")),
        (others, FINAL),
        (made_again, FINAL),
    ],
)
def test_each_evaluation_has_files_of_its_own_and_the_final_one_the_plain_names(
    run, folder, tmp_path, capsys, arguments, name
):
    random_model().save_pretrained(run / "export" / "last")
    checkpoint(run, [load(folder).hash])
    evaluate.main(["--run", str(run)])
    before = results(run)
    final = [path.stem for path in (run / "results").glob("*.json")]
    assert {path.rpartition(".")[2] for path in before} == {"json", "npz", "png"}
    assert len(before) == 4
    capsys.readouterr()
    given = arguments if isinstance(arguments, list) else arguments(folder, tmp_path)
    evaluate.main(["--run", str(run), *given])
    printed, after = capsys.readouterr().out, results(run)
    if set(after) == set(before):
        assert name == FINAL
        assert arguments not in (others, made_again)
        assert f"recall: {run / 'recall.json'}\n" in printed
        assert before[f"{final[0]}.npz"] == after[f"{final[0]}.npz"], "the same evaluation has the same ranks"
        return
    assert before.items() <= after.items(), "another result was overwritten"
    new = sorted(set(after) - set(before))
    assert [path.rpartition(".")[2] for path in new] == ["json", "npz", "png"]
    assert len({path.rpartition(".")[0] for path in new}) == 1
    assert re.fullmatch(name + r"\.json", new[0])
    assert str(run / "results" / new[0]) in printed
    assert str(run / "results" / new[2]) in printed
    report = json.loads(after[new[0]])
    assert f"{report['split']}-{load(report['shards']).hash[:8]}" in new[0]


@pytest.mark.parametrize("made", [moved, others])
def test_without_a_checkpoint_training_data_is_recognized_by_location(run, folder, tmp_path, made):
    evaluate.main(["--run", str(run), *made(folder, tmp_path)])
    assert "recall.json" not in results(run)
    evaluate.main(["--run", str(run), "--data.shards", str(folder / ".." / folder.name)])
    assert "recall.json" in results(run)


def test_a_run_without_matching_is_written_to_the_plain_file_names(run, folder):
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    evaluate.main(["--run", str(run)])
    assert {"recall.json", "retrieved.png"} < set(results(run))
    assert load_results(run)[0].protocol["rerank"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "no split 'val'"),
        (["--checkpoint", "last"], "no exported model last: .* holds best"),
        (["--rerank", "-1"], "--rerank -1"),
        (["--run", "/nowhere/at/all"], "/nowhere/at/all is not a run folder"),
        (["--data.shards", "/nowhere"], "no shards in /nowhere"),
        (["--datasets", "/nowhere:dev"], "no shards in /nowhere "),
        (["--by", "age"], "--by age: expected any of speaker, language, accent, duration, words"),
        (["--by", "accent"], "--by accent: the shards state no accents of .*: only the voices of espeak-ng"),
        (["--by", "speaker"], "--by speaker: the shards state no speakers"),
        (["--out", "here"], "--out here is for --model"),
        (["--model", "/nowhere", "--out", "here", "--datasets", "d"], "--model and --run exclude each other"),
        (["--results", "/nowhere"], "--results and --compare .* take no other option"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(["--run", str(run), *arguments])
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_export_is_one_line(run):
    weights = run / "export" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded as a model") as caught:
        evaluate.main(["--run", str(run)])
    assert "\n" not in str(caught.value)
    (run / "export" / "best" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no exported model yet"):
        evaluate.main(["--run", str(run)])


def test_an_export_from_before_matching_is_not_reranked(run, folder, capsys):
    settled = settings(folder)
    settled.objectives.coarse_steps = 1234
    (run / "config.yaml").write_text(to_yaml(settled))
    reason = rf"{run} trains the matching head after step 1234 \(objectives.coarse_steps\), and best is of 1234"
    with pytest.raises(UserError, match=f"--rerank 8: {reason}"):
        evaluate.main(["--run", str(run), "--rerank", "8"])
    evaluate.main(["--run", str(run)])
    assert re.search(f"not re-ranked: {reason}", capsys.readouterr().err)
    assert json.loads((run / "recall.json").read_text())["reranked"] is None
    for changed in ({"coarse_steps": 1233}, {"resume": "another/run"}):  # whose head may have been trained
        settled.objectives.coarse_steps = changed.get("coarse_steps", 1234)
        settled.training.resume = changed.get("resume", "auto")
        (run / "config.yaml").write_text(to_yaml(settled))
        assert evaluate.read_arguments(["--run", str(run)]).rerank == 4


@pytest.mark.parametrize("trained_as", [[], ["--objectives.matching.weight", "1"]])
def test_a_run_without_matching_is_reranked_neither_by_default_nor_on_request(run, folder, capsys, trained_as):
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    command = ["--run", str(run), *trained_as]
    assert evaluate.read_arguments(command).rerank == 0
    assert f"not re-ranked: {run} trained no matching head" in capsys.readouterr().err
    assert evaluate.read_arguments([*command, "--rerank", "0"]).rerank == 0
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"--rerank 8: .* trained no matching head .*: leave --rerank out, or"):
        evaluate.read_arguments([*command, "--rerank", "8"])


def test_several_data_sets_in_one_table(run, folder, tmp_path, capsys):
    write_shards([item(n, f"other{n}", "dev") for n in range(4)], tmp_path / "others", "elsewhere", Format(), {})
    names = [str(folder), f"{folder}:train", f"{tmp_path / 'others'}:dev"]
    evaluate.main(["--run", str(run), "--datasets", *names, "--by", "words,duration"])
    printed = capsys.readouterr().out
    assert [(one.corpus, one.split) for one in load_results(run)] == [
        ("toy", "test"), ("toy", "train"), ("elsewhere", "dev"),
    ]  # fmt: skip
    for data in ("toy test", "toy train", "elsewhere dev"):
        assert printed.count(data) == 3, "coarse, re-ranked, groups"
    assert list(load_results(run)[0].report["groups"]) == ["words", "duration"]
    assert (run / "recall.json").is_file(), "the run's final evaluation was among them"
    evaluate.main(["--run", str(run), "--datasets", *names[:2], "--json"])
    assert [one["split"] for one in json.loads(capsys.readouterr().out)] == ["test", "train"]
    with pytest.raises(UserError, match="no split 'nope'"):
        evaluate.main(["--run", str(run), "--datasets", str(folder), f"{folder}:nope"])


def test_results_and_comparisons_are_shown_without_a_model(run, capsys, tmp_path):
    evaluate.main(["--run", str(run)])
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(run / "export")
    capsys.readouterr()
    evaluate.main(["--results", str(run), str(other)])
    table = capsys.readouterr().out
    assert table.count("toy test") == 4, "coarse and re-ranked of both"
    evaluate.main(["--results", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["split"] == "test"
    evaluate.main(["--compare", str(run), str(other)])
    assert "+0.00 to +0.00" in capsys.readouterr().out
    evaluate.main(["--compare", str(run), str(other), "--json"])
    assert {one["p"] for one in json.loads(capsys.readouterr().out)[0]["differences"]} == {1.0}


def test_runs_on_different_test_data_are_not_compared(run, folder, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    evaluate.main(["--run", str(run)])
    with pytest.raises(UserError, match="holds no results"):
        evaluate.main(["--compare", str(run), str(other)])
    for foreign, message in (
        (folder, "neither a run folder .* nor a folder of results"),
        ("/nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["--compare", str(run), str(foreign)])
    with pytest.raises(
        UserError, match=r"manifest\.json is not the result of an evaluation .*: name a JSON file of RUN"
    ):
        evaluate.main(["--compare", str(run), str(folder / "manifest.json")])
    evaluate.main(["--run", str(other), "--split", "train"])
    for pair in ([run, other], [next((one / "results").glob("*.json")) for one in (run, other)]):
        with pytest.raises(UserError, match="different test data") as caught:
            evaluate.main(["--compare", *map(str, pair)])
        assert "\n" not in str(caught.value)
    evaluate.main(["--run", str(other), "--rerank", "2"])
    with pytest.raises(UserError, match="no two evaluations with the same checkpoint name and protocol"):
        evaluate.main(["--compare", str(run), str(other)])


def test_protocols_stand_side_by_side(run, capsys):
    evaluate.main(["--run", str(run), "--protocols", "--rerank", "3"])
    printed = capsys.readouterr().out
    stored = load_results(run)
    # Captions are longer than the configured limit, so that full-length audio is a protocol of its own.
    assert {(one.protocol["max_seconds"], one.protocol["fuse"]) for one in stored} == {
        (seconds, fuse) for seconds in (2.0, 1.0) for fuse in ("sum", "matching")
    }
    for one in stored:
        for stage in one.stages:
            assert f"{describe_protocol(one.protocol, stage)}" in printed
    assert "(ALBEF)" in printed
    assert "(BLIP)" in printed


def test_an_exported_folder_is_evaluated_without_its_run(run, folder, tmp_path, capsys):
    export, out = run / "export" / "best", tmp_path / "out"
    evaluate.main(["--run", str(run)])
    (run / "config.yaml").unlink()
    model = ["--model", str(export), "--out", str(out), "--datasets", str(folder)]
    evaluate.main([*model, "--rerank", "4", "--evaluation.fuse", "sum"])
    (with_run,), (alone,) = load_results(run), load_results(out)
    for stage in ("coarse", "reranked"):
        timed = {"seconds_per_query": 0}
        assert with_run.report[stage] | timed == alone.report[stage] | timed
    assert alone.run == str(export)
    evaluate.main(model)
    assert load_results(out)[1].protocol["rerank"] == 0, "without a fitted weight there is no re-ranking by default"
    with pytest.raises(UserError, match="no fitted weight of the match logit, and perhaps no trained matching head"):
        evaluate.main([*model, "--rerank", "4"])
    for missing, message in (("--out", "needs --out"), ("--datasets", "needs --datasets")):
        at = model.index(missing)
        with pytest.raises(UserError, match=message):
            evaluate.main(model[:at] + model[at + 2 :])
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="foreign"):
        evaluate.main(["--model", str(tmp_path / "foreign"), *model[2:]])
