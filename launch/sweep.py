"""Sweeps: a YAML file or `--sweep KEY=V1,V2` gives named members, each the configuration with a few values set.

    name: "{name}-m{objectives.momentum.decay}"    # default: the swept keys and their values
    base: {training.steps: 20000}                  # of all members
    list: [{name: small, model.embed_dim: 128}, {name: large, model.embed_dim: 512}]
    grid: {objectives.momentum.decay: [0.99, 0.995], seed: [0, 1]}

Every entry of `list` is combined with every combination of `grid`: 2 x 4 members here. Keys may be dotted or nested
sections.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from toolkit.config.load import apply_values, current_keys, nearest
from toolkit.config.schema import Config
from toolkit.config.yaml_files import parse_value, read_yaml

_SECTIONS = ("name", "base", "list", "grid")
_RESERVED = ("code", "logs")  # other folders in that of the grid
_MAX_NAME_LENGTH = 100  # characters of a member's name


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: Name of its run folder, within the sweep's.
        overrides: Values of the configuration by their dotted keys.
    """

    name: str
    overrides: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """Overrides as options of a command line."""
        return [f"--{key}={_text(value)}" for key, value in self.overrides.items()]


def expand(source: str | Path | Mapping[str, Any], sweeps: Iterable[str] = ()) -> list[Member]:
    """Return the members of a sweep, with unique names.

    Args:
        source: A YAML file as above, or lists of values by key, as its section `grid`.
        sweeps: Further dimensions of the grid, as `KEY=V1,V2,...`.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type, or two members have one name.
    """
    if isinstance(source, Mapping):
        where, sections = "", dict[str, Any](grid=dict(source))
    else:
        where, sections = f"{source}: ", _read(Path(source))
    grid = _columns(_flat(sections.get("grid", {}), f"{where}grid: ") | _swept(sweeps), f"{where}grid: ")
    entries = sections.get("list") or [{}]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}list: expected a list of mappings from keys to values")
    base = _checked(_flat(sections.get("base", {}), f"{where}base: "), f"{where}base: ")
    members = []
    for entry in entries:
        values = dict(entry)
        name = values.pop("name", None)
        if name is not None and not isinstance(name, str | int | float):
            raise UserError(f"{where}list: name: {name!r} is not a name")
        values = _checked(_flat(values, f"{where}list: "), f"{where}list: ")
        for combination in itertools.product(*grid.values()):
            point = dict(zip(grid, combination, strict=True))
            label = _label(sections.get("name"), name, values, point, grid, where)
            members.append(Member(label, base | values | point))
    if members == [Member("", base)] or not members:
        raise UserError(f"{where}nothing is swept: give `grid` or `list`")
    _distinct(members, where)
    return members


def _read(path: Path) -> dict[str, Any]:
    sections = read_yaml(path)
    for key in sections:
        if key not in _SECTIONS:
            near = nearest(str(key), _SECTIONS)
            raise UserError(f"{path}: {key}: unknown key; did you mean {near}? (there are {', '.join(_SECTIONS)})")
    return {key: value for key, value in sections.items() if value is not None}


def _swept(words: Iterable[str]) -> dict[str, Any]:
    """Return `KEY=V1,V2` as a list of values by key; a value with commas is given in brackets."""
    grid: dict[str, Any] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not key:
            raise UserError(f"--sweep {word}: expected KEY=V1,V2")
        if key in grid:
            raise UserError(f"--sweep {word}: {key} is swept twice")
        grid[key] = parse_value(f"[{values}]", f"--sweep {word}")
    return current_keys(grid, "--sweep ")


def _flat(tree: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as dotted keys; free mappings are kept."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}expected a mapping from keys to values, not {tree!r}")
    tree = tree if prefix else current_keys(tree, where)
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and is_dataclass(_look_up(Config(), key)):
            flat |= _flat(value, where, f"{key}.")
        else:
            flat[key] = value
    return flat


def _columns(grid: dict[str, Any], where: str) -> dict[str, list[Any]]:
    """Return the values of each key as the configuration reads them."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}{key} is {values!r}; expected a list of values")
    return {key: [_checked({key: value}, where)[key] for value in values] for key, values in grid.items()}


def _checked(overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values as the configuration reads them."""
    for key in overrides:
        if key == "run" or key.startswith("launch."):
            raise UserError(f"{where}{key}: all members are one job array with one folder: set it on the command line")
    config = Config()
    apply_values(config, overrides, where)
    return {key: _look_up(config, key) for key in overrides}


def _look_up(config: Config, key: str) -> Any:
    """Return the section or value of a dotted key, which may lead into a free mapping; None if there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
    return found


def _label(
    template: Any, name: Any, entry: dict[str, Any], point: dict[str, Any], grid: dict[str, list[Any]], where: str
) -> str:
    """Return a member's name: by the template, else the entry's name and the grid's values."""
    if template is not None:
        values = entry | point | ({} if name is None else {"name": name})
        return _clean(re.sub(r"\{([^{}]*)\}", lambda match: _filled(match[1], values, where), str(template)))
    short = _short_names([*entry, *point])
    parts = [_clean(str(name))] if name is not None else [_part(short[key], entry[key], 0) for key in entry]
    parts += [_part(short[key], value, grid[key].index(value)) for key, value in point.items()]
    return "_".join(parts)


def _filled(key: str, values: dict[str, Any], where: str) -> str:
    if key not in values:
        raise UserError(f"{where}name: {{{key}}} is not swept; there are {', '.join(values)}")
    return _text(values[key])


def _short_names(keys: list[str]) -> dict[str, str]:
    """Return the last word of each key, with as many before it as make it unique."""
    short = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            tail = words[-count:]
            if sum(other.split(".")[-count:] == tail for other in keys) == 1:
                break
        short[key] = ".".join(tail)
    return short


def _part(key: str, value: Any, number: int) -> str:
    """Return one value for a name: decay0.99, side-image; long or composite values are numbered."""
    text = _text(value)
    if isinstance(value, list | dict) or len(text) > 40:
        return f"{key}-{number}"
    return _clean(f"{key}-{text}" if isinstance(value, str | bool) else f"{key}{text}")


def _clean(text: str) -> str:
    """Replace characters that do not belong in a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")


def _text(value: Any) -> str:
    """Return a value in the command line's notation."""
    return value if isinstance(value, str) else json.dumps(value)


def _distinct(members: list[Member], where: str) -> None:
    """Check that the members' names are valid and unique."""
    seen: dict[str, Member] = {}
    for member in members:
        if not member.name or member.name in _RESERVED or len(member.name) > _MAX_NAME_LENGTH:
            raise UserError(f"{where}{member.name!r} cannot be the name of a member's folder: set `name`")
        if other := seen.get(member.name.lower()):
            same = "the same" if other.overrides == member.overrides else "different"
            problem = f"two members are called {member.name}, with {same} values"
            raise UserError(f"{where}{problem}: distinguish them by `name`")
        seen[member.name.lower()] = member
