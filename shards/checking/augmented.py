"""Section of the page of check_shards that shows samples before and after augmentation."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from shards.augment.image import augment_colors, draw_crop
from shards.augment.randomness import SampleRandomness
from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS, Augment
from shards.augment.speech import augment_speech
from shards.checking.check_shard import text
from shards.checking.page import Section, card, recording
from shards.errors import UserError
from shards.html.render import data_url
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE, decode_audio, encode_audio
from shards.media.picture import MAX_STORED_PIXELS, Resize, decode_picture
from shards.reading.reader import Reader

_SAMPLES, _VARIANTS = 6, 3


@dataclass(frozen=True)
class Preview:
    """What is shown."""

    settings: Augment  # probabilities and ranges
    split: str
    image_size: int  # side of the square pictures in pixels
    resize: Resize  # how pictures become squares
    max_seconds: float  # longer captions are cut
    seed: int

    def section(self, m: Manifest) -> Section:
        """Return the section: a sample with each kind alone, then samples with what the probabilities choose.

        Raises:
            UserError: There is no such split.
        """
        alone = list(_kinds_alone(self.settings))
        samples = m.rows(self.split)
        rows = samples[np.linspace(0, len(samples) - 1, min(_SAMPLES, len(samples))).round().astype(int)].tolist()
        cards = [self._card(m, rows[0], [(Augment(), 0), *((settings, 0) for settings in alone)])]
        mixed = [(self.settings, epoch * len(m.key)) for epoch in range(_VARIANTS)]
        cards += [self._card(m, row, [(Augment(), 0), *mixed]) for row in rows]
        return Section(f"Augmentation: each kind alone, then {len(rows)} samples in {_VARIANTS} epochs", cards)

    def _card(self, m: Manifest, sample: int, variants: list[tuple[Augment, int]]) -> dict[str, Any]:
        title = text(m.image_id[sample])
        try:
            return card(title, [self._variant(m, sample, settings, sample + offset) for settings, offset in variants])
        except UserError as error:
            return card(title, problem=str(error))

    def _variant(self, m: Manifest, sample: int, settings: Augment, position: int) -> dict[str, Any]:
        reader, randomness = Reader(m), SampleRandomness(self.seed, position)

        def voices(generator: np.random.Generator, count: int) -> list[np.ndarray]:
            samples = m.rows(self.split)
            others = generator.permutation(samples[samples != sample])[:count]
            return [self._wave(reader, m, int(other)) for other in others]

        region = draw_crop(settings.image, randomness, self.resize)
        image = decode_picture(reader.picture(sample), self.image_size, MAX_STORED_PIXELS, self.resize, region)
        image = augment_colors(image, settings.image, randomness)
        wave = augment_speech(self._wave(reader, m, sample), settings.speech, randomness, voices)
        audio, buffer = encode_audio(wave, "flac"), io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
        applied = ", ".join(randomness.applied) or "unchanged"
        return recording(audio, applied, picture=data_url("image/png", buffer.getvalue()))

    def _wave(self, reader: Reader, m: Manifest, sample: int) -> np.ndarray:
        return decode_audio(reader.audio(m.captions(sample)[0]))[: int(self.max_seconds * SAMPLE_RATE)]


def _kinds_alone(settings: Augment) -> Iterator[Augment]:
    """Yield settings in which one kind is certain and the others are off, for each kind that is not off."""
    off: dict[str, Any] = dict.fromkeys(SPEECH_KINDS, 0.0)
    for kind in SPEECH_KINDS:
        if getattr(settings.speech, kind):
            yield Augment(speech=replace(settings.speech, **{**off, kind: 1.0}))
    off = dict.fromkeys(IMAGE_KINDS, 0.0)
    for kind in IMAGE_KINDS:
        if getattr(settings.image, kind):
            yield Augment(image=replace(settings.image, **{**off, kind: 1.0}))
