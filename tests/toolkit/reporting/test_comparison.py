"""The page about several runs: what it shows, what it says is missing, and that nothing in it can run or load."""

import json
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.html_page import Page
from tests.toolkit.evaluation import test_robustness
from tests.toolkit.reporting.run_folders import (
    write_baseline,
    write_examples,
    write_inside,
    write_result,
    write_run,
)
from toolkit import report
from toolkit.evaluation.robustness import Condition, save_robustness
from toolkit.reporting import published

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "page.html"
    report.main([*map(str, folders), "--out", str(out)])
    return Page(out)


def write_robustness(run: Path, **more: object) -> None:
    def condition(kind: str, level: float | None, mean: float) -> Condition:
        ways = {"R@1": mean, "R@5": 90.0, "R@10": 95.0}
        modality, unit = (None, "") if level is None else ("speech", "dB")
        return Condition(kind, modality, level, unit, None, ways, ways, mean)

    measured = (condition("clean", None, 57.5), condition("white", 20.0, 43.25), condition("white", 0.0, 11.5))
    values = {"corpus": "scenes", "augmentation": {"babble": 0.5}, "conditions": measured}
    save_robustness(test_robustness.result(run, **values | more))


def test_everything_that_was_measured_is_shown(tmp_path: Path) -> None:
    bounds = {"R@1": [40.25, 61.75]}
    groups = {"speaker": {"anna": {"captions": 12, "speech_to_image": {"R@1": 33.3}}}}
    more = {"intervals": {"coarse": {"speech_to_image": bounds}}, "groups": groups}
    runs = [write_run(tmp_path / "whole", **more), write_run(tmp_path / "less", denoising=0.0, hits=0.3)]
    write_robustness(runs[0])
    page = page_of(*runs)
    for words in ("whole", "less", "[40.2, 61.8]", "re-ranking, whole", "less against whole, coarse"):
        assert words in page.words
    for words in (
        "objectives.denoising.weight",
        "white 20 dB",
        "43.2 (-14.2)",
        "babble 0.5",
        "anna (12)",
        "a red cross",
    ):
        assert words in page.words
    loss = next(attributes for tag, attributes in page.tags if attributes.get("aria-label") == "Loss")
    assert loss["role"] == "img"
    assert len(page.sources("audio")) == 2
    assert len(page.sources("img")) == 2 * (2 + 1)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"][:2] == ["#results", "#ablation"]
    identifiers = {attributes.get("id") for _, attributes in page.tags}
    assert all(str(a["href"])[1:] in identifiers for tag, a in page.tags if tag == "a")


def test_published_results_stand_beside_the_same_test_set_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "flickr", corpus="flickr8k")
    assert "MILAN" not in page_of(run).words, "30 images are not the 1,000 of the test set"
    monkeypatch.setattr("tests.toolkit.reporting.run_folders.PICTURES", 1000)
    page = page_of(write_run(tmp_path / "large", corpus="flickr8k"))
    for words in ("MILAN (arXiv 2104.01894)", "published", "33.2", "arXiv 2210.00705", "not measured here (table of"):
        assert words in page.words
    rows = [attributes for tag, attributes in page.tags if tag == "tr" and attributes.get("class") == "published"]
    assert len(rows) == len(published.published_results("flickr8k", "test", 1000)) == 7
    assert "MILAN" not in page_of(write_run(tmp_path / "scenes")).words
    for corpus, split in (("flickr8k", "dev"), ("scenes", "test"), ("spokencoco", "test")):
        assert not published.published_results(corpus, split, 1000)


def test_published_figures_are_complete_and_plausible() -> None:
    for corpus, pictures in (("flickr8k", 1000), ("spokencoco", 5000)):
        for one in published.published_results(corpus, "test", pictures):
            assert one.source
            assert one.protocol
            for direction in ("speech_to_image", "image_to_speech"):
                figures = [value for value in one.recall[direction].values() if value is not None]
                assert figures == sorted(figures)
                assert all(0 < value < 100 for value in figures)
    # Means as the source of these figures gives them.
    means = {one.name: one.recall["mean_R@1"] for one in published.published_results("flickr8k", "test", 1000)}
    assert means["SpeechCLIP, parallel large (arXiv 2210.00705)"] == pytest.approx(46.8)
    assert means["MILAN (arXiv 2104.01894)"] == pytest.approx(41.4)
    assert means["CLIP ViT-L/14 on written captions"] is None


def test_baselines_by_text_are_no_results_of_the_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    alone = page_of(run).words
    assert "Baselines by text" not in alone
    write_baseline(run)
    words = page_of(run).words
    own, baselines = words.split("Baselines by text")
    for cell in ("asr-tiny", "some-clip", "12.3"):
        assert cell in baselines
        assert cell not in own
    assert own == alone[: len(own)], "the model's own results have changed"
    assert baselines.index("asr-tiny") < baselines.index("Configurations over seeds")
    assert baselines[baselines.index("Configurations over seeds") :] in alone, "a baseline is in another section"
    write_baseline(run, checkpoint="limited", baseline={"text": "oracle-text", "clip": "c", "limit": 9})
    whole, part = page_of(run).words.split("scenes test, shards aaaaaaaa, 9 of its images")
    assert "asr-tiny" in whole
    assert "oracle-text" not in whole
    assert "oracle-text" in part
    for result in (run / "results").glob("*best*"):
        result.unlink()
    assert "Without stored results, and so without intervals and tests: run" in page_of(run).words


