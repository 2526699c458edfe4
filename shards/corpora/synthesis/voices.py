"""The voices of the scenes: from names on the command line to those that speak training, and those held out for tests.

An entry of `--voices` and `--test-voices` is a voice, a pattern (`*+f1`, `en-gb-*`), `all` (of espeak-ng) or a number
(the first so many of espeak-ng); `=SHARE` after it is the share of its language's captions that its voices speak.
"""

import argparse
import difflib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

import numpy as np

from shards.corpora.synthesis import espeak, piper
from shards.errors import UserError

Synthesize = Callable[[], tuple[np.ndarray, int]]  # returns samples float32 [1, n], and their rate in Hz

_ALL = "all"


@dataclass(frozen=True)
class Voices:
    """The voices that speak one language, and how often."""

    names: tuple[str, ...]  # voices that are equally probable; they speak what the others leave
    shares: tuple[tuple[str, float], ...] = ()  # probabilities of the other voices

    def draw(self, generator: random.Random) -> str:
        """Draw a voice; without shares, one number is drawn from the stream."""
        if self.shares:
            drawn = generator.random()
            for name, share in self.shares:
                drawn -= share
                if drawn < 0:
                    return name
            if not self.names:  # the shares add up to 1 but for rounding
                return self.shares[-1][0]
        return self.names[generator.randrange(len(self.names))]


def synthesizer_of(text: str, voice: str, words_per_minute: int, pitch: int) -> Synthesize:
    """Return a picklable function that synthesizes a sentence; piper's voices have a pitch of their own."""
    if voice in piper.VOICES:
        return partial(piper.speak, text, voice, words_per_minute)
    return partial(espeak.speak, text, voice, words_per_minute, pitch)


def voice_languages(languages: Sequence[str], with_piper: bool = True) -> dict[str, str]:
    """Return the language of each voice of some languages, by its name; the voices of piper are last."""
    names = {name: language for language in languages for name in espeak.voices_of(language)}
    if with_piper and piper.LANGUAGE in languages:
        names |= dict.fromkeys(piper.VOICES, piper.LANGUAGE)
    return names


@lru_cache(maxsize=8)
def parse_voices(
    voices: int | str, test_voices: str | None, languages: tuple[str, ...]
) -> dict[tuple[str, bool], Voices]:
    """Return the voices of each language in training (False) and in the other splits (True).

    Args:
        voices: Value of `--voices`.
        test_voices: Value of `--test-voices`, which training does not use; None: all splits have the same voices.
        languages: Codes of the languages.

    Raises:
        UserError: A voice is unknown, a share is invalid, or a language is left without voices.
    """
    training = _parse("--voices", str(voices), languages)
    tests = training if test_voices is None else _parse("--test-voices", test_voices, languages)
    if test_voices is not None:
        training = {name: share for name, share in training.items() if name not in tests}
    language_of = voice_languages(languages)
    chosen = {}
    for option, held_out, parsed in (("--voices", False, training), ("--test-voices", True, tests)):
        for language in languages:
            own = {name: share for name, share in parsed.items() if language_of[name] == language}
            chosen[language, held_out] = _voices(option, language, own)
    return chosen


def check_installed(chosen: Iterable[Voices]) -> None:
    """Find the synthesizers and the models of voices.

    Raises:
        UserError: One is not installed.
    """
    for name in {name: None for voices in chosen for name in (*voices.names, *dict(voices.shares))}:
        if name in piper.VOICES:
            piper.find_voice(name)
        else:
            espeak.find_library()


def _parse(option: str, value: str, languages: Sequence[str]) -> dict[str, float | None]:
    """Return the named voices and their shares; None: an equal part of what the others leave."""
    language_of = voice_languages(languages)
    shares: dict[str, float | None] = {}
    for entry in value.split(","):
        name, equals, share = (part.strip() for part in entry.partition("="))
        names = _matching(option, name, languages)
        if not equals:
            shares |= dict.fromkeys(one for one in names if one not in shares)
            continue
        total = _share(option, entry, share)
        for language in languages:
            own = [one for one in names if language_of[one] == language]
            shares |= {one: total / len(own) for one in own}
    return shares


def _matching(option: str, name: str, languages: Sequence[str]) -> list[str]:
    """Return the voices that one entry names."""
    of_espeak = voice_languages(languages, with_piper=False)
    if name == _ALL:
        return list(of_espeak)
    if name.isdecimal() and int(name) > 0:
        return [one for language in languages for one in espeak.voices_of(language)[: int(name)]]
    known = voice_languages(languages) if name.startswith("piper:") else of_espeak
    if name in known:
        return [name]
    if matching := [one for one in known if fnmatchcase(one, name)]:
        return matching
    everywhere = voice_languages(tuple(espeak.ACCENTS))
    if name in everywhere:
        raise UserError(
            f"{option}: {name} speaks {everywhere[name]}, which is not among --languages {','.join(languages)}"
        )
    nearest = difflib.get_close_matches(name, everywhere, 4, 0) or ["en-us"]
    raise UserError(
        f"{option}: there is no voice {name!r}; the nearest are {', '.join(nearest)} (--list-voices prints all "
        f"{len(everywhere):,})"
    )


def _share(option: str, entry: str, share: str) -> float:
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"{option}: {entry.strip()!r}: give a share above 0 and up to 1, as in piper:joe=0.2")
    return value


def _voices(option: str, language: str, shares: dict[str, float | None]) -> Voices:
    if not shares:
        raise UserError(f"{option}: no voice of language {language} is left: name one, such as {language}* or *+f1")
    equal = tuple(name for name, share in shares.items() if share is None)
    other = tuple((name, share) for name, share in shares.items() if share is not None)
    total = sum(share for _, share in other)
    if total > 1 + 1e-9 or (not equal and total < 1 - 1e-9):
        raise UserError(
            f"{option}: the shares of language {language} add up to {total:g}: they have to be 1, or less if other "
            "voices are named without a share"
        )
    return Voices(equal, other)


class ListVoices(argparse.Action):
    """The option `--list-voices`: print language and name of every voice, and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **{**options, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the table."""
        for name, language in voice_languages(tuple(espeak.ACCENTS)).items():
            print(f"{language}\t{name}")
        parser.exit()
