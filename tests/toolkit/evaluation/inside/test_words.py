"""Words are spread over the speech in proportion to their letters."""

import numpy as np
import pytest

from shards.media.audio import SAMPLE_RATE
from toolkit.evaluation.inside.words import align_proportionally, speech_extent


def speech(before, during, after):
    """Quiet noise, a loud tone, quiet noise: durations in seconds."""
    time = np.arange(int((before + during + after) * SAMPLE_RATE)) / SAMPLE_RATE
    loud = (time >= before) & (time < before + during)
    hiss = 1e-4 * np.random.default_rng(0).standard_normal(len(time))
    return (loud * 0.5 * np.sin(2 * np.pi * 200 * time) + hiss).astype(np.float32)


def test_extent_is_that_of_the_loud_frames():
    assert speech_extent(speech(0.5, 1.0, 0.25)) == pytest.approx((0.5, 1.5), abs=0.026)
    assert speech_extent(np.zeros(800, np.float32)) == (0.0, 0.05)


def test_words_take_time_by_their_letters_without_punctuation():
    words = align_proportionally(speech(0.5, 1.0, 0.25), "A big, square's")
    assert [word.word for word in words] == ["A", "big,", "square's"]
    assert [word.end - word.start for word in words] == pytest.approx([1 / 11, 3 / 11, 7 / 11], rel=0.05)
    assert words[0].start == pytest.approx(0.5, abs=0.026)
    assert [word.start for word in words[1:]] == [word.end for word in words[:-1]]
    assert align_proportionally(speech(0, 1, 0), "  ") == []
