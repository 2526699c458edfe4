"""The built-in scenes: deterministic, splits apart, captions true of their own picture only, spoken and drawn well."""

import argparse
import ast
import hashlib
import math
import pickle
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.corpora import scenes
from shards.corpora.drawing import COLOURS, SHAPES, Scene, Thing
from shards.corpora.item import Item
from shards.corpora.scenes import IN_ORDER
from shards.corpora.synthesis import espeak
from shards.corpora.synthesis.espeak import ACCENTS, VOICES, speak, voices_of
from shards.errors import UserError

pytest.importorskip("espeakng_loader")

SENTENCE = "a red circle above a blue star"


def read(*arguments: str, **sizes: int) -> list[Item]:
    parser = argparse.ArgumentParser()
    scenes.add_arguments(parser)
    counts = {"pictures": 60, "dev": 20, "test": 60, **sizes}
    return scenes.read(parser.parse_args([*(f"--{name}={value}" for name, value in counts.items()), *arguments]))


def scene_of(item: Item) -> Scene:
    return item.picture.args[0]


def things_of(scene: Scene) -> list[Thing]:
    return [thing for thing in (scene.first, scene.second, scene.third) if thing]


# A second reading of the captions, which shares nothing with the phrasings: text -> facts.
THING = re.compile(rf"(?:a|an|the) (?:(small|big) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
WORDS = {
    "above": "above", "over": "above", "below": "below", "under": "below",
    "left of": "left", "right of": "right", "to the left of": "left", "to the right of": "right",
    "on its left": "left", "on its right": "right",
}  # fmt: skip


def parse(text: str) -> tuple[list[tuple[str, str, str]], str, str]:
    """Return the objects (size, colour, shape), the first named being `relation` the second, and the third's side."""
    objects = [match.groups(default="") for match in THING.finditer(text)]
    skeleton = THING.sub("X", text)
    side = re.search(r" and X (?:on|at) the (left|right|top|bottom)$", skeleton)
    skeleton = skeleton[: side.start()] if side else skeleton
    for word, relation in WORDS.items():
        if skeleton in (f"X {word} X", f"X is {word} X"):
            return objects, relation, side[1] if side else ""
        if skeleton in (f"{word} X is X", f"X with X {word} it", f"X with X {word}"):
            return objects, OPPOSITE[relation], side[1] if side else ""
    raise AssertionError(f"cannot read {text!r}")


def is_true(text: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene, by where its objects are."""
    objects, relation, side = parse(text)
    result = []
    for size, colour, shape in objects:
        where = [
            center
            for thing, center in zip((scene.first, scene.second, scene.third), scene.centres, strict=True)
            if thing and (thing.colour, thing.shape) == (colour, shape) and size in ("", thing.size)
        ]
        if len(where) != 1:
            return False
        result.append(where[0])
    (x, y), (u, v) = result[:2]
    ordered = {"above": v - y, "below": y - v, "left": u - x, "right": x - u}[relation] > 0.3
    if not side:
        return ordered and len(objects) == 2
    x, y = result[2]
    return ordered and {"left": x < 0.25, "right": x > 0.75, "top": y < 0.25, "bottom": y > 0.75}[side]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_captions_are_true_of_their_own_picture_only(seed):
    items = read(f"--seed={seed}", "--captions=4")
    for item in items:
        texts = [caption.text for caption in item.captions]
        assert len(set(texts)) == 4, f"{item.image_id}: a caption is repeated: {texts}"
        for text in texts:
            assert is_true(text, scene_of(item)), f"{item.image_id}: {text!r} is false"
    by_name = {item.image_id: item for item in items}
    for item in items:
        if item.twin:
            for one, other in ((item, by_name[item.twin]), (by_name[item.twin], item)):
                for caption in one.captions:
                    assert not is_true(caption.text, scene_of(other)), f"{caption.text!r} fits the twin as well"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_no_caption_fits_another_picture_of_its_split(split):
    items = [item for item in read("--seed=3", "--captions=1", test=1000, dev=250) if item.split == split]
    assert len(items) == {"dev": 250, "test": 1000}[split]
    for item in items[::4]:
        fitting = [other.image_id for other in items if is_true(item.captions[0].text, scene_of(other))]
        assert fitting == [item.image_id], f"{item.captions[0].text!r} fits {fitting}"


def cells_of(item: Item) -> list[tuple]:
    pairs = combinations(things_of(scene_of(item)), 2)
    return [(frozenset((a.colour, b.colour)), frozenset((a.shape, b.shape))) for a, b in pairs]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_cells_are_never_in_training(seed):
    items = read(f"--seed={seed}", pictures=3000, dev=200, test=500)
    seen = {cell for item in items if item.split == "train" for cell in cells_of(item)}
    held_out = {split: {cells_of(item)[0] for item in items if item.split == split} for split in ("dev", "test")}
    assert not seen & held_out["dev"]
    assert not seen & held_out["test"]
    assert not held_out["dev"] & held_out["test"]
    for item in items:
        assert all(len(pair) == 2 for cell in cells_of(item) for pair in cell), f"{item.image_id}: objects are alike"


def test_each_test_picture_has_a_twin_of_its_cell():
    items = read()
    tests = {item.image_id: item for item in items if item.split == "test"}
    twins = [item for item in items if item.split == "twins"]
    assert [twin.twin for twin in twins] == list(tests)
    for twin in twins:
        one, other = scene_of(tests[twin.twin]), scene_of(twin)
        assert twin.image_id.removeprefix(f"{twin.twin}-") in ("colour", "relation")
        assert cells_of(tests[twin.twin])[0] == cells_of(twin)[0]
        assert (one.centres, one.third, one.background) == (other.centres, other.third, other.background)
        assert tests[twin.twin].picture().tobytes() != twin.picture().tobytes()
        if twin.image_id.endswith("colour"):
            assert [t.shape for t in things_of(one)] == [t.shape for t in things_of(other)]
            assert one.first.rgb == other.second.rgb
        else:
            assert (one.first, one.second) == (other.second, other.first)
        for left, right in zip(tests[twin.twin].captions, twin.captions, strict=True):
            assert left.audio.args[1:] == right.audio.args[1:], "a pair of twins is spoken by one voice"


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.5, 0.42, 0.58), (1, 0.99, 1)])
def test_share_of_twins_in_training(share, low, high):
    train = [item for item in read(f"--twins-in-training={share}", pictures=1000) if item.split == "train"]
    assert len(train) == 1000
    pairs = 0
    for before, item in pairwise(train):
        if item.twin:
            assert item.twin == before.image_id, "a twin comes right after its original"
            pairs += 1
    assert low <= 2 * pairs / 1000 <= high


def test_training_twins_exchange_what_is_asked_for():
    items = {item.image_id: item for item in read("--training-twins=shape,relation", pictures=400)}
    kinds: Counter[str] = Counter()
    for item in items.values():
        if item.split == "train" and item.twin:
            kind = item.image_id.removeprefix(f"{item.twin}-")
            kinds[kind] += 1
            one, other = scene_of(items[item.twin]), scene_of(item)
            if kind == "shape":
                assert [t.shape for t in things_of(one)][:2] == [t.shape for t in things_of(other)][1::-1]
                assert [t.rgb for t in things_of(one)] == [t.rgb for t in things_of(other)]
                assert (one.centres, one.third, one.background) == (other.centres, other.third, other.background)
                assert cells_of(items[item.twin])[0] == cells_of(item)[0]
                assert all(a.text != b.text for a, b in zip(items[item.twin].captions, item.captions, strict=True))
    assert kinds.keys() == {"shape", "relation"}
    assert min(kinds.values()) > 30, kinds
    tests = {item.image_id.rpartition("-")[2] for item in items.values() if item.split == "twins"}
    assert tests == {"colour", "relation"}


def test_unknown_training_twins_are_refused(capsys):
    with pytest.raises(SystemExit):
        read("--training-twins=colour,size")
    assert "no twins 'size': there are colour, relation, shape" in capsys.readouterr().err


def test_a_picture_does_not_depend_on_how_many_there_are():
    few, many = read(), {item.image_id: item for item in read(pictures=200, dev=50, test=100)}
    for item in few:
        assert pickle.dumps(item) == pickle.dumps(many[item.image_id]), item.image_id


def test_names_are_unique_and_another_seed_is_another_corpus():
    items = read()
    assert len({item.image_id for item in items}) == len(items)
    utterances = [caption.utterance for item in items for caption in item.captions]
    assert len(set(utterances)) == len(utterances)
    texts, others = ([caption.text for item in read(f"--seed={n}") for caption in item.captions] for n in (0, 1))
    assert texts != others


def digest(items: list[Item]) -> str:
    """A checksum of pictures and speech in the order of names, made in the order given."""
    sums = {}
    for item in items:
        waves = b"".join(caption.audio()[0].tobytes() for caption in item.captions)
        sums[item.image_id] = hashlib.sha256(item.picture().tobytes() + waves).hexdigest()
    return hashlib.sha256("".join(sums[name] for name in sorted(sums)).encode()).hexdigest()


@pytest.mark.parametrize("options", [(), ("--languages=en,de,es,fr,it,nl,pt,sv", "--every-language")])
def test_same_bytes_in_another_process_and_order(options):
    items = pickle.loads(pickle.dumps(read(*options, pictures=12, dev=2, test=4)))
    call = f"read(*{options}, pictures=12, dev=2, test=4)[::-1]"
    script = f"from tests.shards.corpora.test_scenes import *; print(digest({call}))"
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == digest(items)


# Of the data that earlier versions made with these options.
DESCRIPTIONS = {
    "--voices=6": "5cc80a6e0c54e7d7f47537aa6c3f256eb361aa3fe032e743df4a1458cca1425c",
    "--voices=36 --captions=4 --seed=3": "7f768a0f9402879d5659bc660c8e032f50dfc482502c12d483793719bc1f1e26",
    "--voices=16 --phrasings=4 --size=96": "6d8df07d02bdafdddd602731c881b45086ff581749d2c844bbb421c387aafdfa",
}


@pytest.mark.parametrize("options", DESCRIPTIONS)
@pytest.mark.parametrize("languages", ["", "--languages=en"])
def test_english_data_with_numbered_voices_stays_as_it_was(options, languages):
    lines = []
    for item in read(*options.split(), *languages.split()):
        captions = [(one.utterance, one.text, one.speaker, one.audio.args) for one in item.captions]
        lines.append(repr((item.image_id, item.split, item.twin, item.picture.args, captions)))
        assert {one.language for one in item.captions} == {None}
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DESCRIPTIONS[options]


@pytest.mark.skipif(version("espeakng_loader") != "0.2.4", reason="another espeak-ng may have other samples")
def test_english_speech_stays_as_it_was():
    samples = hashlib.sha256()
    for item in read("--voices=36", "--captions=4", "--seed=3")[:12]:
        for caption in item.captions:
            samples.update((caption.audio()[0] * 32768).astype("<i2").tobytes())
    assert samples.hexdigest() == "e826401ac9d1a2133a800c0e403d2f5da711e2fe62a255c1df1488da7863372f"


def test_a_voice_found_by_its_file_speaks_as_the_one_found_by_its_name(monkeypatch):
    voices = [accent + variant for accents in ACCENTS.values() for accent in accents for variant in ("", "+f4")]
    by_file = [speak("uno: two, drei!", voice, 190, 44)[0] for voice in voices]
    monkeypatch.setattr(espeak, "_voice_files", lambda data: {})
    for voice, samples in zip(voices, by_file, strict=True):
        assert np.array_equal(samples, speak("uno: two, drei!", voice, 190, 44)[0]), voice


def test_other_languages_do_not_change_the_pictures_nor_english_captions():
    plain, every = read("--voices=6"), read("--voices=6", "--every-language", "--languages=de,en,sv")
    drawn = read("--voices=6", "--languages=de,en,sv", "--captions=3")
    counts = Counter(one.language for item in drawn for one in item.captions)
    assert set(counts) == {"de", "en", "sv"}
    assert min(counts.values()) > 0.28 * counts.total(), counts
    for one, other, mixed in zip(plain, every, drawn, strict=True):
        assert pickle.dumps(one.picture) == pickle.dumps(other.picture) == pickle.dumps(mixed.picture)
        assert [caption.language for caption in other.captions] == ["de", "de", "en", "en", "sv", "sv"]
        assert [caption.utterance for caption in other.captions] == [f"{one.image_id}-{k}" for k in range(6)]
        english = [(caption.text, caption.speaker, caption.audio.args) for caption in other.captions[2:4]]
        assert english == [(caption.text, caption.speaker, caption.audio.args) for caption in one.captions]


def test_captions_are_spoken_by_a_voice_of_their_language():
    for item in read("--languages=en,de,fr,es,it,nl,pt,sv", "--captions=4"):
        for one in item.captions:
            assert one.speaker.split("+")[0] in ACCENTS[one.language]
            assert one.audio.args[:2] == (one.text, one.speaker)


def test_twins_are_in_the_languages_of_their_originals():
    items = {item.image_id: item for item in read("--languages=it,sv", "--captions=3")}
    for item in items.values():
        if item.twin:
            for one, other in zip(item.captions, items[item.twin].captions, strict=True):
                assert (one.language, one.speaker) == (other.language, other.speaker)
                assert one.text != other.text


def test_voices_of_the_tests_are_never_in_training():
    items = read("--languages=en,de", "--test-voices=*+f4,en-us", "--captions=4", pictures=800)
    speakers = {split: {one.speaker for item in items if item.split == split for one in item.captions}
                for split in ("train", "dev", "test", "twins")}  # fmt: skip
    held_out = speakers["dev"] | speakers["test"] | speakers["twins"]
    assert all(name == "en-us" or name.endswith("+f4") for name in held_out), held_out
    assert {"en-us", "de+f4", "en+f4"} <= held_out
    assert not held_out & speakers["train"]
    assert len(speakers["train"]) > 400


def test_an_unknown_language_is_refused(capsys):
    with pytest.raises(SystemExit):
        read("--languages=en,xx")
    assert "no language 'xx': it has en, de," in capsys.readouterr().err


def test_voices_are_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        read("--list-voices")
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"en\ten-us", "en\ten-gb-scotland+f4", "pt\tpt-br+m3", "en\tpiper:joe"} <= set(lines)
    assert len(set(lines)) == len(lines)


def test_speech_is_a_trimmed_float_wave():
    wave, rate = speak(SENTENCE, "en-us", 175, 50)
    assert wave.dtype == np.float32
    assert wave.shape[0] == 1
    assert 1.2 < wave.shape[1] / rate < 2.5
    assert 0.1 < np.abs(wave).max() <= 1
    assert np.abs(wave[0, : rate // 20]).max() > 0.009, "the silence before the speech is left"
    assert np.abs(wave[0, -rate // 20 :]).max() > 0.009, "the silence after the speech is left"


def test_every_voice_speaks_in_its_own_way():
    waves = {voice: speak("a red star", voice, 190, 50)[0].tobytes() for voice in VOICES}
    assert len(waves) == len(VOICES) > 700
    assert len(set(waves.values())) == len(VOICES), "two voices are the same"
    assert speak("a red star", "en-us", 190, 60)[0].tobytes() != waves["en-us"], "the pitch makes no difference"
    with pytest.raises(UserError, match="no voice 'en-xx'"):
        speak(SENTENCE, "en-xx", 190, 50)


def spoken_by_every_variant(step: int) -> dict[str, str]:
    """Checksums of one word by all variants of a voice, in their order (step 1) or the reverse (-1)."""
    return {name: hashlib.sha256(speak("roter Stern", name, 190, 50)[0].tobytes()).hexdigest()
            for name in voices_of("de")[::step]}  # fmt: skip


def test_every_variant_speaks_alike_in_another_process_and_order():
    script = "from tests.shards.corpora.test_scenes import *; print(spoken_by_every_variant(-1))"
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ast.literal_eval(other.stdout) == spoken_by_every_variant(1)


def test_no_caption_lasts_over_four_seconds():
    captions = [caption for item in read(f"--voices={len(VOICES)}", pictures=1500) for caption in item.captions]
    longest = sorted(captions, key=lambda caption: len(caption.text) / caption.audio.args[2])[-40:]
    for caption in longest:
        wave, rate = caption.audio()
        assert wave.shape[1] / rate < 4, f"{caption.text!r} by {caption.speaker}"


# The share of the circle's area (unit radius) that each shape covers, roughly.
AREA = {"circle": 1, "square": 1, "triangle": 0.68, "star": 0.55, "cross": 0.76, "heart": 0.8, "ring": 0.8, "moon": 0.7}


def test_every_object_is_wholly_visible():
    for item in read("--twins-in-training=0", pictures=200, dev=0, test=0):
        pixels = np.asarray(item.picture(), dtype=np.int32)
        assert pixels.shape == (64, 64, 3)
        for thing in things_of(scene_of(item)):
            covered = (np.abs(pixels - thing.rgb).max(axis=2) < 60).sum()
            expected = AREA[thing.shape] * math.pi * (64 * thing.radius) ** 2
            assert covered > 0.6 * expected, f"{item.image_id}: {covered} of {expected:.0f} pixels of {thing}"


def test_reading_without_the_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'speech-image-toolkit\[scenes\]'"):
        read()


OUT_OF_RANGE = [
    "--test=2001", "--captions=11", "--phrasings=11", "--captions=4 --phrasings=3", "--size=8", "--voices=0",
    "--twins-in-training=2",
]  # fmt: skip


@pytest.mark.parametrize("options", OUT_OF_RANGE)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(UserError, match=rf"{options.split('=')[0]} \d+.*: give a number from"):
        read(*options.split())


def test_the_first_phrasings_name_the_upper_or_left_object_first():
    first_four = read(f"--phrasings={IN_ORDER}", "--captions=4", pictures=200)
    for item in first_four:
        scene = scene_of(item)
        for one in item.captions:
            objects, relation, _ = parse(one.text)
            assert objects[0][1:] == (scene.first.colour, scene.first.shape), one.text
            assert relation == ("above" if scene.vertical else "left"), one.text
    others = {one.text for item in read("--captions=10", pictures=20) for one in item.captions}
    assert any(parse(text)[1] in ("below", "right") for text in others)
