"""Packages import in one direction: training, evaluation, model, then objectives and configuration."""

import ast
from pathlib import Path

import pytest

TOOLKIT = Path(__file__).parents[3] / "toolkit"
FORBIDDEN = {
    "evaluation": ("training",),
    "model": ("training", "evaluation"),
    "objectives": ("training", "evaluation", "model"),
    "config": ("training", "evaluation", "model", "objectives"),
}


def imported(path):
    """Full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package):
    files = sorted((TOOLKIT / package).rglob("*.py"))
    assert files
    for path in [*files, *([TOOLKIT / "evaluate.py"] if package == "evaluation" else [])]:
        for name in imported(path):
            assert not name.startswith(tuple(f"toolkit.{other}" for other in FORBIDDEN[package])), f"{path}: {name}"
            assert not name.startswith("launch"), f"{path}: {name}"