def test_what_is_inside_is_shown_with_the_place_of_its_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "analyze.py inside --run" in page_of(run).words
    write_inside(run)
    page = page_of(run)
    for words in ("centroids 0.625 apart", "image tokens: cosine loss", str(run / "inside/one/inside.html")):
        assert words in page.words
    charts = {str(attributes.get("aria-label")) for tag, attributes in page.tags if tag == "svg"}
    assert {"pairs by cosine, percent", "image tokens: cosine loss"} < charts
    write_inside(run, denoising={"reason": "no checkpoint"})
    assert "Denoising was not measured: no checkpoint" in page_of(run).words
    for damaged in ({"gap": {}}, {"similarity": {"edges": [0]}}, {"denoising": {"image": 5}}, {"ranks": [3]}):
        write_inside(run, **damaged)
        with pytest.raises(UserError, match=r"inside\.json is damaged \(.*\): repeat analyze\.py inside"):
            page_of(run)


def test_curves_of_robustness_have_the_clean_level(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ways = {"R@1": 40.0, "R@5": 90.0, "R@10": 95.0}
    clean = Condition("clean", None, None, "", None, ways | {"R@1": 80.0}, ways | {"R@1": 90.0}, 85.0)
    slow, fast = (Condition("speed", "speech", level, "x", None, ways, ways, 40.0) for level in (0.7, 1.3))
    white = [Condition("white", "speech", level, "dB", None, ways, ways, 40.0) for level in (0.0, 20.0)]
    write_robustness(run, conditions=(clean, slow, fast, *white))
    titles = page_of(run).words
    assert "speech to image, x 1: 80" in titles
    assert "image to speech, x 1: 90" in titles
    assert "speech to image, dB 20: 40" in titles
    assert "dB inf" not in titles, "no ratio is clean"


def test_different_test_data_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "other", denoising=0.0, data="b" * 64)]
    words = page_of(*runs).words
    assert words.count("These tables are of different test data") == 2
    assert "scenes test, shards aaaaaaaa" in words
    assert "scenes test, shards bbbbbbbb" in words
    assert "different test data" not in page_of(runs[0]).words


def test_what_is_missing_has_a_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in [*(run / "results").iterdir(), run / "examples-final.json", run / "retrieved.png", run / "log.jsonl"]:
        path.unlink()
    words = page_of(run).words
    assert "Without a log of training: run." in words
    commands = ("evaluate.py --run", "analyze.py robustness --run", "--by speaker", "submit.py --config NAME")
    assert all(command in words for command in commands)
    (run / "recall.json").unlink()
    (run / "log.jsonl").write_text("")
    assert "not evaluated" in page_of(run).words


def test_nothing_is_loaded_or_run_whatever_the_files_hold(tmp_path: Path) -> None:
    groups = {EVIL: {EVIL: {"captions": EVIL, "speech_to_image": {"R@1": 5.0}}}, "odd": [1], "x": {"y": EVIL}}
    run = write_run(tmp_path / "a<b>&", corpus=EVIL, checkpoint=EVIL, groups=groups, intervals={"coarse": EVIL})
    write_robustness(run, corpus=EVIL, augmentation={EVIL: 0.5})
    write_baseline(run, data="b" * 64, baseline={"text": EVIL, "clip": EVIL, "word_error_rate": EVIL}, pictures=EVIL)
    write_inside(run, corpus=EVIL, checkpoint=EVIL, denoising={"reason": EVIL})
    record = {"step": 9, "loss": 1e999, EVIL: 1.0, "event": EVIL, "examples": "../secret.json"}
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + '\n{"step": 1' + "0" * 400 + ', "loss": 1' + "0" * 400 + "}\n[]\n")
    picture = "data:image/svg+xml;base64,AAAA"
    write_examples(run, text=EVIL, rank=EVIL, audio="http://there/a.ogg", answers=[{"picture": picture, "right": 1}])
    (run / "retrieved.png").write_bytes(b"<svg onload=alert(1)>")
    page = page_of(run)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "audio", "link", "iframe"}
    assert not [one for _, attributes in page.tags for one in attributes if one.startswith("on")]
    assert all(str(a["href"]).startswith("#") for _, a in page.tags if "href" in a)
    assert page.words.count(EVIL) > 5
    policy = next(str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_many_runs_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    for seed in range(12):
        run = write_run(tmp_path / "grid" / f"run_seed{seed}", seed)
        records = [{"step": n, "loss": 1 / n, "contrastive": 1 / n, "seconds": 1.0} for n in range(1, 4000)]
        (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report.main([str(tmp_path / "grid")])
    page = tmp_path / "grid/results.html"
    assert page.stat().st_size < 600_000
    assert len(Page(page).sources("audio")) == 1, "one run of a configuration"


def test_markdown_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "whole"), write_run(tmp_path / "less", denoising=0.0)]
    report.main([*map(str, runs), "--markdown", "--baseline", "less"])
    out = capsys.readouterr().out
    assert out.startswith("Test data: scenes test, shards aaaaaaaa.")
    assert "| whole against less, coarse |" in out
    assert not list(tmp_path.rglob("*.html"))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot write .*nowhere/page\.html: No such file"):
        report.main([str(run), "--out", str(tmp_path / "nowhere/page.html")])
    write_result(run, data="b" * 64)
    next((run / "results").glob("*bbbbbbbb*.json")).write_text("{")
    with pytest.raises(UserError, match="is not the result of an evaluation"):
        report.main([str(run)])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "bare/log.jsonl").touch()
    with pytest.raises(UserError, match="no run was evaluated yet"):
        report.main([str(tmp_path / "bare"), "--markdown"])
