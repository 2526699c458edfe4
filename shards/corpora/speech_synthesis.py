"""Speech synthesis for the built-in scenes by espeak-ng, from the optional package `espeakng-loader`.

espeak-ng is GPL-licensed, so it is loaded only inside functions, and only if the extra is installed.
"""

import _ctypes
import ctypes
import threading

import numpy as np

from shards.errors import UserError

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan")
VARIANTS = ("", "+f1", "+m3", "+f4", "+m7", "+Annie")  # that give the same samples in every process
# Accents vary fastest, so that the first few voices differ as much as possible.
VOICES = tuple(
    ACCENTS[n % len(ACCENTS)] + VARIANTS[(n + n // len(ACCENTS)) % len(VARIANTS)]
    for n in range(len(ACCENTS) * len(VARIANTS))
)

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
        text: An English sentence.
        voice: One of `VOICES`.
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
    return _trim(np.frombuffer(pcm, dtype="<i2"), rate)[None] / np.float32(32768), rate


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
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise UserError(f"this espeak-ng has no voice {voice!r}: install espeakng-loader 0.2.4 or newer")
    for parameter, value in ((_RATE, speed), (_VOLUME, 100), (_PITCH, pitch), (_PITCH_RANGE, 50), (_WORD_GAP, 0)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_SetSynthCallback(collect)
    encoded = text.encode()
    library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
    return b"".join(chunks), rate


def _trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Trim the silence before and after the speech to 30 ms."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 300)
    if not loud.size:
        return samples
    margin = rate * 30 // 1000
    return samples[max(loud[0] - margin, 0) : loud[-1] + margin]
