"""Templates: values are escaped, an undefined one is an error, and an installed package has them."""

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from shards.html.render import environment, write_html

ROOT = Path(__file__).resolve().parents[3]


def test_values_are_escaped_and_undefined_ones_are_errors(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text('{% extends "base.html" %}{% block body %}{{ parts.table([one], [[one, two]]) }}{% endblock %}')
    write_html(tmp_path / "out.html", template, title="<b>", one="<i>&\"'", two="half \ud800")
    text = (tmp_path / "out.html").read_text()
    assert "<title>&lt;b&gt;</title>" in text
    assert text.count("&lt;i&gt;&amp;&#34;&#39;") == 2
    assert "half \\ud800" in text
    before = (tmp_path / "out.html").read_bytes()
    with pytest.raises(UndefinedError, match="'two' is undefined"):
        write_html(tmp_path / "out.html", template, title="", one="")
    assert (tmp_path / "out.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "page.html"]


def test_no_template_turns_escaping_off() -> None:
    for path in [*ROOT.glob("shards/**/*.html"), *ROOT.glob("toolkit/reporting/*.html")]:
        text = path.read_text()
        assert not re.search(r"\|\s*safe|autoescape|<script|https?://", text), path
    assert environment().autoescape


def test_templates_are_package_data() -> None:
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for package, globs in data.items() for one in globs for path in (ROOT / package).glob(one)}
    templates = {
        path for package in data for suffix in ("html", "yaml") for path in (ROOT / package).rglob(f"*.{suffix}")
    }
    assert len(templates) > 5
    assert templates <= packaged
