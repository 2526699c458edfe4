"""Text of `--help` for the configuration: every key with its type, default and the comment beside it in the source."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from shards.augment import settings
from toolkit.config import schema
from toolkit.config.values import describe


def describe_keys() -> str:
    """Format all keys, section by section."""
    files = (schema.__file__, settings.__file__)
    comments = {key: text for file in files for key, text in _field_comments(Path(file).read_text("utf-8")).items()}
    lines = _format_section(schema.Config(), "", comments)
    return "\n".join(["configuration keys, with types and defaults:", *lines, ""])


def _format_section(section: Any, prefix: str, comments: dict[tuple[str, str], str]) -> Iterator[str]:
    kinds, subsections = get_type_hints(type(section)), []
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            subsections.append((field.name, value))
            continue
        line = f"  --{prefix}{field.name} {describe(kinds[field.name])} = {_format_value(value)}"
        comment = comments.get((type(section).__name__, field.name))
        yield f"{line:<55}  # {comment}" if comment else line
    for name, value in subsections:
        yield f"\n{prefix}{name}: {(type(value).__doc__ or '').strip()}"
        yield from _format_section(value, f"{prefix}{name}.", comments)


def _format_value(value: Any) -> str:
    words = {None: "null", True: "true", False: "false", "": "''"}
    return words.get(value, str(value)) if isinstance(value, str | bool | None) else str(value)


def _field_comments(source: str) -> dict[tuple[str, str], str]:
    """Map (class, field) to the first comment on the lines of the field."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {
        (node.name, field.target.id): by_line[commented[0]]
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and (commented := [line for line in range(field.lineno, (field.end_lineno or 0) + 1) if line in by_line])
    }
