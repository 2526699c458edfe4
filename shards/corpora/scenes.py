"""scenes: generated pictures of two or three objects with synthetic spoken captions; needs no download.

A caption names color, shape and position of the objects: "a red circle above a blue star". It is spoken by a voice of
espeak-ng (GPL-3, the extra `scenes`) or piper (GPL-3, the extra `voices`), in one of several languages.

The colors and the shapes of the first two objects, as two unordered pairs, are the scene's cell. Cells are divided
among the splits, so that dev and test contain combinations never seen in training. The split `twins` has a minimal pair
for each test picture, in which only the colors (image id TEST-colour) or the positions (TEST-relation) of two objects
are exchanged. Colors and their positions suffice to distinguish them; twins in training can also exchange the shapes.
"""

import argparse
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import combinations, count, islice

from shards.corpora.drawing import COLOURS, RGB, SHAPES, Point, Scene, Thing, draw, shade
from shards.corpora.item import Caption, Item
from shards.corpora.languages import LANGUAGES
from shards.corpora.languages.grammar import IN_ORDER, PHRASINGS
from shards.corpora.records import BadRecords
from shards.corpora.synthesis.espeak import VOICES
from shards.corpora.synthesis.voices import ListVoices, check_installed, parse_voices, synthesizer_of
from shards.errors import UserError

TEST_SHARE, DEV_SHARE = 0.15, 0.05  # of the cells
THIRD_SHARE = 0.25  # of the scenes have a third object
SIZE_SHARE = 0.25  # of the captions name a size, where the sizes differ
TWINS = ("colour", "relation", "shape")  # what a twin exchanges: colors, positions or shapes of the first two objects
TEST_TWINS = TWINS[:2]

Cell = tuple[tuple[str, ...], tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    parser.add_argument("--pictures", type=int, default=5000, metavar="N", help="training pictures (default: 5000)")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="dev pictures (default: 200)")
    parser.add_argument("--test", type=int, default=500, metavar="N", help="test pictures (default: 500)")
    parser.add_argument("--captions", type=int, default=2, metavar="K", help="captions a picture (default: 2)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of a picture in pixels (default: 64)")
    _add_speech_arguments(parser)
    parser.add_argument(
        "--phrasings",
        type=int,
        default=PHRASINGS,
        metavar="N",
        help=f"phrasings of a caption, at most {PHRASINGS} (the default); the first {IN_ORDER} mention the upper "
        "or left object first",
    )
    parser.add_argument(
        "--twins-in-training",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the training pictures that come in pairs of twins (default: 0.5)",
    )
    parser.add_argument(
        "--training-twins",
        type=_twin_kinds,
        default=TEST_TWINS,
        metavar="KINDS",
        help=f"what the twins in training exchange, of {', '.join(TWINS)} (default: {','.join(TEST_TWINS)})",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def _add_speech_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--voices",
        type=_number_or_names,
        default="all",
        metavar="NAMES",
        help="voices, equally probable: names, patterns such as '*+f1', all (those of espeak-ng, the default), or a "
        f"number: the first of each language, of {len(VOICES)} in English. NAME=SHARE speaks this share of the "
        "captions, as in all,piper:joe=0.1; piper takes 0.2 s of a core for a caption, espeak-ng 6 ms",
    )
    parser.add_argument(
        "--test-voices",
        metavar="NAMES",
        help="voices that speak dev, test and twins, and are kept out of training (default: the same as in training)",
    )
    parser.add_argument("--list-voices", action=ListVoices, help="print language and name of all voices, and exit")
    parser.add_argument(
        "--languages",
        type=_languages,
        metavar="CODES",
        help=f"languages of the captions, of {', '.join(LANGUAGES)} (default: en); each caption is in one of them, "
        "which the shards record unless all are English",
    )
    parser.add_argument(
        "--every-language", action="store_true", help="give each picture --captions captions in each language"
    )


def _number_or_names(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _twin_kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in text.split(",")))
    for kind in kinds:
        if kind not in TWINS:
            raise argparse.ArgumentTypeError(f"no twins {kind!r}: there are {', '.join(TWINS)}")
    return kinds


def _languages(text: str) -> list[str] | None:
    """Return the codes; None for English alone, as in shards of earlier versions."""
    codes = list(dict.fromkeys(code.strip() for code in text.split(",")))
    for code in codes:
        if code not in LANGUAGES:
            raise argparse.ArgumentTypeError(f"no language {code!r}: it has {', '.join(LANGUAGES)}")
    return codes if codes != ["en"] else None


