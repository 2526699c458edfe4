"""Command line and output of the benchmarks: a table, or with `--json` one JSON object per figure."""

import argparse
import json
from dataclasses import dataclass
from typing import Any


def build_parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser with `--json`, and with `--repeats` and `--threads` where a default is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    what = {"repeats": "repetitions", "threads": "number of PyTorch threads"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what[name]} (default: %(default)s)")
    return parser


@dataclass(frozen=True)
class Figure:
    """A measurement of this project (ours) against an alternative (theirs), with a bound on their ratio.

    Attributes:
        figure: Name of the figure.
        ours: Value measured for this project, in `unit`.
        theirs: Value of the alternative, in `unit`.
        unit: Unit of both values; empty for a dimensionless figure.
        ratio: Factor by which ours is better; for a figure with `at_most`, ours divided by theirs.
        what: One-line description of the comparison.
        at_least: Lower bound on the ratio.
        at_most: Upper bound on the ratio.
    """

    figure: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    what: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the ratio satisfies the bound."""
        if self.at_least is not None and not self.ratio >= self.at_least:
            return False
        return self.at_most is None or self.ratio <= self.at_most

    def json(self) -> str:
        """Return the figure as one line of JSON."""
        bound = {"at_least": self.at_least} if self.at_most is None else {"at_most": self.at_most}
        values: dict[str, Any] = {"figure": self.figure, "ours": self.ours, "theirs": self.theirs, "unit": self.unit}
        return json.dumps({**values, "ratio": self.ratio, **bound})


def table(figures: list[Figure]) -> str:
    """Return a table with one row per figure, followed by the descriptions of the comparisons."""
    rows = [("figure", "ours", "theirs", "unit", "ratio", "bound", "")]
    for one in figures:
        bound = f">= {one.at_least:g}" if one.at_most is None else f"<= {one.at_most:g}"
        verdict = "ok" if one.holds else "MISSED"
        rows.append((one.figure, f"{one.ours:.4g}", f"{one.theirs:.4g}", one.unit, f"{one.ratio:.3g}", bound, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(f"{one.figure}: {one.what}" for one in figures)])


def print_figures(figures: list[Figure], as_json: bool) -> int:
    """Print figures as a table or as JSON lines; return the exit code, 1 if a bound is missed."""
    print("\n".join(one.json() for one in figures) if as_json else table(figures))
    return 0 if all(one.holds for one in figures) else 1
