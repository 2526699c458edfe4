"""Names of voices: what they stand for, their shares, and messages for what does not exist."""

import random
from collections import Counter

import pytest

from shards.corpora.synthesis.espeak import voices_of
from shards.corpora.synthesis.voices import Voices, parse_voices, voice_languages
from shards.errors import UserError

ENGLISH, GERMAN = voices_of("en"), voices_of("de")


def names(spec: int | str, *languages: str) -> tuple[str, ...]:
    chosen = parse_voices(spec, None, languages or ("en",))
    return tuple(name for language in languages or ("en",) for name in chosen[language, False].names)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (3, ENGLISH[:3]),
        ("3", ENGLISH[:3]),
        ("all", ENGLISH),
        ("en-us+f1, en-gb-scotland", ("en-us+f1", "en-gb-scotland")),
        ("en-us+f1,en-us+f1", ("en-us+f1",)),
        ("en-us+Mr serious", ("en-us+Mr serious",)),
        ("2,piper:joe", (*ENGLISH[:2], "piper:joe")),
        ("piper:*", ("piper:joe",)),
        ("*+f4", tuple(name for name in ENGLISH if name.endswith("+f4"))),
        ("*", ENGLISH),
    ],
)
def test_voices_of_an_entry(spec: int | str, expected: tuple[str, ...]) -> None:
    assert names(spec) == expected


def test_numbers_and_patterns_hold_for_each_language() -> None:
    assert names(2, "de", "en") == (*GERMAN[:2], *ENGLISH[:2])
    assert set(names("*+f1", "de", "es")) == {"de+f1", "es+f1", "es-419+f1"}


def test_the_first_voices_are_fixed_and_differ() -> None:
    """Shards that are made with --voices 6, as the quickstart's, have these."""
    assert ENGLISH[:6] == ("en-us", "en+f1", "en-gb-scotland+m3", "en-gb-x-rp+f4", "en-029+m7", "en-gb-x-gbclan+Annie")
    assert len(set(ENGLISH[:36])) == 36
    every = [name for language in ("en", "de", "es", "fr", "it", "nl", "pt", "sv") for name in voices_of(language)]
    assert len(set(every)) == len(every)
    assert len(GERMAN) * 8 == len(ENGLISH)


def test_held_out_voices_are_not_in_training() -> None:
    chosen = parse_voices("all", "*+f1,en-us", ("en", "de"))
    for language in ("en", "de"):
        training, tests = (set(chosen[language, held_out].names) for held_out in (False, True))
        assert not training & tests
        assert training | tests == set(voices_of(language))
    assert chosen["de", True].names == ("de+f1",)
    separate = parse_voices(3, "piper:joe", ("en",))
    assert (separate["en", False].names, separate["en", True].names) == (ENGLISH[:3], ("piper:joe",))


def test_shares() -> None:
    chosen = parse_voices("all,piper:joe=0.2,en-us=0.1,*+f4=0.3", None, ("en",))["en", False]
    generator = random.Random(0)
    counts = Counter(chosen.draw(generator) for _ in range(20000))
    assert counts["piper:joe"] / 20000 == pytest.approx(0.2, abs=0.01)
    assert counts["en-us"] / 20000 == pytest.approx(0.1, abs=0.01)
    assert sum(count for name, count in counts.items() if name.endswith("+f4")) / 20000 == pytest.approx(0.3, abs=0.01)
    assert counts.keys() == {*ENGLISH, "piper:joe"}
    thirds = parse_voices("en=0.333333333333,en-us=0.333333333333,en-029=0.333333333334", None, ("en",))["en", False]
    assert {thirds.draw(generator) for _ in range(99)} == {"en", "en-us", "en-029"}


def test_a_share_is_kept_where_a_later_pattern_matches_its_voice() -> None:
    chosen = parse_voices("en-us=0.5,all", None, ("en",))["en", False]
    generator = random.Random(0)
    assert sum(chosen.draw(generator) == "en-us" for _ in range(2000)) / 2000 == pytest.approx(0.5, abs=0.05)


def test_without_shares_a_draw_is_one_number_of_the_stream() -> None:
    one, other = random.Random(5), random.Random(5)
    assert [Voices(ENGLISH[:7]).draw(one) for _ in range(9)] == [ENGLISH[other.randrange(7)] for _ in range(9)]


@pytest.mark.parametrize(
    ("spec", "tests", "languages", "message"),
    [
        ("en-us+f9", None, ("en",), r"there is no voice 'en-us\+f9'; the nearest are .*en-us\+f4.*--list-voices"),
        ("piper:jo", None, ("en",), "'piper:jo'; the nearest are piper:joe"),
        ("en-us,,", None, ("en",), "there is no voice ''"),
        ("0", None, ("en",), "there is no voice '0'"),
        ("all", "xx", ("en",), "--test-voices: there is no voice 'xx'; the nearest are"),
        ("de+f1,en", None, ("en",), r"de\+f1 speaks de, which is not among --languages en"),
        ("en-us", None, ("en", "de"), "--voices: no voice of language de is left: name one"),
        ("en-us", "en-us", ("en",), "--voices: no voice of language en is left"),
        ("all", "en-us", ("en", "de"), "--test-voices: no voice of language de is left"),
        ("en-us=x", None, ("en",), "'en-us=x': give a share above 0 and up to 1"),
        ("en-us=nan", None, ("en",), "'en-us=nan': give a share above 0 and up to 1"),
        ("en-us=2", None, ("en",), "'en-us=2': give a share above 0 and up to 1"),
        ("en-us=0.4", None, ("en",), "the shares of language en add up to 0.4: they have to be 1"),
        ("all,en-us=0.6,en=0.6", None, ("en",), "add up to 1.2"),
    ],
)  # fmt: skip
def test_mistakes_are_named(spec: str, tests: str | None, languages: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_voices(spec, tests, languages)
    assert "\n" not in str(caught.value)


def test_every_voice_has_one_language() -> None:
    voices = voice_languages(("en", "de"))
    assert voices["en-us"] == voices["piper:joe"] == "en"
    assert voices["de+f1"] == "de"
    assert "piper:joe" not in voice_languages(("de",))
