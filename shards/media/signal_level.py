"""Signal levels of audio: unusable levels are rejected, suspicious ones give a warning.

Samples lie in [-1, 1]. The rules, for files of any format:

- A peak up to `MAX_PEAK` is clipped to 1, since lossy codecs and resampling overshoot slightly. A file with a higher
  peak is rejected: floats at the scale of integers would become square waves, and their full scale is unknown.
- A nonzero peak that 16 bits store as 0 is rejected: it comes from 16-bit values in 32-bit words, or from floats that
  were divided twice.
- Channels are averaged. If they cancel (see `ChannelMixer`), only the loudest one is kept, with a warning.
- Silent, very quiet or clipped audio is stored unchanged, with a warning (see `LevelMeter`).
"""

from dataclasses import dataclass, field

import numpy as np

from shards.errors import UserError

MAX_PEAK = 2.0

_SMALLEST = 0.5 / 32768  # smallest magnitude that 16 bits do not round to 0
_SILENT = 1e-4  # peaks below are inaudible
_QUIET = 1 / 256  # upper limit of 24-bit values in 32-bit words, and of 16-bit values in 24-bit words
_FULL_SCALE = 0.999
_CLIPPED = 1e-3  # share of samples at full scale
_CANCELLED = 0.1  # fraction of the energy that the mean of unrelated channels has


def peak_of(samples: np.ndarray) -> float:
    """Return the largest magnitude; not finite if a sample is not, 0 without samples."""
    return float(max(samples.max(), -samples.min())) if samples.size else 0.0


def check_peak(peak: float, name: str) -> None:
    """Check that decoded audio is finite and has a valid scale.

    Raises:
        UserError: The peak is not finite or above `MAX_PEAK`.
    """
    if not np.isfinite(peak):
        raise UserError(f"{name}: has samples that are not finite")
    if peak > MAX_PEAK:
        hint = "divide them by their full scale, 32768 if they were 16-bit integers"
        raise UserError(f"{name}: has samples up to {peak:,.4g}, full scale is 1: {hint}, and rewrite the file")


def check_audible(peak: float, name: str) -> None:
    """Check that 16 bits do not store nonzero audio as silence.

    Raises:
        UserError: The peak is nonzero, but 16 bits store it as 0.
    """
    if 0 < peak < _SMALLEST:
        cause = "16-bit values in 32-bit words have such a peak: scale them up, and rewrite the file"
        raise UserError(
            f"{name}: its largest sample is {peak:.1e} of full scale, which 16 bits store as silence; {cause}"
        )


@dataclass
class LevelMeter:
    """Measures the level of audio, block by block."""

    peak: float = 0.0  # largest magnitude so far; not finite if a sample is not
    samples: int = 0  # number of samples so far
    at_full_scale: int = 0  # number of samples with a magnitude of 0.999 or more

    def add(self, block: np.ndarray) -> None:
        """Add samples, float32 [n]."""
        peak = peak_of(block)
        self.peak = float(np.maximum(self.peak, peak))
        self.samples += len(block)
        if peak >= _FULL_SCALE:
            self.at_full_scale += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE))

    @property
    def warning(self) -> str | None:
        """Description of a suspicious level; None for a normal one."""
        if self.peak < _SILENT:
            return "silence"
        if self.peak < _QUIET:
            return f"very quiet: its peak is {20 * np.log10(self.peak):.0f} dB of full scale"
        if self.at_full_scale >= _CLIPPED * self.samples:
            return f"clipped: {100 * self.at_full_scale / self.samples:.2g} % of its samples are at full scale"
        return None


def level_warning(wave: np.ndarray) -> str | None:
    """Describe the level of float32 [n] if it is clipped, silent or very quiet; None otherwise."""
    meter = LevelMeter()
    meter.add(wave)
    return meter.warning


@dataclass
class ChannelMixer:
    """Averages channels, block by block, and detects whether they cancel.

    They cancel if the energy of their mean is less than a tenth of that of unrelated channels, which is the channels'
    mean energy divided by their number: for stereo, if it is less than 1/20 of the channels' mean energy. An example is
    a balanced line that was recorded as stereo.
    """

    _mixed: float = 0.0
    _energies: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, block: np.ndarray) -> np.ndarray:
        """Mix a block, float32 [channels, n] to [n]."""
        if len(block) == 1:
            return block[0]
        block = np.ascontiguousarray(block)  # much faster along contiguous channels
        with np.errstate(over="ignore", invalid="ignore"):  # the peak check finds values that are not finite
            mono: np.ndarray = block.mean(axis=0)
            self._mixed += float(np.dot(mono, mono))
            self._energies = self._energies + np.einsum("cn,cn->c", block, block)
        return mono

    @property
    def kept(self) -> int | None:
        """Index of the loudest channel, to be used in place of the mean, if the channels cancel; None otherwise."""
        channels = len(self._energies)
        if channels == 1 or not self._mixed < _CANCELLED * self._energies.mean() / channels:
            return None
        return int(self._energies.argmax())
