"""scenes: generated pictures of two or three objects with synthetic spoken captions; needs no download.

A caption names color, shape and position of the objects: "a red circle above a blue star". The colors and the shapes of
the first two objects, as two unordered pairs, are the scene's cell. Cells are divided among the splits, so that dev and
test contain combinations never seen in training. The split `twins` has a minimal pair for each test picture, in which
only the colors (image id TEST-colour) or the positions (TEST-relation) of two objects are exchanged.
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
from shards.corpora.records import BadRecords
from shards.corpora.speech_synthesis import VOICES, find_library, speak
from shards.errors import UserError

# a, b: the first (upper or left) and the second object, "a red circle"; A, B: the same with "the".
# The first IN_ORDER phrasings mention the first object first.
IN_ORDER = 4
VERTICAL = (
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
)
HORIZONTAL = (
    "{a} left of {b}",
    "{a} to the left of {b}",
    "{A} is left of {B}",
    "{a} with {b} on its right",
    "{b} right of {a}",
    "{b} to the right of {a}",
    "{B} is right of {A}",
    "{b} with {a} on its left",
    "left of {B} is {a}",
    "right of {A} is {b}",
)
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}

TEST_SHARE, DEV_SHARE = 0.15, 0.05  # of the cells
THIRD_SHARE = 0.25  # of the scenes have a third object
SIZE_SHARE = 0.25  # of the captions name a size, where the sizes differ

Cell = tuple[tuple[str, ...], tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this corpus."""
    parser.add_argument("--pictures", type=int, default=5000, metavar="N", help="training pictures (default: 5000)")
    parser.add_argument("--dev", type=int, default=200, metavar="N", help="dev pictures (default: 200)")
    parser.add_argument("--test", type=int, default=500, metavar="N", help="test pictures (default: 500)")
    parser.add_argument("--captions", type=int, default=2, metavar="K", help="captions a picture (default: 2)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of a picture in pixels (default: 64)")
    parser.add_argument("--voices", type=int, default=16, help=f"voices, at most {len(VOICES)} (default: 16)")
    parser.add_argument(
        "--phrasings",
        type=int,
        default=len(VERTICAL),
        metavar="N",
        help=f"phrasings of a caption, at most {len(VERTICAL)} (the default); the first {IN_ORDER} mention the upper "
        "or left object first",
    )
    parser.add_argument(
        "--twins-in-training",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the training pictures that come in pairs of twins (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def read(options: argparse.Namespace, bad: BadRecords | None = None) -> list[Item]:
    """Return the pictures of all splits; the writer renders them and synthesizes the speech later.

    Picture n of a split does not depend on the number of pictures.

    Args:
        options: What `add_arguments` added.
        bad: Unused, since there are no records to read.

    Raises:
        UserError: An option is out of range, or espeakng-loader is not installed.
    """
    _check(options)
    find_library()
    twin_rate = options.twins_in_training / (2 - options.twins_in_training)  # per scene rather than per picture
    items = list(islice(_training_items(options, twin_rate), options.pictures))
    items += [_item(scene, f"dev-{n:06d}", "dev", options) for n, scene in enumerate(_distinct_scenes(options, "dev"))]
    twins = []
    for n, scene in enumerate(_distinct_scenes(options, "test")):
        name = f"test-{n:06d}"
        items.append(_item(scene, name, "test", options))
        twins.append(_twin_item(scene, name, ("colour", "relation")[n % 2], "twins", options))
    return items + twins


def _check(options: argparse.Namespace) -> None:
    bounds = {
        "pictures": (0, 1_000_000),
        "dev": (0, 1000),  # about half of the distinguishable scenes
        "test": (0, 2000),
        "phrasings": (1, len(VERTICAL)),
        "captions": (1, min(max(options.phrasings, 1), len(VERTICAL))),
        "size": (32, 1024),
        "voices": (1, len(VOICES)),
        "twins_in_training": (0, 1),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number from {low} to {high}")


def _training_items(options: argparse.Namespace, twin_rate: float) -> Iterator[Item]:
    """Yield an endless stream of training pictures, each twin directly after its original."""
    number = 0
    while True:
        name = f"train-{number:06d}"
        chance = random.Random(f"{options.seed}/twin/{name}")
        scene = random_scene(options.seed, "train", str(number))
        yield _item(scene, name, "train", options)
        if chance.random() < twin_rate:
            yield _twin_item(scene, name, chance.choice(("colour", "relation")), "train", options)
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
    """Describe one picture; a twin has the phrasings and voices of its original."""
    chance = random.Random(f"{options.seed}/captions/{twin or name}")
    captions = []
    for k, phrasing in enumerate(chance.sample(range(options.phrasings), options.captions)):
        text = caption(scene, phrasing, sized=chance.random() < SIZE_SHARE, size_of_first=chance.random() < 0.5)
        voice = VOICES[chance.randrange(options.voices)]
        speed = chance.randint(170, 220) + (35 if scene.third else 0)  # keeps captions below four seconds
        audio = partial(speak, text, voice, speed, chance.randint(30, 70))
        captions.append(Caption(f"{name}-{k}", audio, text, voice))
    return Item(name, split, partial(draw, scene, options.size), tuple(captions), twin)


def _twin_item(scene: Scene, name: str, kind: str, split: str, options: argparse.Namespace) -> Item:
    return _item(twin_of(scene, kind), f"{name}-{kind}", split, options, twin=name)


def twin_of(scene: Scene, kind: str) -> Scene:
    """Exchange the colors (kind "colour") or the positions ("relation") of the first two objects."""
    first, second = scene.first, scene.second
    if kind == "relation":
        return replace(scene, first=second, second=first)
    return replace(
        scene,
        first=replace(first, colour=second.colour, rgb=second.rgb),
        second=replace(second, colour=first.colour, rgb=first.rgb),
    )


def caption(scene: Scene, phrasing: int, sized: bool = False, size_of_first: bool = True) -> str:
    """Return a caption of a scene in one phrasing; with `sized`, it names the size of one object if sizes differ."""
    sized = sized and scene.first.size != scene.second.size
    first = _name(scene.first, with_size=sized and size_of_first)
    second = _name(scene.second, with_size=sized and not size_of_first)
    template = (VERTICAL if scene.vertical else HORIZONTAL)[phrasing]
    text = template.format(a=_indefinite(first), b=_indefinite(second), A=f"the {first}", B=f"the {second}")
    if scene.third:
        text += f" and {_indefinite(_name(scene.third))} {SIDES[scene.side]}"
    return text


def _name(thing: Thing, with_size: bool = False) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}" if with_size else f"{thing.colour} {thing.shape}"


def _indefinite(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def random_scene(seed: int, split: str, number: str) -> Scene:
    """Generate the scene of this number, from the cells of its split."""
    chance = random.Random(f"{seed}/{split}/{number}")
    with_third = chance.random() < THIRD_SHARE
    colours, shapes = _combination(chance, split_of_cell(seed), split, with_third)
    sizes = (chance.choice(("small", "big")), chance.choice(("small", "big")), "small")
    first, second, third = (_thing(chance, *parts) for parts in zip(shapes, colours, sizes, strict=True))
    vertical = chance.random() < 0.5
    side = chance.choice(("left", "right") if vertical else ("top", "bottom")) if with_third else ""
    centres = _places(chance, vertical, side)
    return Scene(first, second, vertical, third if with_third else None, side, centres, _background(chance))


def _combination(
    chance: random.Random, split_of: dict[Cell, str], split: str, with_third: bool
) -> tuple[list[str], list[str]]:
    """Sample three colors and three shapes, the third for a third object.

    The cell of the first two belongs to this split. Any cell that the third forms with one of them, with colors
    exchanged or not, belongs to training: otherwise training would contain a held-out combination, or a test caption
    might fit two test pictures.
    """
    while True:
        colours, shapes = chance.sample(list(COLOURS), 3), chance.sample(SHAPES, 3)
        if split_of[_cell(colours[:2], shapes[:2])] != split:
            continue
        crossed = [_cell((c, colours[2]), (s, shapes[2])) for c in colours[:2] for s in shapes[:2]]
        if not with_third or all(split_of[cell] == "train" for cell in crossed):
            return colours, shapes


def _thing(chance: random.Random, shape: str, colour: str, size: str) -> Thing:
    radius = chance.uniform(0.165, 0.19) if size == "big" else chance.uniform(0.105, 0.125)
    rgb = shade(colour, chance.uniform(-0.01, 0.01), chance.uniform(0.93, 1.07))
    return Thing(shape, colour, rgb, size, radius, tilt=chance.uniform(-0.15, 0.15))


def _background(chance: random.Random) -> RGB:
    grey = chance.uniform(140, 175)
    red, green, blue = (round(grey + chance.uniform(-8, 8)) for _ in range(3))
    return red, green, blue


def _places(chance: random.Random, vertical: bool, side: str) -> tuple[Point, Point, Point]:
    """Return the centers (x, y) of the three objects, far enough apart for the largest objects."""
    half = chance.uniform(0.21, 0.25)  # of the distance along the line of the first two
    along = 0.5 + chance.uniform(-0.03, 0.03)
    away = {"left": 0.14, "top": 0.14, "right": -0.14, "bottom": -0.14}.get(side, chance.uniform(-0.12, 0.12))
    across = [0.5 + away + chance.uniform(-0.04, 0.04) for _ in range(2)]
    third = (0.5 + chance.uniform(-0.15, 0.15), 0.5 - 2.5 * away + chance.uniform(-0.02, 0.02))
    places = ((along - half, across[0]), (along + half, across[1]), third)
    a, b, c = ((y, x) for x, y in places) if vertical else places
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
