"""Charts as SVG with axes, ticks and a legend: curves over one another, bars, histograms, waveforms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from shards.html.render import render_macro

_WIDTH, _BOTTOM, _TOP = 420, 170, 8  # of the plotting area, in pixels at full width
_POINTS, _ALL_POINTS = 400, 4000  # of a curve and of a chart, at most
_DOTS = 25  # a curve with no more points than this has each of them marked
_BINS = 30
_COLORS = 8
_CHARACTER = 6.2  # width of a character in pixels, on average
_WAVE = (300, 44)  # width and height of a waveform


@dataclass(frozen=True)
class _Axis:
    """A scale from data to pixels, and its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    step: float

    def pixel(self, value: float) -> float:
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)

    def labels(self) -> list[tuple[float, str]]:
        return [(self.pixel(tick), format_tick(tick, self.step)) for tick in self.ticks]


def line_chart(
    title: str,
    curves: Mapping[str, Mapping[float, float]],
    x: str = "step",
    groups: Mapping[str, str] | None = None,
) -> Markup:
    """Draw curves on one scale.

    Args:
        title: Title, with the unit of the values.
        curves: Value by position of each curve, by its name; values that are not finite are left out.
        x: What the positions are, with their unit.
        groups: Name of each curve's group; curves of a group have one color and one entry in the legend.

    Returns:
        The chart; empty if there is no value.
    """
    kept = {name: _thin(curve, max(50, min(_POINTS, _ALL_POINTS // len(curves)))) for name, curve in curves.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Markup("")
    across = [point[0] for points in kept.values() for point in points]
    up = _axis([point[1] for points in kept.values() for point in points], _BOTTOM, _TOP, 5, to_ticks=True)
    left = _left(up)
    along = _axis(across, left, _WIDTH, 6)
    series = []
    group_of = groups or {name: name for name in curves}
    keys = {group: _key(group, n) for n, group in enumerate(dict.fromkeys(group_of[name] for name in curves))}
    for name, points in kept.items():
        placed = [(along.pixel(a), up.pixel(b)) for a, b in points]
        texts = [f"{x} {a:,.6g}: {b:.5g}" for a, b in points]
        dots = [(*dot, text) for dot, text in zip(placed, texts, strict=True)]
        series.append(
            {
                **keys[group_of[name]],
                "name": name,
                "path": " ".join(f"{a},{b}" for a, b in placed),
                "dots": dots if len(dots) <= _DOTS else dots[-1:],
            }
        )
        if groups is None:
            keys[name]["last"] = f"{points[-1][1]:.4g}"
    shown = [keys[group] for group in dict.fromkeys(group_of[name] for name in kept)]
    chart = {**_frame(title, x, left, along, up), "series": series, "keys": shown}
    return render_macro("chart.html", "lines", chart)


def histogram(title: str, values: np.ndarray, unit: str = "") -> Markup:
    """Draw a histogram: a bar per value for integers of a small range; the last bar includes the largest 0.1 %."""
    if not len(values):
        return Markup("")
    low, high = float(values.min()), float(np.quantile(values, 0.999))
    counted = values.dtype.kind == "i" and high - low < _BINS
    edges = np.arange(low - 0.5, high + 1.5) if counted else np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    up = _axis([0.0, float(counts.max())], _BOTTOM, _TOP, 4, to_ticks=True, integer=True)
    left = _left(up)
    along = _axis([float(edges[0]), float(edges[-1])], left, _WIDTH, 6, integer=counted)
    bars = []
    for n, count in enumerate(counts.tolist()):
        if count:
            begin, end, top = along.pixel(edges[n]), along.pixel(edges[n + 1]), up.pixel(count)
            label = f"{max(edges[n], 0):.4g} to {edges[n + 1]:.4g}: {count:,}"
            bars.append((begin + 0.5, top, round(max(1.0, end - begin - 1), 1), round(_BOTTOM - top, 1), label))
    note = f"median {np.median(values):.4g}, mean {values.mean():.4g}, largest {values.max():.4g}"
    chart = {**_frame(title, unit, left, along, up), "bars": bars, "note": note}
    return render_macro("chart.html", "histogram", chart)


def bar_chart(title: str, series: Mapping[str, Mapping[str, float]]) -> Markup:
    """Draw horizontal bars, those of one category beside one another.

    Args:
        title: Title, with the unit of the values.
        series: Value, at least 0, by category, by name of the series.

    Returns:
        The chart; empty if there is no value.
    """
    values = [value for one in series.values() for value in one.values() if math.isfinite(value)]
    if not values:
        return Markup("")
    categories = list(dict.fromkeys(category for one in series.values() for category in one))
    left = min(150.0, 12 + _CHARACTER * max(map(len, categories)))
    along = _axis([0.0, max(values)], left, _WIDTH - 40, 5, to_ticks=True)
    thick = 14 if len(series) == 1 else 9
    row = thick * len(series) + 8
    room = int((left - 12) / _CHARACTER)
    labels, bars = [], []
    for index, category in enumerate(categories):
        short = category if len(category) <= room else category[: room - 1] + "\u2026"
        labels.append((index * row + row / 2 + 4, short, category))
        for number, (name, one) in enumerate(series.items()):
            if category not in one or not math.isfinite(one[category]):
                continue
            end = along.pixel(one[category])
            bars.append(
                {
                    "y": index * row + 4 + thick * number,
                    "high": thick - 1,
                    "middle": index * row + 4 + thick * number + thick / 2,
                    "wide": round(end - left, 1),
                    "color": number % _COLORS,
                    "end": end + 4,
                    "value": f"{one[category]:.1f}",
                    "label": f"{category}, {name}: {one[category]:.4g}",
                }
            )
    chart = {"title": title, "width": _WIDTH, "bottom": len(categories) * row, "left": left, "labels": labels}
    keys = [_key(name, number) for number, name in enumerate(series)]
    return render_macro("chart.html", "bars", chart | {"columns": along.labels(), "bars": bars, "series": keys})


def waveform(wave: np.ndarray, rate: int) -> Markup:
    """Draw the envelope of a waveform: a bar per interval, as high as its largest sample."""
    width, height = _WAVE
    starts = np.unique(np.linspace(0, len(wave) - 1, width // 3, endpoint=False).astype(int))
    peaks = np.maximum.reduceat(np.abs(wave), starts)
    tall = np.maximum(1.0, height * np.minimum(1.0, peaks / max(float(peaks.max()), 0.05)))
    bars = [(3 * n, round((height - high) / 2, 1), round(high, 1)) for n, high in enumerate(tall.tolist())]
    return render_macro("chart.html", "waveform", width, height, bars, f"{len(wave) / rate:.2f}")


def format_tick(value: float, step: float) -> str:
    """Format a tick with the decimals that its distance to the next one needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 4 or abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.{decimals}f}"


def _thin(curve: Mapping[float, float], count: int) -> list[tuple[float, float]]:
    """Sort the finite points of a curve by position, and keep about `count` of them and the last."""
    points = sorted((x, y) for x, y in curve.items() if math.isfinite(x) and abs(y) < 1e100)
    every = -(-len(points) // count) or 1
    return [*points[:-1:every], *points[-1:]]


def _axis(
    values: Sequence[float], start: float, end: float, count: int, to_ticks: bool = False, integer: bool = False
) -> _Axis:
    """Return an axis over values, with about `count` ticks at round numbers; `to_ticks`: from tick to tick."""
    low, high = float(min(values)), float(max(values))
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = (0.0, 1.0) if not low else (low - abs(low) / 10, high + abs(high) / 10)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    step = max(1.0, step) if integer else step
    if to_ticks:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Axis(low, high, start, end, [tick * step for tick in range(first, last + 1)], step)


def _left(axis: _Axis) -> float:
    """Room for the labels of a vertical axis."""
    return round(10 + _CHARACTER * max(len(label) for _, label in axis.labels()), 1)


def _key(name: str, number: int) -> dict[str, object]:
    return {"name": name, "color": number % _COLORS, "dashed": number >= _COLORS, "last": ""}


def _frame(title: str, x: str, left: float, along: _Axis, up: _Axis) -> dict[str, object]:
    columns, rows = along.labels(), up.labels()
    return {
        "title": title, "x": x, "left": left, "width": _WIDTH, "bottom": _BOTTOM, "columns": columns, "rows": rows
    }  # fmt: skip
