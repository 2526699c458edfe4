"""Load the configuration: a YAML file, then overrides `--section.key value`, each value checked against its type.

Errors are one line with the nearest key. Libraries do not provide that: for an unknown key, tyro 1.0.17 prints a box of
9 lines and jsonargparse 4.53 a usage of 109 lines without a suggestion, and both need this module's `base:` files, YAML
1.2 scalars and renamed keys in addition. Their `--help` takes 0.31 and 0.16 s, this module's 0.2 s.
"""

import argparse
import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from shards.errors import UserError
from shards.logs import add_log_level, setup_logging
from toolkit.config.schema import RENAMED_KEYS, Config
from toolkit.config.validate import check_config
from toolkit.config.values import describe, format_value, typed
from toolkit.config.yaml_files import parse_value, read_yaml

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SAVED = "config.yaml"  # name of a run's configuration in its run folder


def load_config(arguments: list[str]) -> Config:
    """Load and validate the configuration of an entry point without further options.

    Args:
        arguments: `--config NAME|FILE` and any number of `--section.key value`. Default of `--config`: the
            configuration saved in the run folder, if there is one, else `quickstart`.

    Raises:
        UserError: A file is missing or is not YAML; a key is unknown; a value has the wrong type or is out of range.
    """
    return parse(arguments, Parser())[0]


def parse(arguments: list[str], parser: "Parser", initial: Config | None = None) -> tuple[Config, argparse.Namespace]:
    """Set up logging, and parse the configuration and the options that an entry point has added to `parser`.

    Args:
        arguments: As of `load_config`.
        parser: The entry point's.
        initial: Configuration that is used, and updated, where `--config` names no file.
    """
    options, rest = parser.parse_known_args(arguments)
    setup_logging(options.log_level)
    overrides = _split_overrides(rest)
    config = Config() if initial is None else initial
    if initial is None or options.config is not None:
        apply_yaml(config, _initial_file(options.config, dict(overrides).get("run")))
    for key, text in overrides:
        _override(config, key, text)
    check_config(config)
    return config, options


class Parser(argparse.ArgumentParser):
    """Command-line parser of an entry point: its options, and every key of the configuration."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(
            description=(description or "").strip(),
            usage="%(prog)s [--config NAME|FILE] [--run DIR] [--section.key VALUE ...]",
            allow_abbrev=False,
        )
        choices = f"a YAML file, or one of: {', '.join(_config_names())} (default: quickstart)"
        self.add_argument("--config", metavar="NAME|FILE", help=choices)
        add_log_level(self)
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    def format_help(self) -> str:
        """Append the keys of the configuration."""
        from toolkit.config.help import describe_keys

        return f"{super().format_help()}\n{describe_keys()}"

    def error(self, message: str) -> Any:
        """Raise a one-line error for a wrong option."""
        raise UserError(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the valid key most similar to `name`: similarity of the full key and its last part, same section first."""
    section, _, last = name.rpartition(".")

    def similarity(candidate: str) -> float:
        candidate_section, _, candidate_last = candidate.rpartition(".")
        pairs = ((name, candidate), (last, candidate_last))
        ratios = sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return ratios + 0.2 * (section == candidate_section)

    return max(valid, key=similarity)


def merged(base: Any, over: Any) -> Any:
    """Merge `over` into `base` recursively: mappings key by key; any other value is replaced."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def _config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _initial_file(name: str | None, run: str | None) -> Path:
    """Return the requested configuration file, else the one saved in the run folder, else the quickstart's."""
    if name is None and run is not None and (Path(run) / SAVED).is_file():
        return Path(run) / SAVED
    return _find_file("quickstart" if name is None else name, Path())


def _find_file(name: str, folder: Path) -> Path:
    """Find a configuration by path relative to `folder`, or by name."""
    for path in (folder / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    near, names = nearest(name, _config_names()), ", ".join(_config_names())
    raise UserError(f"configuration {name}: no such file or name; did you mean {near}? (available: {names})")


def _split_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """Split `--key value` and `--key=value` into pairs."""
    pairs, remaining = [], list(reversed(arguments))
    while remaining:
        word = remaining.pop()
        if not word.startswith("--"):
            raise UserError(f"{word}: expected --section.key VALUE; --help lists the keys")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[-1].startswith("--"):
                raise UserError(f"--{key} has no value")
            value = remaining.pop()
        pairs.append((key, value))
    return pairs


def apply_yaml(config: Config, path: Path, derived: tuple[Path, ...] = ()) -> None:
    """Update the configuration from a YAML file, after the file or name in its `base:`.

    Args:
        config: Updated in place.
        path: The file.
        derived: Files that lead to this one by their `base:`.
    """
    values = current_keys(read_yaml(path), "" if path.name == SAVED else f"{path}: ")
    base = values.pop("base", None)
    if base is not None:
        parent = _find_file(str(base), path.parent)
        if parent in (path, *derived):
            raise UserError(f"{path}: base {base} leads back to the file itself")
        apply_yaml(config, parent, (*derived, path))
    apply_values(config, values, f"{path}: ")


def _override(config: Config, key: str, text: str) -> None:
    """Set one value from the command line; a key may lead into a free mapping, such as `deepspeed`."""
    section, names = config, key.split(".")
    while names and is_dataclass(getattr(section, names[0], None)):
        section = getattr(section, names.pop(0))
    kind = get_type_hints(type(section)).get(names[0]) if names else None
    value = _parse_word(text, kind, f"--{key} {format_value(text)}")
    apply_values(config, current_keys({key: value}, "--"), "--")


def current_keys(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Rename keys of earlier versions, with a warning of one line that names the new keys.

    Args:
        values: Nested sections, or keys with dots.
        where: Prefix of the warning; empty: no warning.

    Returns:
        The values under the current keys.
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


def _parse_word(text: str, kind: Any, where: str) -> Any:
    """Parse a word of the command line as YAML, or keep it as it is if the key takes a string."""
    if kind is str:
        return text
    value = parse_value(text, where)
    return text if kind == str | None and value is not None else value


def apply_values(section: Any, values: dict[str, Any], where: str, prefix: str = "") -> None:
    """Check and set values of a section and its subsections.

    Args:
        section: The configuration, or a section of it; updated in place.
        values: Nested mappings, or values by keys with dots.
        where: Prefix of error messages.
        prefix: Key of the section with a dot; empty for the configuration.

    Raises:
        UserError: A key is unknown, or a value has the wrong type.
    """
    kinds = get_type_hints(type(section))
    for full_name, value in values.items():
        name, *inner_names = str(full_name).split(".")
        for inner in reversed(inner_names):
            value = {inner: value}
        key = f"{prefix}{name}"
        if name not in kinds:
            raise UserError(f"{where}{key}: unknown key; did you mean {nearest(key, _all_keys(Config(), ''))}?")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                inside = ", ".join(field.name for field in fields(current))
                raise UserError(f"{where}{key} is {format_value(value)}; expected a section with keys of: {inside}")
            apply_values(current, value, where, f"{key}.")
            continue
        try:
            setattr(section, name, merged(current, typed(value, kinds[name])))
        except TypeError:
            raise UserError(f"{where}{key} is {format_value(value)}; expected {describe(kinds[name])}") from None


def _all_keys(section: Any, prefix: str) -> Iterable[str]:
    for field in fields(section):
        yield f"{prefix}{field.name}"
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _all_keys(value, f"{prefix}{field.name}.")
