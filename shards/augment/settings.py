"""Settings of the augmentation, which are the section `data.augment` of the configuration.

A field named as a kind of augmentation is the probability that it is applied to a sample. Lists are ranges
[low, high] from which a value is drawn.
"""

from dataclasses import dataclass, field


@dataclass
class SpeechAugment:
    """Augmentation of the waveform, in this order; probabilities are per caption."""

    speed: float = 0.0  # probability of resampling, which changes tempo, pitch and formants together
    speed_range: list[float] = field(default_factory=lambda: [0.9, 1.1])  # factor of the tempo
    tempo: float = 0.0  # probability of another tempo at the same pitch
    tempo_range: list[float] = field(default_factory=lambda: [0.85, 1.2])  # factor of the tempo
    pitch: float = 0.0  # probability of another pitch with the same tempo and formants
    pitch_semitones: list[float] = field(default_factory=lambda: [-4.0, 4.0])  # change of the pitch in semitones
    formants: float = 0.0  # probability of another length of the vocal tract: formants move, the pitch stays
    formants_range: list[float] = field(default_factory=lambda: [0.87, 1.15])  # factor of the formants' frequencies
    reverberation: float = 0.0  # probability of a room
    reverberation_seconds: list[float] = field(default_factory=lambda: [0.1, 0.6])  # reverberation time in s (RT60)
    reverberation_db: list[float] = field(default_factory=lambda: [0.0, 15.0])  # direct to reverberant energy in dB
    noise: float = 0.0  # probability of stationary noise, from white to brown
    noise_snr: list[float] = field(default_factory=lambda: [5.0, 30.0])  # signal-to-noise ratio in dB
    babble: float = 0.0  # probability of other utterances of the split in the background
    babble_snr: list[float] = field(default_factory=lambda: [5.0, 25.0])  # signal-to-noise ratio in dB
    babble_voices: int = 3  # largest number of utterances in the background
    equalizer: float = 0.0  # probability of a random, smooth frequency response
    equalizer_db: list[float] = field(default_factory=lambda: [-6.0, 6.0])  # gain in dB of each of 7 bands
    band_limit: float = 0.0  # probability of a band-pass filter, such as a telephone's
    band_low: list[float] = field(default_factory=lambda: [50.0, 400.0])  # lower cutoff in Hz
    band_high: list[float] = field(default_factory=lambda: [3000.0, 7500.0])  # upper cutoff in Hz
    frequency_mask: float = 0.0  # probability of removed bands (SpecAugment)
    frequency_masks: int = 2  # largest number of removed bands
    frequency_mask_width: list[float] = field(default_factory=lambda: [0.02, 0.1])  # width as a share of the mel scale
    time_mask: float = 0.0  # probability of silenced spans (SpecAugment)
    time_masks: int = 2  # largest number of silenced spans
    time_mask_seconds: list[float] = field(default_factory=lambda: [0.02, 0.1])  # in s; at most a tenth of the caption
    gain: float = 0.0  # probability of another level
    gain_db: list[float] = field(default_factory=lambda: [-12.0, 6.0])  # change in dB; peaks are kept within full scale


@dataclass
class ImageAugment:
    """Augmentation of the picture; never mirrored, as captions name left and right."""

    crop: float = 0.0  # probability of a random crop, resized to the square, in place of `data.resize`
    crop_area: list[float] = field(default_factory=lambda: [0.6, 1.0])  # share of the largest crop of its aspect ratio
    crop_aspect: list[float] = field(default_factory=lambda: [0.8, 1.25])  # width to height, relative to `resize`'s
    color: float = 0.0  # probability of other brightness, contrast, saturation and hue
    brightness: list[float] = field(default_factory=lambda: [0.7, 1.3])  # factor of the values
    contrast: list[float] = field(default_factory=lambda: [0.7, 1.3])  # factor of the distance from the mean luminance
    saturation: list[float] = field(default_factory=lambda: [0.7, 1.3])  # factor of the distance from gray
    hue: list[float] = field(default_factory=lambda: [-0.02, 0.02])  # rotation in turns; a large one renames colors


@dataclass
class Augment:
    """Data augmentation in training, in the loader's workers; off by default."""

    speech: SpeechAugment = field(default_factory=SpeechAugment)
    image: ImageAugment = field(default_factory=ImageAugment)

    @property
    def enabled(self) -> bool:
        """Whether any kind has a probability above 0."""
        return any(getattr(self.speech, kind) for kind in SPEECH_KINDS) or any(
            getattr(self.image, kind) for kind in IMAGE_KINDS
        )


SPEECH_KINDS = (
    *("speed", "tempo", "pitch", "formants", "reverberation", "noise", "babble", "equalizer", "band_limit"),
    *("frequency_mask", "time_mask", "gain"),
)
IMAGE_KINDS = ("crop", "color")
