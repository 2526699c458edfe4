"""Reads the configuration: a YAML file, then `--section.key value` on top, each value checked against its type."""

import argparse
import difflib
import logging
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from shards.errors import UserError
from shards.logs import add_log_level, setup_logging
from toolkit.config.schema import RENAMED_KEYS, Config
from toolkit.config.validate import check_config

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SAVED = "config.yaml"  # in a run folder


def load_config(arguments: list[str], description: str | None = None) -> Config:
    """Read and check the configuration of an entry point that has no options of its own.

    Args:
        arguments: `--config NAME|FILE` and any number of `--section.key value`. Without `--config`, a run folder that
            holds a configuration continues with it; else it is `quickstart`.
        description: First line of `--help`.

    Raises:
        UserError: A file is missing or is not YAML; a key is unknown; a value has the wrong type or is out of range.
    """
    return parse(arguments, Parser(description))[0]


def parse(arguments: list[str], parser: "Parser") -> tuple[Config, argparse.Namespace]:
    """Read the configuration and the entry point's own options, which were added to `parser`."""
    options, rest = parser.parse_known_args(arguments)
    setup_logging(options.log_level)
    overrides = _pairs(rest)
    config = Config()
    _apply_file(config, _start(options.config, dict(overrides).get("run")))
    for key, text in overrides:
        _override(config, key, text)
    check_config(config)
    return config, options


class Parser(argparse.ArgumentParser):
    """Command line of an entry point: its own options, and every key of the configuration."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(
            description=(description or "").strip(),
            usage="%(prog)s [--config NAME|FILE] [--run DIR] [--section.key VALUE ...]",
            allow_abbrev=False,
        )
        choices = f"a YAML file, or one of: {', '.join(_names())} (default: quickstart)"
        self.add_argument("--config", metavar="NAME|FILE", help=choices)
        add_log_level(self)
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    def format_help(self) -> str:
        """Append the keys of the configuration, read from where they are defined."""
        from toolkit.config.help import describe_keys

        return f"{super().format_help()}\n{describe_keys()}"

    def error(self, message: str) -> Any:
        """Report a wrong option in one line."""
        raise UserError(message)


def apply_yaml(config: Config, path: Path) -> None:
    """Set what a YAML file says, on top of what `config` holds."""
    _apply_file(config, path)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The most similar of the valid names: by the whole, by what stands after the last dot, and by the section."""
    section, _, last = name.rpartition(".")

    def similarity(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        pairs = ((name, candidate), (last, its_last))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs) + 0.2 * (section == its_section)

    return max(valid, key=similarity)


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings key by key, at any depth; anything else is replaced."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def _names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _start(name: str | None, run: str | None) -> Path:
    """The file to begin with: the one asked for, else that of the run to be continued, else the quickstart."""
    if name is None and run is not None and (Path(run) / SAVED).is_file():
        return Path(run) / SAVED
    return _find("quickstart" if name is None else name, Path())


def _find(name: str, folder: Path) -> Path:
    """A configuration by name, or by path relative to `folder`."""
    for path in (folder / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    near, names = nearest(name, _names()), ", ".join(_names())
    raise UserError(f"configuration {name}: no such file or name; did you mean {near}? (there are {names})")


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """Split `--key value` and `--key=value` into pairs."""
    pairs, waiting = [], list(reversed(arguments))
    while waiting:
        word = waiting.pop()
        if not word.startswith("--"):
            raise UserError(f"{word}: expected --section.key VALUE; --help lists the keys")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise UserError(f"--{key} has no value")
            value = waiting.pop()
        pairs.append((key, value))
    return pairs


def _apply_file(config: Config, path: Path, heirs: tuple[Path, ...] = ()) -> None:
    """Set what a YAML file says; its `base: NAME|FILE` comes first."""
    values = current_keys(read_yaml(path), "" if path.name == SAVED else f"{path}: ")
    base = values.pop("base", None)
    if base is not None:
        parent = _find(str(base), path.parent)
        if parent in (path, *heirs):
            raise UserError(f"{path}: base {base} leads back to the file itself")
        _apply_file(config, parent, (*heirs, path))
    _apply(config, values, "", f"{path}: ")


def read_yaml(path: Path, fractions: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Args:
        path: The file.
        fractions: Read 1.10 as a number; else as the text that it is.

    Raises:
        UserError: It cannot be read, is not YAML, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader if fractions else _LoaderOfWords)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_problem(error)}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected sections with keys, not {_shown(values)}")
    return values or {}


