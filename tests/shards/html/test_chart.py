"""Charts: positions in proportion to the data, round ticks, a legend, and nothing that data could break."""

import math
import re

import numpy as np
import pytest

from shards.html.chart import bar_chart, format_tick, histogram, line_chart, waveform

EVIL = "</svg><script>alert(1)</script>\"'"


def points(svg: str) -> list[list[tuple[float, float]]]:
    result = re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in one.split()] for one in result]  # type: ignore[misc]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)", svg)


def test_positions_and_ticks_agree() -> None:
    svg = str(line_chart("Loss", {"a": {0: 1.0, 50: 3.0, 100: 2.0}}))
    ((x0, y0), (x1, y1), (x2, y2)) = points(svg)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.2)
    ticks = {
        float(text): float(y) for y, text in re.findall(r'<text x="[^"]*" y="([^"]*)" text-anchor="end">([\d.]+)<', svg)
    }
    assert len(ticks) >= 4
    assert (min(ticks), max(ticks)) == (1.0, 3.0)
    assert ticks[1.0] == pytest.approx(y0 + 4, abs=0.2)
    assert ticks[3.0] == pytest.approx(y1 + 4, abs=0.2)
    columns = {
        text: float(x) for x, text in re.findall(r'<text x="([^"]*)" y="[^"]*" text-anchor="middle">(\d+)<', svg)
    }
    assert columns["0"] == pytest.approx(x0, abs=0.2)
    assert columns["100"] == pytest.approx(x2, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.05, 0.0701), (1e-5, 1e-3), (-3, 7), (0, 25_031), (5, 5), (0, 0), (1e9, 3e9), (99.99, 100)],
)
def test_ticks_are_few_round_and_different(low: float, high: float) -> None:
    svg = str(line_chart("", {"a": {0: low, 1: high}}))
    labels = re.findall(r'text-anchor="end">(-?[\d.,e+-]+)<', svg)
    assert 3 <= len(labels) <= 8
    assert len(set(labels)) == len(labels)
    values = [float(label.replace(",", "")) for label in labels]
    steps = np.diff(values)
    assert steps == pytest.approx(steps[0], rel=0.02)
    mantissa = float(f"{steps[0]:.1e}".split("e")[0])
    assert mantissa in (1.0, 2.0, 5.0) or len(labels) < 4
    assert values[0] <= low + 1e-6 * abs(low)
    assert values[-1] >= high - 1e-6 * abs(high)


def test_long_curves_are_thinned_and_keep_their_last_point() -> None:
    curve = {step: float(step) for step in range(10_001)}
    (one,) = points(str(line_chart("", {"a": curve})))
    assert 300 <= len(one) <= 401
    assert one[-1][0] == pytest.approx(420, abs=0.1)
    many = points(str(line_chart("", {str(n): curve for n in range(40)})))
    assert len(many) == 40
    assert sum(map(len, many)) < 5000


def test_curves_of_a_group_share_color_and_key() -> None:
    curves = {f"{name}{seed}": {0: 1.0, 1: seed + 2.0} for name in "ab" for seed in range(3)}
    svg = str(line_chart("", curves, groups={name: name[0] for name in curves}))
    assert re.findall(r'class="key" style="--ink: var\(--c(\d)\)">(\w)', svg) == [("0", "a"), ("1", "b")]
    assert re.findall(r"<polyline[^>]*stroke: var\(--c(\d)\)", svg) == ["0", "0", "0", "1", "1", "1"]


def test_values_that_are_not_finite_are_left_out() -> None:
    svg = str(line_chart("", {"a": {0: math.nan, 1: 2.0, 2: math.inf, 3: 1.0}, "none": {0: math.nan}}))
    assert [len(one) for one in points(svg)] == [2]
    assert "nan" not in svg
    assert not line_chart("", {"a": {0: math.inf}})
    assert not line_chart("", {})
    assert not bar_chart("", {"a": {"x": math.nan}})


def test_bars_in_proportion() -> None:
    series = {"one": {"x": 50.0, "y": 25.0}, "two": {"x": 100.0}}
    svg = str(bar_chart("Recall", series))
    wide = [float(value) for value in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert wide[0] == pytest.approx(2 * wide[2], abs=0.2)
    assert wide[1] == pytest.approx(2 * wide[0], abs=0.2)
    assert {"50.0", "25.0", "100.0"} <= set(texts(svg))


def test_histogram_bars_hold_all_values() -> None:
    values = np.random.default_rng(0).normal(4, 1, 5000)
    svg = str(histogram("Duration", values, "seconds"))
    counts = [int(count.replace(",", "")) for count in re.findall(r"<title>[^<]*: ([\d,]+)</title>", svg)]
    assert sum(counts) == 5000
    high = [float(value) for value in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert np.array(high) / max(high) == pytest.approx(np.array(counts) / max(counts), abs=0.01)
    assert "seconds" in texts(svg)
    assert not histogram("", np.zeros(0))


def test_waveform_is_as_high_as_the_samples() -> None:
    wave = np.concatenate([np.full(800, 0.5), np.full(800, 0.25)]).astype(np.float32)
    high = [float(value) for value in re.findall(r'height="([\d.]+)" rx', str(waveform(wave, 16_000)))]
    assert high[0] == pytest.approx(44)
    assert high[-1] == pytest.approx(22)


def test_names_are_escaped() -> None:
    for svg in (
        line_chart(EVIL, {EVIL: {0: 1.0}}, EVIL),
        bar_chart(EVIL, {EVIL: {EVIL: 1.0}}),
        histogram(EVIL, np.arange(5), EVIL),
    ):
        assert "<script" not in svg
        assert "&lt;script" in svg


def test_format_tick() -> None:
    assert [format_tick(value, 0.5) for value in (0, 0.5, 1)] == ["0.0", "0.5", "1.0"]
    assert format_tick(0.05, 0.01) == "0.05"
    assert format_tick(25_000, 5000) == "25,000"
    assert format_tick(2e-6, 1e-6) == "2e-06"
