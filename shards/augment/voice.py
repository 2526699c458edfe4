"""Other voices from one: speed, tempo, pitch and formants of a waveform, float32 [n] at 16 kHz.

numpy alone, since its FFT gives the same bits whatever the number of threads. torchaudio.functional.speed and
pitch_shift would compute a filter bank for each factor, and pitch_shift moves the formants with the pitch.
"""

import numpy as np

_FRAME, _HOP, _SEARCH = 640, 320, 160  # samples: frames of 40 ms, moved by up to 10 ms to fit the one before
_PADDING = 1024  # zeros in which the filter of the resampling dies away
_FFT, _FFT_HOP = 512, 256  # samples: spectra of 32 ms every 16 ms
_LIFTER = 30  # cepstral coefficients of the envelope: it follows formants, not harmonics of up to 500 Hz
_MAX_LOG_GAIN = 3.0  # 26 dB, in nepers


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Resample, as Kaldi's speed perturbation does: tempo, pitch and formants change by the same factor.

    Args:
        wave: float32 [n].
        factor: Above 1: faster and higher.

    Returns:
        float32 [round(n / factor)], at least one sample. Frequencies that would exceed 8 kHz are removed.
    """
    if factor == 1:
        return wave
    length = max(1, round(len(wave) / factor))
    size, resized = _sizes(len(wave) + _PADDING, factor)
    spectrum = np.fft.rfft(wave, size)[: resized // 2 + 1]
    resampled = np.fft.irfft(spectrum, resized) * (resized / size)
    return resampled[:length].astype(np.float32)


def change_tempo(wave: np.ndarray, factor: float) -> np.ndarray:
    """Change the tempo and keep the pitch, by overlapping frames of similar phase.

    Source: Verhelst, Roelands, "An overlap-add technique based on waveform similarity (WSOLA)", ICASSP 1993.

    Args:
        wave: float32 [n].
        factor: Above 1: faster.

    Returns:
        float32 [round(n / factor)], at least one sample.
    """
    if factor == 1:
        return wave
    length = max(1, round(len(wave) / factor))
    frames = -(-length // _HOP) + 1
    # The first frame is centered on sample 0: half of it and the search lie before.
    before = _HOP + _SEARCH
    behind = max(0, round(frames * _HOP * factor) - len(wave)) + 2 * _FRAME + _SEARCH
    padded = np.pad(wave, (before, behind))
    energy = np.concatenate([[0.0], np.cumsum(np.square(padded, dtype=np.float64))])
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME) / _FRAME)).astype(np.float32)
    output = np.zeros((frames + 1) * _HOP, np.float32)
    start = _SEARCH
    for number in range(frames):
        if number:
            first = round(number * _HOP * factor)  # of the search; the frame that keeps time is _SEARCH later
            follows = padded[start + _HOP : start + _HOP + _FRAME]
            region = padded[first : first + _FRAME + 2 * _SEARCH]
            ends = energy[first + _FRAME : first + _FRAME + 2 * _SEARCH + 1]
            energies = ends - energy[first : first + 2 * _SEARCH + 1]
            # Every second sample is enough: voices have little energy above 4 kHz.
            similarity = np.correlate(region[::2], follows[::2]) / np.sqrt(energies[::2] + 1e-6)
            start = first + 2 * int(similarity.argmax())
        output[number * _HOP : number * _HOP + _FRAME] += window * padded[start : start + _FRAME]
    return output[_HOP : _HOP + length]


def warp_formants(wave: np.ndarray, factor: float) -> np.ndarray:
    """Stretch the spectral envelope along the frequency axis, and keep pitch and tempo.

    This is vocal tract length perturbation (Jaitly, Hinton, 2013) of the waveform: a vocal tract shorter by a factor
    has formants higher by it. The envelope is the cepstrum's beginning.

    Args:
        wave: float32 [n].
        factor: Above 1: higher formants, as of a shorter vocal tract.

    Returns:
        float32 [n].
    """
    if factor == 1:
        return wave
    window = np.sin(np.pi * np.arange(_FFT) / _FFT).astype(np.float32)  # its squares sum to 1
    behind = _FFT + -len(wave) % _FFT_HOP
    padded = np.pad(wave, (_FFT, behind))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_FFT_HOP] * window
    spectra = np.fft.rfft(frames)
    cepstra = np.fft.irfft(np.log(np.abs(spectra) + 1e-4))
    cepstra[:, _LIFTER : _FFT - _LIFTER + 1] = 0
    envelope = np.fft.rfft(cepstra).real
    source = np.minimum(np.arange(_FFT // 2 + 1) / factor, _FFT // 2 - 1e-3)  # bin whose envelope a bin receives
    below, weight = source.astype(int), (source % 1).astype(np.float32)
    warped = envelope[:, below] * (1 - weight) + envelope[:, below + 1] * weight
    gain = np.exp(np.clip(warped - envelope, -_MAX_LOG_GAIN, _MAX_LOG_GAIN))
    shaped = (np.fft.irfft(spectra * gain) * window).astype(np.float32)
    output = np.zeros((len(shaped) + _FFT // _FFT_HOP - 1, _FFT_HOP), np.float32)
    for part in range(_FFT // _FFT_HOP):
        output[part : part + len(shaped)] += shaped[:, part * _FFT_HOP : (part + 1) * _FFT_HOP]
    return output.ravel()[_FFT : _FFT + len(wave)]


def change_voice(wave: np.ndarray, tempo: float = 1.0, pitch: float = 1.0, formants: float = 1.0) -> np.ndarray:
    """Change tempo, pitch and formants independently, each by a factor: float32 [n] to [round(n / tempo)]."""
    if pitch == 1:
        return warp_formants(change_tempo(wave, tempo), formants)
    resampled = change_speed(wave, pitch)
    length = max(1, round(len(wave) / tempo))
    stretched = change_tempo(resampled, len(resampled) / length)
    return warp_formants(stretched, formants / pitch)


def fast_size(size: int) -> int:
    """Return the smallest number from `size` whose FFT is fast: an even product of 2, 3 and 5."""
    return int(_FAST_SIZES[np.searchsorted(_FAST_SIZES, size)]) if size <= _FAST_SIZES[-1] else size


def _sizes(size: int, factor: float) -> tuple[int, int]:
    """Return sizes of two FFTs whose ratio is a factor: the first at least `size`, the second without large primes."""
    first = np.searchsorted(_FAST_SIZES, size)
    candidates = [int(one) for one in _FAST_SIZES[first : first + 24]] or [size]
    pairs = [(one, max(1, round(one / factor))) for one in candidates]
    return min(pairs, key=lambda pair: _largest_prime_factor(pair[1]) * pair[0])


def _largest_prime_factor(number: int) -> int:
    for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47):
        while number % prime == 0:
            number //= prime
    return max(7, number)  # up to 7, all are as fast


_LARGEST_FFT = 1 << 24
_FAST_SIZES = np.array(
    sorted(
        size for a in range(1, 25) for b in range(16) for c in range(11) if (size := 2**a * 3**b * 5**c) <= _LARGEST_FFT
    )
)