def _override(config: Config, key: str, text: str) -> None:
    """Set one value of the command line; a key may lead into a free mapping, such as `deepspeed`."""
    section, names = config, key.split(".")
    while names and is_dataclass(getattr(section, names[0], None)):
        section = getattr(section, names.pop(0))
    kind = get_type_hints(type(section)).get(names[0]) if names else None
    value = _from_text(text, kind, f"--{key} {_shown(text)}")
    for name in reversed(key.split(".")):
        value = {name: value}
    _apply(config, current_keys(value, "--"), "", "--")


def current_keys(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Rename the keys of earlier versions.

    Args:
        values: Sections with keys, or keys with dots.
        where: What the warning, one line that names the new keys, begins with; empty: no warning.

    Returns:
        The values under today's names.
    """
    renamed: list[str] = []
    values = _renamed(values, "", renamed)
    if renamed and where:
        logger.warning("%s%s", where, "; ".join(renamed))
    return values


def _renamed(values: dict[str, Any], prefix: str, renamed: list[str]) -> dict[str, Any]:
    current = {}
    for name, value in values.items():
        key, now = f"{prefix}{name}", name
        if key in RENAMED_KEYS:
            now = ".".join([*name.split(".")[:-1], RENAMED_KEYS[key]])
            renamed.append(f"{key} is now {prefix}{now}")
        current[now] = _renamed(value, f"{key}.", renamed) if isinstance(value, dict) else value
    return current


def parse_value(text: str, where: str) -> Any:
    """A word of the command line as a YAML value.

    Raises:
        UserError: It is not YAML; `where` names the word.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}{_problem(error)}") from None


def _from_text(text: str, kind: Any, where: str) -> Any:
    """A word of the command line as a YAML value; as it stands where a string is wanted."""
    if kind is str:
        return text
    value = parse_value(text, where)
    return text if kind == str | None and value is not None else value


def _apply(section: Any, values: dict[str, Any], prefix: str, where: str) -> None:
    """Set the values of a section and of the sections in it, each checked."""
    kinds = get_type_hints(type(section))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise UserError(f"{where}{key}: unknown key; did you mean {nearest(key, _keys(Config(), ''))}?")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                inside = ", ".join(field.name for field in fields(current))
                raise UserError(f"{where}{key} is {_shown(value)}; expected a section with keys of: {inside}")
            _apply(current, value, f"{key}.", where)
            continue
        try:
            setattr(section, name, merged(current, typed(value, kinds[name])))
        except TypeError:
            raise UserError(f"{where}{key} is {_shown(value)}; expected {describe(kinds[name])}") from None


def _keys(section: Any, prefix: str) -> Iterable[str]:
    for field in fields(section):
        yield f"{prefix}{field.name}"
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")


def typed(value: Any, kind: Any) -> Any:
    """Check a value against a type of the tree: a bool is no number, a whole number is a float, and a number a string.

    Raises:
        TypeError: It does not fit.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _typed_as_one(value, inner)
    if origin is list and isinstance(value, list):
        return [typed(item, inner[0]) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise TypeError


def _typed_as_one(value: Any, kinds: Iterable[Any]) -> Any:
    """Check a value against the first of several types that it fits."""
    for kind in kinds:
        try:
            return typed(value, kind)
        except TypeError:
            continue
    raise TypeError


def describe(kind: Any) -> str:
    """Name a type of the tree as a user would write its values."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in inner)
    if origin is list:
        return f"list of {describe(inner[0])}"
    names = {bool: "true or false", dict: "mapping", types.NoneType: "null"}
    return names.get(origin, getattr(origin, "__name__", str(origin)))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f" line {error.problem_mark.line + 1}: not YAML: {error.problem}"
    return f": not YAML: {' '.join(str(error).split())}"


class _Loader(yaml.SafeLoader):
    """Safe YAML with the plain scalars of YAML 1.2: 1e-4 is a number, 24:00:00 and `no` are strings; no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a key that stands twice is a mistake."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(key for i, (key, _) in enumerate(node.value) if key.value in names[:i])
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice.value} stands twice", twice.start_mark)
        return mapping


FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$")
for tag, pattern, first in (
    ("null", re.compile(r"(~|null|)$"), ["~", "n", ""]),
    ("bool", re.compile(r"(true|false)$"), list("tf")),
    ("int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)


class _LoaderOfWords(_Loader):
    """The same, with fractions as they are written: of 1.10 the number 1.1 would be left."""


_LoaderOfWords.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
