"""An exported model as a module of sentence-transformers (at least 5.4; the extra `st`).

    model = SentenceTransformer(folder, trust_remote_code=True)  # modules.json names the class of this file
    model.similarity(model.encode(["query.wav"]), model.encode(["photo.jpg"]))

The class is that of this installed package: a full name with several dots is imported, never looked up in the folder.
sentence-transformers requires `trust_remote_code=True` for classes not its own; modules.json then decides which.
`SentenceTransformer(modules=[SpeechImageModule.load(folder)])` runs no other class, whatever the folder holds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from shards.errors import UserError
from shards.media.audio import resample
from toolkit.indexing.items import ENDINGS, Modality
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel

_HUB_OPTIONS = {  # of sentence-transformers: of transformers
    "token": "token",
    "revision": "revision",
    "cache_folder": "cache_dir",
    "local_files_only": "local_files_only",
}


class SpeechImageModule(InputModule):
    """Embeds recordings and images, also mixed in one list."""

    def __init__(self, model: SpeechImageModel, processor: SpeechImageProcessor) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    @property
    def modalities(self) -> list[Any]:
        """Audio and images; "message" is the library's name for lists that mix them. Chat messages are refused."""
        return ["audio", "image", "message"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Decode inputs.

        Args:
            inputs: Paths of audio files and images; float arrays [n] at 16 kHz; {"array": [n], "sampling_rate": Hz};
                Pillow images; uint8 arrays [H, W, 3]; {"audio": ...} or {"image": ...} with one of these.
            prompt: Ignored, as there is no text.
            options: Ignored.

        Returns:
            Arguments of the model, and "order": int64 [B], the row of each input among images, then audio.

        Raises:
            UserError: An input is of another kind, or a file cannot be read.
        """
        rows: dict[Modality, list[int]] = {"image": [], "audio": []}
        values: dict[Modality, list[Any]] = {"image": [], "audio": []}
        for row, given in enumerate(inputs):
            modality, value = _decode(given)
            rows[modality].append(row)
            values[modality].append(value)
        features: dict[str, Any] = self.processor(values["image"] or None, values["audio"] or None)
        order = torch.tensor([*rows["image"], *rows["audio"]]).argsort()
        kinds = [modality for modality in rows if rows[modality]]
        return features | {"order": order, "modality": kinds[0] if len(kinds) == 1 else "message"}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add "sentence_embedding": float32 [B, D], of unit length."""
        parts: list[Tensor] = []
        if "images" in features:
            parts.append(self.model.get_image_features(features["images"]))
        if "waveforms" in features:
            parts.append(self.model.get_audio_features(features["waveforms"], features["lengths"]))
        return features | {"sentence_embedding": torch.cat(parts)[features["order"]]}

    def get_embedding_dimension(self) -> int:
        """Size of the embeddings."""
        return int(self.model.config.embed_dim)

    def save(self, output_path: str, *arguments: Any, **options: Any) -> None:
        """Write model and processor."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str | Path, *arguments: Any, **options: Any) -> "SpeechImageModule":
        """Load an exported model; called by `SentenceTransformer` with its own arguments.

        Args:
            model_name_or_path: Folder or hub id.
            arguments: Ignored.
            options: `token`, `revision`, `cache_folder` and `local_files_only` for the hub; `model_kwargs`, passed to
                the model's `from_pretrained`, such as `dtype`; others are ignored.

        Raises:
            UserError: There is no such model, or a backend other than "torch" is requested.
        """
        if (backend := options.get("backend", "torch")) != "torch":
            raise UserError(f"backend {backend!r}: a model of this toolkit runs with backend 'torch' only")
        hub = {name: options[key] for key, name in _HUB_OPTIONS.items() if options.get(key)}
        wanted = {"dtype": "auto", **hub, **(options.get("model_kwargs") or {})}
        model = SpeechImageModel.from_pretrained(model_name_or_path, **wanted)
        return cls(model, SpeechImageProcessor.from_pretrained(model_name_or_path, **hub))


def _decode(given: Any) -> tuple[Modality, Any]:
    """Return the modality of an input, and what the processor takes of it."""
    if isinstance(given, dict) and len(given) == 1 and given.keys() <= {"audio", "image"}:
        (modality, inner), *_ = given.items()
        own, value = _decode(inner)
        if own != modality:
            raise UserError(f"an input under {modality!r} is of the modality {own!r}")
        return own, value
    if isinstance(given, dict) and {"array", "sampling_rate"} <= given.keys():
        wave = np.asarray(given["array"], dtype=np.float32)
        return "audio", resample(wave, int(given["sampling_rate"])) if wave.ndim == 1 else wave
    if isinstance(given, (str, Path)):
        ending = Path(given).suffix.lower()
        for modality, endings in ENDINGS.items():
            if ending in endings:
                return modality, Path(given)
        raise UserError(f"{given}: expected a file that ends with one of {', '.join(sum(ENDINGS.values(), ()))}")
    if isinstance(given, Image.Image):
        return "image", given
    if isinstance(given, (np.ndarray, Tensor)):
        values = np.asarray(given)
        if values.ndim == 1:
            return "audio", values
        if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
            return "image", Image.fromarray(values)
        raise UserError(
            f"an array {list(values.shape)} of {values.dtype}: expected audio [n] or an image uint8 [H, W, 3]"
        )
    raise UserError(f"an input is {type(given).__name__}: expected a path, an array or an image")
