"""Values of the configuration: checked against the types of the schema, and described in the words of YAML."""

import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin


def typed(value: Any, kind: Any) -> Any:
    """Check a value against a type of the schema, and convert an int to a float or a number to a str where needed.

    Raises:
        TypeError: The value does not fit the type; a bool is not a number.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _typed_as_any(value, inner)
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


def _typed_as_any(value: Any, kinds: Iterable[Any]) -> Any:
    """Check a value against the members of a union, in order."""
    for kind in kinds:
        try:
            return typed(value, kind)
        except TypeError:
            continue
    raise TypeError


def describe(kind: Any) -> str:
    """Describe a type of the schema in the words of YAML."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in inner)
    if origin is list:
        return f"list of {describe(inner[0])}"
    names = {bool: "true or false", dict: "mapping", types.NoneType: "null"}
    return names.get(origin, getattr(origin, "__name__", str(origin)))


def format_value(value: Any) -> str:
    """Format a value for a message, with its type and at most 60 characters."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