def read(options: argparse.Namespace, bad: BadRecords | None = None) -> list[Item]:
    """Return the pictures of all splits; the writer renders them and synthesizes the speech later.

    Picture n of a split does not depend on the number of pictures.

    Raises:
        UserError: An option is out of range, a voice is unknown, or a synthesizer is not installed.
    """
    _check(options)
    twin_rate = options.twins_in_training / (2 - options.twins_in_training)  # per scene rather than per picture
    items = list(islice(_training_items(options, twin_rate), options.pictures))
    items += [_item(scene, f"dev-{n:06d}", "dev", options) for n, scene in enumerate(_distinct_scenes(options, "dev"))]
    twins = []
    for n, scene in enumerate(_distinct_scenes(options, "test")):
        name = f"test-{n:06d}"
        items.append(_item(scene, name, "test", options))
        twins.append(_twin_item(scene, name, TEST_TWINS[n % 2], "twins", options))
    return items + twins


def _check(options: argparse.Namespace) -> None:
    bounds = {
        "pictures": (0, 1_000_000),
        "dev": (0, 1000),  # about half of the distinguishable scenes
        "test": (0, 2000),
        "phrasings": (1, PHRASINGS),
        "captions": (1, min(max(options.phrasings, 1), PHRASINGS)),
        "size": (32, 1024),
        "twins_in_training": (0, 1),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number from {low} to {high}")
    if isinstance(options.voices, int) and not 1 <= options.voices <= len(VOICES):
        raise UserError(f"--voices {options.voices}: give a number from 1 to {len(VOICES)}, or names")
    check_installed(parse_voices(options.voices, options.test_voices, tuple(options.languages or ("en",))).values())


def _training_items(options: argparse.Namespace, twin_rate: float) -> Iterator[Item]:
    """Yield an endless stream of training pictures, each twin directly after its original."""
    number = 0
    while True:
        name = f"train-{number:06d}"
        generator = random.Random(f"{options.seed}/twin/{name}")
        scene = random_scene(options.seed, "train", str(number))
        yield _item(scene, name, "train", options)
        if generator.random() < twin_rate:
            yield _twin_item(scene, name, generator.choice(options.training_twins), "train", options)
        number += 1


def _distinct_scenes(options: argparse.Namespace, split: str) -> Iterator[Scene]:
    """Yield the scenes of a held-out split, such that no caption of one scene fits another."""
    thirds_of: dict[tuple, set] = {}
    for number in range(getattr(options, split)):
        for attempt in count():
            scene = random_scene(options.seed, split, f"{number}/{attempt}")
            thirds = thirds_of.setdefault((_name(scene.first), _name(scene.second), scene.vertical), set())
            third = (_name(scene.third), scene.side) if scene.third else None
            # A caption of a scene without a third object fits any scene with the same first two.
            if not thirds or (third and None not in thirds and third not in thirds):
                thirds.add(third)
                yield scene
                break


def _item(scene: Scene, name: str, split: str, options: argparse.Namespace, twin: str | None = None) -> Item:
    """Describe one picture; a twin has the phrasings, languages and voices of its original."""
    voices_of = parse_voices(options.voices, options.test_voices, tuple(options.languages or ("en",)))
    captions: list[Caption] = []
    for code, phrasing, generator in _phrasings(twin or name, options):
        language = LANGUAGES[code]
        text = language.caption(scene, phrasing, generator.random() < SIZE_SHARE, generator.random() < 0.5)
        voice = voices_of[code, split != "train"].draw(generator)
        speed = generator.randint(170, 220) + (35 if scene.third else 0)  # keeps captions below four seconds
        audio = synthesizer_of(text, voice, round(speed * language.tempo), generator.randint(30, 70))
        known = code if options.languages else None
        captions.append(Caption(f"{name}-{len(captions)}", audio, text, voice, language=known))
    return Item(name, split, partial(draw, scene, options.size), tuple(captions), twin)


def _phrasings(name: str, options: argparse.Namespace) -> Iterator[tuple[str, int, random.Random]]:
    """Yield language and phrasing of each caption of a picture, and the random stream of the rest.

    English captions have the stream that they have without other languages.
    """
    languages = options.languages or ["en"]
    if options.every_language:
        for language in languages:
            generator = random.Random(f"{options.seed}/captions/{name}" + (f"/{language}" if language != "en" else ""))
            for phrasing in generator.sample(range(options.phrasings), options.captions):
                yield language, phrasing, generator
        return
    generator, languages_drawn = (random.Random(f"{options.seed}/{use}/{name}") for use in ("captions", "languages"))
    for phrasing in generator.sample(range(options.phrasings), options.captions):
        yield languages_drawn.choice(languages), phrasing, generator


def _twin_item(scene: Scene, name: str, kind: str, split: str, options: argparse.Namespace) -> Item:
    return _item(twin_of(scene, kind), f"{name}-{kind}", split, options, twin=name)


def twin_of(scene: Scene, kind: str) -> Scene:
    """Exchange the colors ("colour"), the positions ("relation") or the shapes ("shape") of the first two objects."""
    first, second = scene.first, scene.second
    if kind == "relation":
        return replace(scene, first=second, second=first)
    if kind == "shape":
        return replace(scene, first=replace(first, shape=second.shape), second=replace(second, shape=first.shape))
    return replace(
        scene,
        first=replace(first, colour=second.colour, rgb=second.rgb),
        second=replace(second, colour=first.colour, rgb=first.rgb),
    )


def _name(thing: Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def random_scene(seed: int, split: str, number: str) -> Scene:
    """Generate the scene of this number, from the cells of its split."""
    generator = random.Random(f"{seed}/{split}/{number}")
    with_third = generator.random() < THIRD_SHARE
    colours, shapes = _combination(generator, split_of_cell(seed), split, with_third)
    sizes = (generator.choice(("small", "big")), generator.choice(("small", "big")), "small")
    first, second, third = (_thing(generator, *parts) for parts in zip(shapes, colours, sizes, strict=True))
    vertical = generator.random() < 0.5
    side = generator.choice(("left", "right") if vertical else ("top", "bottom")) if with_third else ""
    centres = _centres(generator, vertical, side)
    return Scene(first, second, vertical, third if with_third else None, side, centres, _background(generator))


def _combination(
    generator: random.Random, split_of: dict[Cell, str], split: str, with_third: bool
) -> tuple[list[str], list[str]]:
    """Sample three colors and three shapes, the third for a third object.

    The cell of the first two belongs to this split. Any cell that the third forms with one of them, with colors
    exchanged or not, belongs to training: otherwise training would contain a held-out combination, or a test caption
    might fit two test pictures.
    """
    while True:
        colours, shapes = generator.sample(list(COLOURS), 3), generator.sample(SHAPES, 3)
        if split_of[_cell(colours[:2], shapes[:2])] != split:
            continue
        crossed = [_cell((c, colours[2]), (s, shapes[2])) for c in colours[:2] for s in shapes[:2]]
        if not with_third or all(split_of[cell] == "train" for cell in crossed):
            return colours, shapes


def _thing(generator: random.Random, shape: str, colour: str, size: str) -> Thing:
    radius = generator.uniform(0.165, 0.19) if size == "big" else generator.uniform(0.105, 0.125)
    rgb = shade(colour, generator.uniform(-0.01, 0.01), generator.uniform(0.93, 1.07))
    return Thing(shape, colour, rgb, size, radius, tilt=generator.uniform(-0.15, 0.15))


def _background(generator: random.Random) -> RGB:
    gray = generator.uniform(140, 175)
    red, green, blue = (round(gray + generator.uniform(-8, 8)) for _ in range(3))
    return red, green, blue


def _centres(generator: random.Random, vertical: bool, side: str) -> tuple[Point, Point, Point]:
    """Return the centers (x, y) of the three objects, far enough apart for the largest objects."""
    half = generator.uniform(0.21, 0.25)  # of the distance along the line of the first two
    along = 0.5 + generator.uniform(-0.03, 0.03)
    away = {"left": 0.14, "top": 0.14, "right": -0.14, "bottom": -0.14}.get(side, generator.uniform(-0.12, 0.12))
    across = [0.5 + away + generator.uniform(-0.04, 0.04) for _ in range(2)]
    third = (0.5 + generator.uniform(-0.15, 0.15), 0.5 - 2.5 * away + generator.uniform(-0.02, 0.02))
    centres = ((along - half, across[0]), (along + half, across[1]), third)
    a, b, c = ((y, x) for x, y in centres) if vertical else centres
    return a, b, c


def _cell(colours: Sequence[str], shapes: Sequence[str]) -> Cell:
    return tuple(sorted(colours)), tuple(sorted(shapes))


@lru_cache(maxsize=4)
def split_of_cell(seed: int) -> dict[Cell, str]:
    """Assign cells (unordered pairs of colors and of shapes) to splits, in an order hashed from the seed."""
    cells = [_cell(colours, shapes) for colours in combinations(COLOURS, 2) for shapes in combinations(SHAPES, 2)]
    cells.sort(key=lambda cell: hashlib.sha256(f"{seed}/{cell}".encode()).digest())
    tests, devs = round(TEST_SHARE * len(cells)), round(DEV_SHARE * len(cells))
    return {cell: "test" if n < tests else "dev" if n < tests + devs else "train" for n, cell in enumerate(cells)}
