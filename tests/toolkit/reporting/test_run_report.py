"""The report of a run: curves, retrieved examples, and what of it stands in the line of an interval."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from shards.files import read_records
from shards.logs import setup_logging
from tests.distributed import run_ranks
from tests.html_page import Page
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config
from toolkit.reporting.run_report import write_report

EVIL = "</p><script>alert(1)</script>"


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "loss": loss,
        "temperature": 0.07,
        "lr": 1e-4,
        "seconds": 10.0 * number,
        "skipped": 0,
        **more,
    }


def recall(number: int, value: float) -> dict[str, Any]:
    way = {"R@1": value, "R@5": value + 1, "R@10": value + 2}
    coarse = {"speech_to_image": way, "image_to_speech": way, "mean_R@1": value, "mean_R@10": value + 2}
    return {"step": number, "dev": {"pictures": 6, "coarse": coarse, "reranked": None}}


def report(run: Path, records: list[Any]) -> Page:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    write_report(run)
    return Page(run / "report.html")


def test_curves_show_each_step_as_it_was_done_last(tmp_path: Path) -> None:
    records = [step(1, 5.0), step(2, 77777.0), '{"step": 3, "lo', recall(2, 11.5), step(2, 4.0), step(3, math.nan)]
    page = report(tmp_path, [*records, step(4, 3.0), recall(4, 12.5)])
    loss = next(str(attrs["points"]) for tag, attrs in page.tags if tag == "polyline")
    (x1, y1), (x2, y2), (x4, y4) = (map(float, point.split(",")) for point in loss.split())
    assert (x4 - x1, y2 - y1) == pytest.approx((3 * (x2 - x1), y4 - y2), abs=0.2), "steps 1, 2, 4, losses 5, 4, 3"
    assert y1 < y2 < y4
    assert "77,7" not in page.words
    text = (tmp_path / "report.html").read_text()
    assert text.count("<td>11.5<") == 2, "both ways of the evaluation of step 2"
    assert text.count("<td>12.5<") == 4, "R@1 of the one of step 4, and R@5 of the other"
    assert "step 4, 0.01 hours of training" in page.words


@pytest.mark.parametrize(("times", "words"), [(1, None), (2, "1 restart"), (4, "3 restarts")])
def test_restarts_are_counted(tmp_path: Path, times: int, words: str | None) -> None:
    page = report(tmp_path, [{"event": "began", "at": 0}] * times + [step(1, 5.0)])
    said = next(line for line in page.words.split("\n") if "hours of training" in line)
    assert ("restart" in said) == bool(words)
    assert not words or said.endswith(f", {words}")


def test_nothing_is_loaded_or_run_whatever_the_log_holds(tmp_path: Path) -> None:
    run = tmp_path / "a<b>&"
    run.mkdir()
    page = report(run, [step(1, 1.0, skipped=EVIL), {"event": "stopped by " + EVIL, "at": EVIL}, [], "null", "{"])
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "b"}
    assert not [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "onload")]
    assert "http" not in (run / "report.html").read_text().replace("http-equiv", "")
    assert EVIL in page.words


@pytest.mark.parametrize("records", [[], [step(1, 1.0)], [recall(1, 0.0)], [{"event": "saving", "seconds": 1.0}]])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path, records: list[Any]) -> None:
    assert report(tmp_path, records).words


def test_a_long_run_has_a_small_report(tmp_path: Path) -> None:
    report(tmp_path, [step(number, 1 / number) for number in range(1, 20001)])
    assert (tmp_path / "report.html").stat().st_size < 100_000


PIXEL = "data:image/jpeg;base64,AAAA"


def examples(run: Path, number: int, **query: Any) -> dict[str, Any]:
    """The record of an evaluation, and its file."""
    answers = [{"right": False, "picture": PIXEL}, {"right": True, "picture": PIXEL}]
    queries = [{"text": f"a dog of {number}", "rank": 2, "answers": answers} | query]
    name = f"examples-{number:08d}.json"
    (run / name).write_text(json.dumps({"split": "dev", "reranked": False, "queries": queries}))
    return recall(number, 1.0) | {"examples": name}


def test_examples_of_the_last_evaluation_are_shown_with_the_right_one_framed(tmp_path: Path) -> None:
    page = report(tmp_path, [examples(tmp_path, 2), examples(tmp_path, 4)])
    assert page.sources("img") == [PIXEL, PIXEL]
    assert "a dog of 4" in page.words
    assert "a dog of 2" not in page.words
    assert "rank of the correct image: 2" in page.words
    classes = [attrs.get("class") for tag, attrs in page.tags if str(attrs.get("class")).startswith("answer")]
    assert classes == ["answers", "answer", "answer right"]
    (tmp_path / "examples-00000004.json").unlink()
    write_report(tmp_path)
    assert "a dog of 2" in Page(tmp_path / "report.html").words
    (tmp_path / "examples-00000002.json").write_text('{"queries": [')
    write_report(tmp_path)
    assert "Retrieved" not in Page(tmp_path / "report.html").words


def test_examples_can_neither_load_nor_run_anything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sources = ["http://there/x.jpg", PIXEL + '" onload="alert(1)', "data:image/svg+xml;base64,AAAA", ["x"], PIXEL]
    answers = [{"right": EVIL, "picture": source} for source in sources]
    page = report(run, [examples(run, 2, text=EVIL, rank=EVIL, answers=[*answers, "x", None])])
    assert page.sources("img") == [PIXEL]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert page.words.count(EVIL) == 2
    assert "img-src data:" in (run / "report.html").read_text()
    secret = examples(tmp_path, 3)["examples"]
    for name in (f"../{secret}", str(tmp_path / secret), "config.yaml", 5):
        assert not report(run, [{"step": 3, "examples": name}]).sources("img")


def test_examples_that_are_too_large_or_no_examples_are_left_out(tmp_path: Path) -> None:
    large = examples(tmp_path, 2, text="x" * (5 << 20))
    assert "Retrieved" not in report(tmp_path, [large]).words
    for content in ("[]", "{}", '{"queries": 5}', '{"queries": [5, {}]}', "[" * 100_000):
        (tmp_path / large["examples"]).write_text(content)
        assert not report(tmp_path, [large]).sources("img")


def test_the_final_result_is_shown_once_there_is_one(tmp_path: Path) -> None:
    assert "Final evaluation" not in report(tmp_path, [step(1, 5.0)]).words
    final = recall(1, 41.5)["dev"] | {"split": "test", "captions": 12, "checkpoint": "best", "step": 1}
    bounds = {"coarse": {"mean_R@1": [40.0, 43.25]}}
    (tmp_path / "recall.json").write_text(json.dumps(final | {"intervals": bounds}))
    words = report(tmp_path, [step(1, 5.0)]).words
    for text in (
        "Final evaluation",
        "test: 6 images, 12 spoken captions; checkpoint best, step 1",
        "41.5 [40.0, 43.2]",
    ):
        assert text in words
    for content in (
        "{",
        "[]",
        "{}",
        '{"coarse": 1}',
        json.dumps(final | {"coarse": {"mean_R@1": EVIL}, "split": EVIL}),
    ):
        (tmp_path / "recall.json").write_text(content)
        assert not {tag for tag, _ in report(tmp_path, [step(1, 5.0)]).tags} & {"script", "img"}


def evaluated(rank: int, world_size: int, run: config.Config) -> str:
    setup_logging(rank=rank)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        test_trainer.train(rank, world_size, run)
    return said.getvalue()


@pytest.mark.timeout(120)
def test_a_run_writes_it_and_shows_memory_and_recall_also_after_a_restart(shards: Path, tmp_path: Path) -> None:
    run = test_trainer.settings(shards, tmp_path / "run", stop_after=3)
    run.evaluation.every = 2
    lines = [line for line in run_ranks(evaluated, 2, run, timeout=60)[0].splitlines() if line.startswith("step ")]
    assert [" GB" in line for line in lines[:3]] == [True] * 3
    assert ["dev R@1" in line for line in lines[:3]] == [False, False, True]
    assert "speech to image R@1" in Page(tmp_path / "run/report.html").words
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # and killed
    (tmp_path / "copy").mkdir()
    for name in ("log.jsonl", "examples-00000002.json"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "copy")
    write_report(tmp_path / "copy")
    pictures = Page(tmp_path / "copy/report.html").sources("img")
    assert len(pictures) == 30
    assert pictures == Page(tmp_path / "run/report.html").sources("img")
    lines = run_ranks(evaluated, 2, run, timeout=60)[0].splitlines()
    assert any(line.startswith("step 4/4") and "dev R@1" in line for line in lines)
    whole = [r for r in read_records(tmp_path / "run/log.jsonl") if "loss" in r]
    assert [r["step"] for r in whole] == [1, 2, 3, 4]
    assert all(0.05 < r["memory_gb"] < 100 for r in whole)
