"""Speech synthesis for the built-in scenes by espeak-ng, from the optional package `espeakng-loader`.

espeak-ng is GPL-licensed, so it is loaded only inside functions, and only if the extra is installed.
"""

import _ctypes
import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from shards.errors import UserError

# Of each language. fr-be and fr-ch give the samples of fr here; en-shaw reads another alphabet.
ACCENTS = {
    "en": ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc"),
    "de": ("de",),
    "es": ("es", "es-419"),
    "fr": ("fr",),
    "it": ("it",),
    "nl": ("nl",),
    "pt": ("pt", "pt-br"),
    "sv": ("sv",),
}
# Of the 104 variants of espeak-ng 1.52 these are left out:
# - Their breath is noise of the C library's generator, so the samples differ in every process: Alicia, Demonic, Reed,
#   caleb, f2, f3, f5, sandro, victor, whisper, whisperf.
# - They sound like another, with a mean difference of less than 1 dB in 40 mel bands (the median of two voices is 9.5):
#   fast (no variant), klatt5 (klatt4), steph3 (steph2).
# - They are so slow that captions last more than 4.5 s: AnxiousAndy, Marco.
_FIRST = ("", "f1", "m3", "f4", "m7", "Annie")
_OTHERS = (
    "Andrea, klatt, belinda, Michael, grandma, robosoft, linda, david, aunty, UniRobot, steph, m1, anika, "
    "croak, shelby, adam, Jacky, boris, Storm, klatt4, iven, m8, announcer, zac, grandpa, Nguyen, robosoft4, "
    "Gene, m2, pedro, benjamin, Diogo, m6, antonio, RicishayMax2, Tweaky, mike2, steph2, Hugo, klatt2, Andy, "
    "m5, robosoft6, edward, travis, Mike, anikaRobot, pablo, norbert, Lee, robosoft2, ed, m4, Henrique, max, "
    "klatt6, john, RicishayMax, Mario, rob, robosoft7, Alex, quincy, iven4, klatt3, marcelo, Gene2, miguel, "
    "robosoft8, ian, kaukovalta, edward2, iven2, paul, RicishayMax3, michel, robosoft3, gustave, robert, "
    "Denis, robosoft5, iven3"
)
VARIANTS = (*_FIRST, *_OTHERS.split(", "), "Mr serious")


def _combined(accents: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Combine accents and variants; accents vary fastest, so that the first few voices differ as much as possible."""
    voices = []
    for n in range(len(accents) * len(variants)):
        variant = variants[(n + n // len(accents)) % len(variants)]
        voices.append(accents[n % len(accents)] + (f"+{variant}" if variant else ""))
    return voices


def voices_of(language: str) -> tuple[str, ...]:
    """Return the names of all voices of a language; the order is fixed, since `--voices N` means the first N."""
    accents = ACCENTS[language]
    first = _combined(accents[:6], _FIRST)
    return tuple(dict.fromkeys([*first, *_combined(accents, VARIANTS)]))


VOICES = voices_of("en")

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _VOLUME, _PITCH, _PITCH_RANGE, _WORD_GAP = 1, 2, 3, 4, 7
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_library_lock = threading.Lock()  # espeak-ng keeps global state


def find_library() -> tuple[str, str]:
    """Return the paths of the espeak-ng library and its data.

    Raises:
        UserError: espeakng-loader is not installed.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "the scenes need espeakng-loader: pip install 'speech-image-toolkit[scenes]' or pip install espeakng-loader"
        ) from None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def speak(text: str, voice: str, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """Synthesize a sentence.

    espeak-ng keeps the phase of its oscillators and flutter between sentences, and initialization does not reset it.
    The library is therefore reloaded for each sentence (about 1 ms), so that the samples depend on the arguments only.

    Args:
        text: A sentence in the voice's language.
        voice: One of `voices_of`.
        words_per_minute: 80 to 450.
        pitch: 0 to 99; 50 is the voice's default.

    Returns:
        float32 samples [1, n] in [-1, 1] without the silence around the speech, and their sampling rate in Hz.

    Raises:
        UserError: espeak-ng is missing or does not work.
    """
    path, data = find_library()
    with _library_lock:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise UserError(f"cannot load espeak-ng ({error}): reinstall espeakng-loader") from None
        try:
            pcm, rate = _synthesize(library, data, text, voice, words_per_minute, pitch)
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
    return trim(np.frombuffer(pcm, dtype="<i2"), rate)[None] / np.float32(32768), rate


def _synthesize(library: ctypes.CDLL, data: str, text: str, voice: str, speed: int, pitch: int) -> tuple[bytes, int]:
    """Return the 16-bit samples of a sentence and their rate, from a newly loaded library."""
    chunks: list[bytes] = []

    @_CALLBACK
    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
    if rate <= 0:  # espeak-ng keeps the path in 160 bytes
        raise UserError(f"espeak-ng cannot read its data in {data}: reinstall espeakng-loader, in a shorter path")
    accent, plus, variant = voice.partition("+")
    if library.espeak_SetVoiceByName((_voice_files(data).get(accent, accent) + plus + variant).encode()) != 0:
        raise UserError(f"this espeak-ng has no voice {voice!r}: install espeakng-loader 0.2.4 or newer")
    for parameter, value in ((_RATE, speed), (_VOLUME, 100), (_PITCH, pitch), (_PITCH_RANGE, 50), (_WORD_GAP, 0)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_SetSynthCallback(collect)
    encoded = text.encode()
    library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
    return b"".join(chunks), rate


@cache
def _voice_files(data: str) -> dict[str, str]:
    """Return the file of each accent; given a name, espeak-ng reads the files of all languages, which takes 4 ms."""
    folder = Path(data, "lang")
    return {file.name.lower(): str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Trim the silence before and after the speech to 30 ms."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 300)
    if not loud.size:
        return samples
    margin = rate * 30 // 1000
    return samples[max(loud[0] - margin, 0) : loud[-1] + margin]
