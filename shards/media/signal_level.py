"""How loud recordings are: what no one can use is refused, and what someone should hear is named.

Samples lie in [-1, 1]. The rules, for files of any format:

- A peak up to `MAX_PEAK` is clipped to 1, as lossy codecs and resampling overshoot a little. Beyond, the file is
  refused: floats at the scale of integers would become square waves, and nothing tells what to divide them by.
- A peak that 16 bits store as 0 is refused, unless all samples are 0: 16-bit values in 32-bit words have one, or floats
  that were divided twice.
- Channels are averaged. If that cancels them (see `ChannelMixer`), the loudest one is kept alone, and named.
- Recordings that are silent, very quiet or clipped are stored as they are, and named (see `LevelMeter`).
"""

from dataclasses import dataclass, field

import numpy as np

from shards.errors import UserError

MAX_PEAK = 2.0

_SMALLEST = 0.5 / 32768  # of which nothing is left in 16 bits
_SILENT = 1e-4  # largest sample of a recording in which nothing can be heard
_QUIET = 1 / 256  # 24-bit values in 32-bit words, or 16-bit values in 24-bit words, do not pass it
_FULL_SCALE = 0.999
_CLIPPED = 1e-3  # share of samples at full scale
_CANCELLED = 0.1  # of the energy that the mean of unrelated channels has


def peak_of(samples: np.ndarray) -> float:
    """The largest magnitude of some samples; not finite if one of them is not, 0 if there are none."""
    return float(max(samples.max(), -samples.min())) if samples.size else 0.0


def check_peak(peak: float, name: str) -> None:
    """See that a decoded recording is finite and has the scale of audio.

    Raises:
        UserError: It is not.
    """
    if not np.isfinite(peak):
        raise UserError(f"{name}: holds samples that are not finite")
    if peak > MAX_PEAK:
        mend = "divide them by their full scale, 32768 if they were 16-bit integers"
        raise UserError(f"{name}: holds samples up to {peak:,.4g}, full scale is 1: {mend}, and write the file anew")


def check_audible(peak: float, name: str) -> None:
    """See that something of a recording is left when it is stored; all zeros may be.

    Raises:
        UserError: There is not.
    """
    if 0 < peak < _SMALLEST:
        why = "16-bit values in 32-bit words have such a peak: scale them up, and write the file anew"
        raise UserError(
            f"{name}: its largest sample is {peak:.1e} of full scale, which 16 bits store as silence; {why}"
        )


@dataclass
class LevelMeter:
    """Measures a recording, block by block.

    Attributes:
        peak: Largest magnitude so far; not finite if a sample is not.
        samples: How many there were.
        at_full_scale: How many of them have a magnitude of 0.999 or more.
    """

    peak: float = 0.0
    samples: int = 0
    at_full_scale: int = 0

    def add(self, block: np.ndarray) -> None:
        """Take in more samples, float32 [n]."""
        peak = peak_of(block)
        self.peak = float(np.maximum(self.peak, peak))
        self.samples += len(block)
        if peak >= _FULL_SCALE:
            self.at_full_scale += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE))

    @property
    def warning(self) -> str | None:
        """What someone should know of the recording, if anything."""
        if self.peak < _SILENT:
            return "silence"
        if self.peak < _QUIET:
            return f"very quiet: its peak is {20 * np.log10(self.peak):.0f} dB of full scale"
        if self.at_full_scale >= _CLIPPED * self.samples:
            return f"clipped: {100 * self.at_full_scale / self.samples:.2g} % of its samples are at full scale"
        return None


def level_warning(wave: np.ndarray) -> str | None:
    """Say of a recording, float32 [n], that it is clipped, silent or very quiet; None if it is none of these."""
    meter = LevelMeter()
    meter.add(wave)
    return meter.warning


@dataclass
class ChannelMixer:
    """Averages channels, block by block, and tells whether that cancels them.

    They cancel if the energy of their mean is less than a tenth of what it is for unrelated channels, which is the
    channels' mean energy divided by their number: for stereo, if it is less than 1/20 of the channels' mean energy. A
    balanced line that was recorded as stereo is such a case.
    """

    _mixed: float = 0.0
    _energies: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, block: np.ndarray) -> np.ndarray:
        """Mix a block, float32 [channels, n] to [n]."""
        if len(block) == 1:
            return block[0]
        block = np.ascontiguousarray(block)  # what follows is many times as fast along contiguous channels
        with np.errstate(over="ignore", invalid="ignore"):  # whatever is not finite is found in what this gives
            mono: np.ndarray = block.mean(axis=0)
            self._mixed += float(np.dot(mono, mono))
            self._energies = self._energies + np.einsum("cn,cn->c", block, block)
        return mono

    @property
    def kept(self) -> int | None:
        """The loudest channel, from 0, if the channels cancel; it is to be used in place of their mean."""
        channels = len(self._energies)
        if channels == 1 or not self._mixed < _CANCELLED * self._energies.mean() / channels:
            return None
        return int(self._energies.argmax())
