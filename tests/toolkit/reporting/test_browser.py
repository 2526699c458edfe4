"""The pages in headless Chromium: no errors, nothing requested, pictures load, audio plays, no wider than a phone."""

from pathlib import Path
from typing import Any

import pytest

from shards.checking.check import check_folder
from shards.checking.page import write_page
from tests.shards.checking import damage
from tests.toolkit.browser import CHROMIUM
from tests.toolkit.reporting.browser import look
from tests.toolkit.reporting.run_folders import write_baseline, write_inside, write_run
from toolkit import analyze, report
from toolkit.reporting.run_report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WIDTHS = pytest.mark.parametrize(("width", "dark"), [(1300, False), (400, True)])


def assert_sound(seen: dict[str, Any], pictures: int, audio: int) -> None:
    assert not seen["errors"]
    assert not seen["requests"]
    assert (len(seen["pictures"]), len(seen["played"])) == (pictures, audio)
    assert all(width > 0 for width in seen["pictures"])
    assert all(seconds > 0.05 for seconds in seen["played"])
    assert seen["wide"] <= 0


@WIDTHS
def test_the_report_of_several_runs(tmp_path: Path, width: int, dark: bool) -> None:
    runs = [write_run(tmp_path / "whole"), write_run(tmp_path / "less", denoising=0.0)]
    write_baseline(runs[0])
    write_inside(runs[1])
    report.main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    assert_sound(look(tmp_path / "page.html", width, dark, tmp_path), 6, 2)


def test_the_page_of_analyze_inside(run: Path) -> None:
    """Eight captions with attention, eight hardest captions, and six pictures with three captions each."""
    analyze.main(["inside", "--run", str(run), "--limit", "6"])
    (page,) = run.glob("inside/*/inside.html")
    seen = look(page, 400, False, run)
    assert_sound(seen, len(seen["pictures"]), 8 + 8 + 3 * 6)
    assert len(seen["pictures"]) >= 8 + 8 * 5 + 6


def test_the_report_of_a_run(tmp_path: Path) -> None:
    write_report(write_run(tmp_path / "run"))
    assert_sound(look(tmp_path / "run/report.html", 400, False, tmp_path), 2, 1)


@pytest.mark.parametrize("codec", ["flac", "wav", "opus"])
def test_the_page_of_check_shards(tmp_path: Path, codec: Any) -> None:
    folder = damage.write(tmp_path / "shards", codec=codec)
    write_page(tmp_path / "page.html", check_folder(folder, 0), ["an advice " * 20])
    assert_sound(look(tmp_path / "page.html", 400, False, tmp_path), 11, 22)


def test_what_is_broken_is_noticed(tmp_path: Path) -> None:
    """Of this test's own means: a script and an address outside are errors, a damaged picture and recording too."""
    text = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:">
      <script>alert(1)</script><img src="http://192.0.2.1/x.png"><img src="data:image/png;base64,AAAA">
      <audio src="data:audio/ogg;base64,AAAA"></audio><div style="width: 900px">wide</div>"""
    (tmp_path / "page.html").write_text(text)
    seen = look(tmp_path / "page.html", 400, False, tmp_path)
    assert len(seen["errors"]) >= 2
    assert seen["pictures"] == [0, 0]
    assert seen["played"] == [-1]
