"""YAML files and words of the command line, read with the scalars of YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from shards.errors import UserError
from toolkit.config.values import format_value


def read_yaml(path: Path, fractions: bool = True) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file gives an empty one.

    Args:
        path: The file.
        fractions: Read 1.10 as a float; else as the string "1.10".

    Raises:
        UserError: The file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader if fractions else _LoaderWithoutFloats)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_problem(error)}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected sections with keys, not {format_value(values)}")
    return values or {}


def parse_value(text: str, where: str) -> Any:
    """Parse a word of the command line as YAML.

    Raises:
        UserError: The word is not YAML; the message begins with `where`.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}{_problem(error)}") from None


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f" line {error.problem_mark.line + 1}: not YAML: {error.problem}"
    return f": not YAML: {' '.join(str(error).split())}"


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with the scalars of YAML 1.2 (1e-4 is a float, 24:00:00 and `no` are strings), unique keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; duplicate keys are an error."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            second = next(key for i, (key, _) in enumerate(node.value) if key.value in names[:i])
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {second.value}", second.start_mark)
        return mapping


FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$")
for tag, pattern, first in (
    ("null", re.compile(r"(~|null|)$"), ["~", "n", ""]),
    ("bool", re.compile(r"(true|false)$"), list("tf")),
    ("int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)


class _LoaderWithoutFloats(_Loader):
    """The same, with fractions as strings: as a float, 1.10 would become 1.1."""


_LoaderWithoutFloats.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
