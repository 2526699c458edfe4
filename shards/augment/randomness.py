"""Random numbers of a sample: a function of the seed, its position in the training data, and the kind of augmentation.

A sample is thus augmented the same on any rank, in any worker and after a restart, and differently in each epoch. Each
kind has an independent stream, so that switching one on does not change the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Numbers of the streams. They are part of what a run reproduces: append, never reorder.
# Stream 0 is that of `MicroBatches._crop` in `shards/reading/dataset.py`, which crops captions that are too long.
_STREAMS = {
    name: number
    for number, name in enumerate(
        (
            *("speed", "tempo", "pitch", "formants", "reverberation", "noise", "babble", "equalizer", "band_limit"),
            *("frequency_mask", "time_mask", "gain", "crop", "color"),
        ),
        start=1,
    )
}


@dataclass(frozen=True)
class SampleRandomness:
    """Random numbers of one sample."""

    seed: int  # of the run
    position: int  # of the sample in the training data: step * batch size + index
    applied: list[str] = field(default_factory=list)  # descriptions of the kinds that were applied, for display

    def draw(self, kind: str, probability: float) -> np.random.Generator | None:
        """Return the generator of a kind, with the given probability; None otherwise."""
        if probability <= 0:
            return None
        counter = [0, 0, 0, _STREAMS[kind]]  # far apart: a stream would have to draw 2^192 numbers to meet the next
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.position], counter=counter))
        return generator if generator.random() < probability else None

    def note(self, kind: str, *values: float, unit: str = "") -> None:
        """Record a kind that was applied, with its values."""
        numbers = " ".join(f"{value:.3g}" for value in values)
        self.applied.append(" ".join(word for word in (kind.replace("_", " "), numbers, unit) if word))


def uniform(generator: np.random.Generator, bounds: Sequence[float]) -> float:
    """Draw from the uniform distribution between two bounds."""
    low, high = bounds
    return low + (high - low) * generator.random()
