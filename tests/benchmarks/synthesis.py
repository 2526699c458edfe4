"""Speech synthesis for the scenes: processor time per caption of piper and other languages, against English espeak-ng.

    python tests/benchmarks/synthesis.py [--json] [--captions N]

Each caption describes a different scene and uses a different voice. Loading of piper's model, once per process, is
excluded. Exit code 1: a bound is missed.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from table import Figure, build_parser, print_figures

from shards.corpora.languages import LANGUAGES
from shards.corpora.scenes import random_scene
from shards.corpora.synthesis import espeak, piper
from shards.corpora.synthesis.voices import synthesizer_of

SPEED, PITCH = 190, 50


def milliseconds(code: str, voice: Callable[[int], str], captions: int) -> float:
    """Return the mean processor time of a caption in one language in milliseconds; the n-th caption uses `voice(n)`."""
    language, total = LANGUAGES[code], 0.0
    for n in range(-1, captions):  # the first is a warm-up
        text = language.caption(random_scene(0, "train", str(n)), n % len(language.vertical))
        synthesize = synthesizer_of(text, voice(n), round(SPEED * language.tempo), PITCH)
        begin = time.process_time()
        synthesize()
        total += (time.process_time() - begin) if n >= 0 else 0.0
    return 1000 * total / captions


def espeak_voices(code: str) -> Callable[[int], str]:
    """Return a function that maps n to a voice of espeak-ng in a language, spread over all voices."""
    voices = espeak.voices_of(code)
    return lambda n: voices[17 * n % len(voices)]


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__)
    parser.add_argument("--captions", type=int, default=50, help="captions per language (default: %(default)s)")
    options = parser.parse_args()
    english = milliseconds("en", espeak_voices("en"), options.captions)
    figures = []
    for name in piper.VOICES:
        ours = milliseconds(piper.LANGUAGE, lambda n, name=name: name, options.captions)  # type: ignore[misc]
        figures.append(
            Figure(name, ours, english, "ms", ours / english, "a caption, against espeak-ng in English", at_most=60)
        )
    for code in LANGUAGES:
        ours = milliseconds(code, espeak_voices(code), options.captions)
        what = "a caption by espeak-ng, against one in English"
        figures.append(Figure(code, ours, english, "ms", ours / english, what, at_most=2))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
