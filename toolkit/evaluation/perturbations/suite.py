"""The robustness suite: clean embeddings once, then for each condition the perturbed modality against the clean other.

Noise, rooms and places are functions of seed, kind and sample, and batches do not depend on the number of ranks, so any
number of ranks measures the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.files import file_sha256
from shards.manifest import Manifest
from shards.media.audio import decode_audio, read_audio
from shards.media.picture import decode_picture
from shards.progress import progress_bar
from toolkit.config.schema import Config
from toolkit.evaluation.encode import ModelInputs, ProcessInfo, encode_captions, encode_images
from toolkit.evaluation.perturbations.image import crop_region, perturb_image
from toolkit.evaluation.perturbations.kinds import KINDS, NOISE, generator_of
from toolkit.evaluation.perturbations.speech import Background, duration_factor, perturb_speech
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import summarize_recall
from toolkit.evaluation.robustness import CLEAN, Condition, Robustness, save_robustness
from toolkit.indexing.items import ENDINGS
from toolkit.rank_sync import run_on_all_ranks

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_VOICES = 4  # other captions of the babble
_MAX_FILE_SECONDS = 3600.0  # of a file of noise
_OPEN_FILES = 32  # decoded files of noise that are kept
_CANDIDATES = 10


@dataclass(frozen=True)
class Noise:
    """Audio files, and the SHA-256 of their contents."""

    files: tuple[Path, ...]
    checksum: str


def find_noise(folder: Path) -> Noise:
    """Find the audio files of a folder and of those in it.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS["audio"] and path.is_file())
    if not files:
        raise UserError(f"--noise {folder}: no audio files in this folder (expected {', '.join(ENDINGS['audio'])})")
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--noise {folder}: {error.filename} cannot be read: {error.strerror}") from None
    return Noise(tuple(files), digest.hexdigest())


