"""Captions in English."""

from shards.corpora.languages.grammar import Language, mirrored


def _noun_phrase(colour: str, shape: str, size: str, definite: bool) -> str:
    name = f"{size} {colour} {shape}" if size else f"{colour} {shape}"
    if definite:
        return f"the {name}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


ENGLISH = Language(
    vertical=(
        "{a} above {b}",
        "{a} over {b}",
        "{A} is above {B}",
        "{a} with {b} below it",
        "{b} below {a}",
        "{b} under {a}",
        "{B} is under {A}",
        "{b} with {a} above it",
        "above {B} is {a}",
        "below {A} is {b}",
    ),
    horizontal=mirrored(
        {"left": "right"},
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{A} is left of {B}",
        "{a} with {b} on its right",
        "left of {B} is {a}",
    ),
    sides={"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"},
    conjunction="and",
    noun_phrase=_noun_phrase,
)
