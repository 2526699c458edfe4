"""The kinds of perturbation with units and levels, and which of them the command line asks for."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shards.errors import UserError

if TYPE_CHECKING:
    import numpy as np

NOISE = "noise"  # the kind that needs files


@dataclass(frozen=True)
class Kind:
    """A kind of perturbation.

    Attributes:
        modality: What is perturbed.
        unit: Unit of the level.
        levels: Levels that are measured by default, mildest first.
        bounds: Smallest and largest level.
        clean_level: Level at which the input stays as it is.
        meaning: What the level is.
    """

    modality: Literal["speech", "image"]
    unit: str
    levels: tuple[float, ...]
    bounds: tuple[float, float]
    clean_level: float
    meaning: str


KINDS = {
    "white": Kind("speech", "dB", (20, 10, 5, 0), (-60, 120), math.inf, "signal-to-noise ratio of white noise"),
    "babble": Kind("speech", "dB", (20, 10, 5, 0), (-60, 120), math.inf, "ratio of the caption to 4 others"),
    NOISE: Kind("speech", "dB", (20, 10, 5, 0), (-60, 120), math.inf, "signal-to-noise ratio of files (--noise DIR)"),
    "reverberation": Kind("speech", "s", (0.3, 0.6, 1.2), (0, 10), 0, "reverberation time (RT60) of the room"),
    "speed": Kind("speech", "x", (0.7, 0.85, 1.15, 1.3), (0.25, 4), 1, "factor of tempo, pitch and formants"),
    "pitch": Kind("speech", "st", (-4, -2, 2, 4), (-12, 12), 0, "change of the pitch in semitones"),
    "opus": Kind("speech", "kbit/s", (24, 12, 6), (6, 256), math.inf, "bit rate of Opus"),
    "mp3": Kind("speech", "kbit/s", (64, 32, 16), (9, 160), math.inf, "bit rate of MP3"),
    "telephone": Kind("speech", "kHz", (8,), (2, 16), 16, "sampling rate, with 8 bits of mu-law"),
    "clipping": Kind("speech", "dB", (6, 12, 18), (0, 60), 0, "distance of the clipping level from the peak"),
    "truncation": Kind("speech", "%", (75, 50, 25), (1, 100), 100, "share of the caption that is kept, its beginning"),
    "jpeg": Kind("image", "quality", (30, 10, 5), (1, 100), math.inf, "quality of JPEG, a whole number"),
    "blur": Kind("image", "% side", (1, 2, 4), (0, 50), 0, "standard deviation of a Gaussian blur"),
    "crop": Kind("image", "% area", (75, 50, 25), (1, 100), 100, "area of a region, of the largest square"),
    "occlusion": Kind("image", "% area", (10, 25, 50), (0, 100), 0, "area of a gray square"),
}  # fmt: skip


def parse_kinds(words: Sequence[str], with_files: bool) -> list[tuple[str, float]]:
    """Parse kinds, each with its default levels or with levels as in `white=20,10`.

    Args:
        words: Kinds from the command line; empty: all.
        with_files: Whether there are files for the kind `noise`, which is else left out.

    Returns:
        Kinds and levels, without repetitions.

    Raises:
        UserError: There is no such kind, a level is not a number in its range, or `noise` has no files.
    """
    chosen: list[tuple[str, float]] = []
    for word in words or [kind for kind in KINDS if kind != NOISE or with_files]:
        name, equals, text = word.partition("=")
        if name not in KINDS:
            raise UserError(f"--kinds {name}: no such kind of perturbation; valid are {', '.join(KINDS)}")
        if name == NOISE and not with_files:
            raise UserError("--kinds noise: name a folder of audio files with --noise DIR")
        chosen += [(name, level) for level in (_levels(name, text) if equals else KINDS[name].levels)]
    return list(dict.fromkeys(chosen))


def _levels(name: str, text: str) -> list[float]:
    low, high = KINDS[name].bounds
    levels = []
    for word in text.split(","):
        try:
            level = float(word)
        except ValueError:
            level = math.nan
        if not low <= level <= high or (name == "jpeg" and not level.is_integer()):
            expected = f"levels from {low:g} to {high:g} {KINDS[name].unit} ({KINDS[name].meaning})"
            raise UserError(f"--kinds {name}={text}: {word or 'nothing'} is not valid; expected {expected}")
        levels.append(level)
    return levels


def generator_of(seed: int, kind: str, number: int) -> "np.random.Generator":
    """Random numbers of one sample and kind; all levels have the same, so that they differ in strength alone.

    Args:
        seed: Seed of the suite, at least 0.
        kind: Kind of perturbation.
        number: Number of the sample or caption in its data set.
    """
    import numpy as np

    counter = [0, 0, 0, zlib.crc32(kind.encode())]  # streams of different kinds do not meet
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=counter))