@dataclass
class Suite:
    """Measures conditions with one model on some pictures of a split; every rank makes the same calls.

    Attributes:
        model: In evaluation mode, on the device.
        manifest: The shards.
        split: Name of the split, whose captions are the voices of the babble.
        samples: Int64 [P], numbers of the pictures that are measured.
        config: Sections `data` and `evaluation` are used.
        seed: Seed of the perturbations.
        process: This process.
        noise: For the kind `noise`.
    """

    model: "SpeechImageModel"
    manifest: Manifest
    split: str
    samples: np.ndarray
    config: Config
    seed: int
    process: ProcessInfo
    noise: Noise | None = None

    def __post_init__(self) -> None:
        self.inputs = _PerturbedInputs(self.manifest, self.samples, self.config)
        self._read_noise = lru_cache(_OPEN_FILES)(lambda path: read_audio(path, _MAX_FILE_SECONDS))

    def complete(self, result: Robustness, missing: Sequence[tuple[str, float | None]]) -> Robustness:
        """Measure the missing conditions of a result; rank 0 saves it after each of them.

        Raises:
            UserError: As for `measure`, or the result cannot be saved.
        """
        rank, ranks = self.process.rank, self.process.world_size
        with progress_bar(len(missing), "conditions", "robustness", rank == 0) as progress:
            for kind, level in missing:
                result = replace(result, conditions=(*result.conditions, self.measure(kind, level)))
                run_on_all_ranks(partial(save_robustness, result) if rank == 0 else list, rank, ranks)
                progress(1)
        return result

    @torch.no_grad()
    def measure(self, kind: str, level: float | None) -> Condition:
        """Measure recall in one condition.

        Args:
            kind: `clean`, or a key of `KINDS`.
            level: Its level; None for clean.

        Raises:
            UserError: A sample or a file of noise cannot be read, or there are no other captions for the babble.
        """
        if kind == CLEAN or level is None:
            return self._condition(Condition(CLEAN, None, None, "", None, {}, {}, 0.0), self._speech, self._images)
        files = self.noise.checksum if self.noise and kind == NOISE else None
        condition = Condition(kind, KINDS[kind].modality, level, KINDS[kind].unit, files, {}, {}, 0.0)
        if condition.modality == "image":
            return self._condition(condition, self._speech, self._encode_images(kind, level))
        return self._condition(condition, self._encode_speech(kind, level), self._images)

    @cached_property
    def _images(self) -> Tensor:
        return encode_images(self.model, self.inputs.image, len(self.samples), self.config, self.process)[0]

    @cached_property
    def _speech(self) -> Tensor:
        return encode_captions(self.model, self.inputs.speech, self._seconds(1.0), self.config, self.process)[0]

    def _encode_images(self, kind: str, level: float) -> Tensor:
        def load(index: int) -> Tensor:
            return self.inputs.perturbed_image(index, kind, level, self.seed)

        return encode_images(self.model, load, len(self.samples), self.config, self.process)[0]

    def _encode_speech(self, kind: str, level: float) -> Tensor:
        def load(index: int) -> Tensor:
            return self.inputs.perturbed_speech(index, kind, level, self.seed, self._background(kind, index))

        seconds = self._seconds(duration_factor(kind, level))
        return encode_captions(self.model, load, seconds, self.config, self.process)[0]

    def _seconds(self, factor: float) -> np.ndarray:
        durations = self.manifest.duration[self.inputs.captions] * np.float32(factor)
        return durations.clip(max=self.config.evaluation.max_seconds)

    def _background(self, kind: str, index: int) -> Background:
        """Return what is heard behind a caption: files for noise, else captions of other pictures of the split."""
        if kind == NOISE:
            files = self.noise.files if self.noise else ()
            return lambda generator: [self._read_noise(files[int(generator.integers(len(files)))])]
        rows, owners = self._voices
        others = rows[owners != self.samples[self.inputs.caption_picture[index]]]
        if not len(others):
            raise UserError(f"babble: split {self.split} of {self.manifest.location} has no captions of other pictures")

        def voices(generator: np.random.Generator) -> list[np.ndarray]:
            chosen = generator.choice(others, min(_VOICES, len(others)), replace=False)
            return [self.inputs.caption(row) for row in chosen.tolist()]

        return voices

    @cached_property
    def _voices(self) -> tuple[np.ndarray, np.ndarray]:
        """Caption rows of the split int64 [C], and the sample of each."""
        samples = self.manifest.rows(self.split)
        spans = [np.asarray(self.manifest.captions(sample), dtype=np.int64) for sample in samples.tolist()]
        return np.concatenate(spans), np.repeat(samples, [len(span) for span in spans])

    def _condition(self, condition: Condition, speech: Tensor, images: Tensor) -> Condition:
        caption_picture = torch.from_numpy(self.inputs.caption_picture)
        ranks = self.process.rank, self.process.world_size
        recall = summarize_recall(*rank_both(speech, images, caption_picture, _CANDIDATES, *ranks))
        figures = {name: recall[name] for name in ("speech_to_image", "image_to_speech")}
        return replace(condition, mean=recall["mean_R@1"], **figures)


class _PerturbedInputs(ModelInputs):
    """Decodes and perturbs the model's inputs; a caption is truncated to the longest one only after that."""

    def perturbed_image(self, index: int, kind: str, level: float, seed: int) -> Tensor:
        """Decode a picture and perturb it: uint8 [3, S, S]."""
        sample = int(self.samples[index])

        def load() -> np.ndarray:
            region = crop_region(level, seed, sample, self.resize) if kind == "crop" else None
            image = decode_picture(self.reader.picture(sample), self.image_size, resize=self.resize, region=region)
            return image if kind == "crop" else perturb_image(image, kind, level, generator_of(seed, kind, sample))

        return self._decode(sample, load)

    def perturbed_speech(self, index: int, kind: str, level: float, seed: int, background: Background) -> Tensor:
        """Decode a caption and perturb it: float32 [n]."""
        row = int(self.captions[index])
        wave = self.caption(row)
        changed = perturb_speech(wave, kind, level, generator_of(seed, kind, row), background)
        return torch.from_numpy(np.ascontiguousarray(changed[: self.max_samples]))

    def caption(self, row: int) -> np.ndarray:
        """Decode a caption of any picture: float32 [n]."""
        sample = int(np.searchsorted(self.manifest.first_caption, row, side="right")) - 1
        return self._decode(sample, lambda: decode_audio(self.reader.audio(row))).numpy()
