"""Findings of the check of a folder."""

from pathlib import Path

from shards import manifest
from shards.checking.check import check_folder


def problems(folder: Path, decode: int | None = None) -> list[str]:
    return [str(finding) for finding in check_folder(folder, decode).problems]


def warnings(folder: Path) -> list[str]:
    result = check_folder(folder, None)
    assert result.healthy, result.text()
    return [str(finding) for finding in result.warnings]


def data_offset(folder: Path, key: str, column: str = "image_offset") -> int:
    m = manifest.load(folder)
    return int(getattr(m, column)[m.key.tolist().index(key.encode())])


def assert_sole(lines: list[str], *parts: str) -> None:
    """There is one line, and it holds these parts."""
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]
