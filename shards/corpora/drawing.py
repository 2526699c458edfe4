"""Scenes of two or three colored shapes, and their rendering."""

import colorsys
import math
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

Point = tuple[float, float]
RGB = tuple[int, int, int]

# Hue, saturation and value of each color. The background is gray, so that black and white are visible on it.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.88, 0.86),
    "green": (0.37, 0.85, 0.60),
    "blue": (0.62, 0.85, 0.90),
    "yellow": (0.15, 0.85, 0.98),
    "purple": (0.79, 0.75, 0.65),
    "orange": (0.075, 0.90, 0.98),
    "black": (0.0, 0.0, 0.07),
    "white": (0.0, 0.0, 0.98),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths are fractions of the picture's side."""

    shape: str
    colour: str
    rgb: RGB
    size: str  # "small" or "big"
    radius: float
    tilt: float  # radians


@dataclass(frozen=True)
class Scene:
    """Two objects, the first above (`vertical`) or left of the second, and optionally a third beside both."""

    first: Thing
    second: Thing
    vertical: bool
    third: Thing | None
    side: str  # position of the third: left or right of a vertical pair, top or bottom of a horizontal one
    centres: tuple[Point, Point, Point]  # (x, y) of the first, the second and the third
    background: RGB


def shade(colour: str, hue_shift: float, brightness: float) -> RGB:
    """Return a shade of a named color: hue rotated by a fraction of a full turn, value scaled."""
    hue, saturation, value = COLOURS[colour]
    red, green, blue = colorsys.hsv_to_rgb((hue + hue_shift) % 1.0, saturation, min(value * brightness, 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels, antialiased."""
    side = size * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(picture)
    for thing, center in zip((scene.first, scene.second, scene.third), scene.centres, strict=True):
        if thing is not None:
            pen.polygon(_placed(outline(thing.shape), thing, center, side), fill=thing.rgb)
            if thing.shape == "ring":
                pen.polygon(_placed(_HOLE, thing, center, side), fill=scene.background)
    return picture.reduce(_SUPERSAMPLING)


def _placed(corners: tuple[Point, ...], thing: Thing, center: Point, side: int) -> list[Point]:
    """Rotate, scale and translate the corners of a shape of unit radius to the object's pixel coordinates."""
    x, y = center
    cosine, sine = math.cos(thing.tilt) * thing.radius, math.sin(thing.tilt) * thing.radius
    return [((x + cosine * u - sine * v) * side, (y + sine * u + cosine * v) * side) for u, v in corners]


@cache
def outline(shape: str) -> tuple[Point, ...]:
    """Return the corners of a shape of about unit radius around the origin; y points down."""
    if shape == "circle":
        return tuple(_arc(0, 360, 1.0))
    if shape == "ring":  # without its hole
        return tuple(_arc(0, 360, 1.08))
    if shape == "square":
        return ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
    if shape == "triangle":
        return ((0.0, -1.15), (1.1, 0.8), (-1.1, 0.8))
    if shape == "star":
        radii = (1.25, 0.52)
        return tuple(_at(-90 + 36 * n, radii[n % 2]) for n in range(10))
    if shape == "cross":
        a, b = 0.33, 1.08
        arm = ((-a, -b), (a, -b), (a, -a))
        return (*arm, *((-y, x) for x, y in arm), *((-x, -y) for x, y in arm), *((y, -x) for x, y in arm))
    if shape == "heart":
        return tuple(_on_heart(math.tau * n / 48) for n in range(48))
    if shape == "moon":  # the outer circle's left part, back along a circle moved to the right
        inner = [(x + 0.62, y) for x, y in _arc(245, 115, 0.88)]
        return tuple((x + 0.25, y) for x, y in (*_arc(50, 310, 1.12), *inner))
    raise ValueError(f"unknown shape {shape!r}")


def _at(degrees: float, radius: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(start: float, end: float, radius: float) -> list[Point]:
    return [_at(start + (end - start) * n / 40, radius) for n in range(41)]


def _on_heart(t: float) -> Point:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 1.12 * math.sin(t) ** 3, -y / 14.5 - 0.1


_HOLE = tuple(_arc(0, 360, 0.6))
