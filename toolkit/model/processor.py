"""Preprocessing: from image and audio files or arrays to the model's inputs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards.errors import UserError
from shards.media.audio import SAMPLE_RATE, read_audio
from shards.media.picture import Resize, decode_picture, read_picture

FILE = "preprocessor_config.json"
MAX_FILE_SECONDS = 3600.0  # longer audio files are refused


@dataclass(frozen=True)
class SpeechImageProcessor:
    """Prepares inputs like the training data; saved with the model's weights.

    Attributes:
        image_size: Side of the square model input, in pixels.
        max_seconds: Longer speech is truncated.
        sampling_rate: Hz, of input arrays and output waveforms; files are resampled.
        resize: How pictures are made square (see `decode_picture`).
        short_side: Length in pixels that the short side is first reduced to, as in the shards; None: 2 * `image_size`.
        quality: JPEG quality of the reduced picture, as in the shards.
    """

    image_size: int
    max_seconds: float
    sampling_rate: int = SAMPLE_RATE
    resize: Resize = "crop"
    # Defaults for folders that were written without these values.
    short_side: int | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality!r}, expected 1 to 100")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side!r}, expected a number of pixels")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize is {self.resize!r}, expected one of {', '.join(get_args(Resize))}")

    def __call__(
        self,
        images: Sequence[Image.Image | Path | str] | None = None,
        speech: Sequence[np.ndarray | Path | str] | None = None,
    ) -> dict[str, Tensor]:
        """Prepare pictures, speech or both.

        Args:
            images: Pillow images or image files.
            speech: Float arrays [n] in [-1, 1] at `sampling_rate`, or audio files.

        Returns:
            The model's keyword arguments: `images` uint8 [B, 3, S, S]; `waveforms` float32 [B, T], zero-padded, and
            `lengths` int64 [B] in samples.

        Raises:
            UserError: A file cannot be read, or an array is not a waveform.
        """
        inputs: dict[str, Tensor] = {}
        if images is not None:
            inputs["images"] = torch.from_numpy(np.stack([self._picture(image) for image in images]))
        if speech is not None:
            waves = [torch.from_numpy(self._waveform(item)) for item in speech]
            inputs["waveforms"] = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
            inputs["lengths"] = torch.tensor([len(wave) for wave in waves])
        return inputs

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        values = asdict(self) | {"processor_class": type(self).__name__}
        (Path(folder) / FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "SpeechImageProcessor":
        """Read the file that `save_pretrained` wrote.

        Args:
            source: Folder or hub id.
            options: Those of transformers' `cached_file` apply to a hub id, such as `revision`; others are ignored.

        Raises:
            UserError: The file is missing or was not written by this class.
        """
        path = Path(source) / FILE if Path(source).is_dir() else _download(str(source), options)
        try:
            values = json.loads(path.read_text())
            if (written_by := values.pop("processor_class", cls.__name__)) != cls.__name__:
                raise ValueError(f"written by {written_by}")
            return cls(**values)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: pass a folder that training exported") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a processor of this toolkit ({error})") from None

    def _picture(self, source: Image.Image | Path | str) -> np.ndarray:
        # Encode as JPEG like the shards do, so that the pixels equal those in training.
        source = Path(source) if isinstance(source, str) else source
        stored = read_picture(source, self.short_side or 2 * self.image_size, self.quality)
        return decode_picture(stored, self.image_size, resize=self.resize)

    def _waveform(self, source: np.ndarray | Path | str) -> np.ndarray:
        if isinstance(source, (str, Path)):
            wave = read_audio(Path(source), MAX_FILE_SECONDS)
        else:
            wave = np.asarray(source)
            if wave.ndim != 1 or not len(wave) or not np.issubdtype(wave.dtype, np.floating):
                raise UserError(f"speech: expected a float array [n], n > 0, got {wave.dtype} of shape {wave.shape}")
        return np.ascontiguousarray(wave[: int(self.max_seconds * self.sampling_rate)], dtype=np.float32)


def _download(source: str, options: dict[str, Any]) -> Path:
    """Fetch the file of a hub id, or find it in the cache; the path as it is where there is neither."""
    from transformers.utils import cached_file

    kept = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        found = cached_file(source, FILE, **{key: options[key] for key in kept if key in options})
    except OSError as error:  # of the connection, of the name, of the hub
        raise UserError(f"{source}: no such folder, and not on the hub: {str(error).splitlines()[0]}") from None
    return Path(found or source)
