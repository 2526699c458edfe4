"""Baselines by text: recognized speech, or the true transcripts, retrieve images through a text-image model.

    speech -> recognizer -> text -> CLIP's text encoder  -> embedding
    picture               -> CLIP's image encoder -> embedding

The row of the true transcripts ("oracle text") is what a recognizer without errors would reach.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from shards.errors import UserError
from shards.files import read_object, read_records
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import open_picture
from shards.progress import progress_range
from shards.reading.caption_attributes import read_caption_attributes
from toolkit.evaluation.encode import Encodings, ModelInputs, ProcessInfo
from toolkit.evaluation.evaluation import rank_columns
from toolkit.evaluation.results import FOLDER as RESULTS
from toolkit.evaluation.results import Result, save_result
from toolkit.evaluation.retrieve import rank_coarse
from toolkit.model.trunk import quiet

if TYPE_CHECKING:
    from PIL import Image

POCKETSPHINX = "pocketsphinx"
_BATCH = 64
_WHISPER_SECONDS = 30  # of its input

Recognizer = Callable[[np.ndarray], str]  # from float32 [n] at 16 kHz to text


def load_recognizer(name: str, device: torch.device) -> Recognizer:
    """Load a speech recognizer.

    Args:
        name: `pocketsphinx` (American English, works offline), or a folder of a model for transformers'
            automatic-speech-recognition pipeline, such as Whisper.
        device: Where a model of transformers computes.

    Raises:
        UserError: There is no such folder or package, or the folder holds no such model.
    """
    if name == POCKETSPHINX:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError("--recognizer pocketsphinx: install it, e.g. pip install pocketsphinx") from None
        decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")

        def recognize(wave: np.ndarray) -> str:
            samples = np.clip(np.rint(wave * 32767), -32768, 32767).astype(np.int16)
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), full_utt=True)
            decoder.end_utt()
            hypothesis = decoder.hyp()
            return hypothesis.hypstr if hypothesis else ""

        return recognize
    from transformers import pipeline

    with _loading("--recognizer", name, "a model of speech recognition"):
        speech_to_text: Any = pipeline(
            "automatic-speech-recognition", model=name, device=device, trust_remote_code=False
        )
        saved_as = speech_to_text.model.config.architectures
        if saved_as and type(speech_to_text.model).__name__ not in saved_as:
            raise ValueError(f"{saved_as[0]} has no head for it")

    def transcribe_one(wave: np.ndarray) -> str:
        # Whisper transcribes more than 30 s in parts, which it tells apart by its timestamps.
        parts = speech_to_text.type == "seq2seq_whisper" and len(wave) > _WHISPER_SECONDS * SAMPLE_RATE
        options = {"return_timestamps": True} if parts else {}
        return str(speech_to_text({"raw": wave, "sampling_rate": SAMPLE_RATE}, **options)["text"]).strip()

    return transcribe_one


@dataclass(frozen=True)
class TextImageModel:
    """A CLIP model of transformers with its tokenizer and image processor.

    Attributes:
        model: On the device, in evaluation mode.
        tokenizer: Of the text encoder.
        processor: Of the image encoder.
        image_size: Side in pixels of its images.
    """

    model: Any
    tokenizer: Any
    processor: Any
    image_size: int

    @classmethod
    def load(cls, folder: str, device: torch.device) -> "TextImageModel":
        """Load a folder that transformers wrote, such as a CLIPModel's with its CLIPProcessor.

        Raises:
            UserError: There is no such folder, or it holds no such model.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        with _loading("--clip", folder, "a text-image model such as CLIP"):
            safe: dict[str, Any] = {"trust_remote_code": False}
            model, loaded = AutoModel.from_pretrained(folder, output_loading_info=True, **safe)
            if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
                raise ValueError(f"{type(model).__name__} embeds no texts and images")
            if loaded["missing_keys"]:
                raise ValueError(f"{len(loaded['missing_keys'])} weights are missing")
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            processor = AutoImageProcessor.from_pretrained(folder, **safe)
            return cls(model.eval().to(device), tokenizer, processor, int(model.config.vision_config.image_size))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, cut to the length of the model's positions: unit float32 [N, D]."""
        length = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            inputs = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            parts.append(_embedding(self.model.get_text_features(**inputs)))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_images(self, count: int, load: Callable[[int], "Image.Image"]) -> Tensor:
        """Embed `count` RGB images: unit float32 [N, D]."""
        parts = []
        for batch in progress_range(-(-count // _BATCH), "batches", "embedding pictures"):
            images = [load(index) for index in range(batch * _BATCH, min(count, (batch + 1) * _BATCH))]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.model.device)
            parts.append(_embedding(self.model.get_image_features(pixel_values=pixels)))
        return torch.cat(parts)


def _embedding(output: Any) -> Tensor:
    features = output if isinstance(output, Tensor) else output.pooler_output  # before transformers 5 a tensor
    return F.normalize(features.float(), dim=-1)


@contextmanager
def _loading(option: str, folder: str, expected: str) -> Iterator[None]:
    """Turn what transformers raises for a folder of another kind into one line that names the kind."""
    if not Path(folder).is_dir():
        raise UserError(f"{option} {folder}: no such folder")
    try:
        with quiet():
            yield
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        ImportError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        kind = read_object(Path(folder) / "config.json").get("model_type")
        found = f"a model of the kind {str(kind)[:40]!r}" if kind else "no model of transformers"
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{option} {folder}: expected {expected}, but it holds {found}: {line[:160]}") from None


def read_image(inputs: ModelInputs, index: int) -> "Image.Image":
    """Decode a picture: RGB, at the size of the shards."""
    with open_picture(inputs.reader.picture(int(inputs.samples[index]))) as opened:
        return opened.convert("RGB")


def transcribe(inputs: ModelInputs, recognizer: Recognizer, path: Path) -> list[str]:
    """Recognize all captions, in order; those in a file of an earlier run are read from it.

    Args:
        inputs: The captions.
        recognizer: The recognizer.
        path: JSON lines {"caption": row, "text"}; a line is appended for each caption.

    Raises:
        UserError: A caption cannot be read, or the file cannot be written.
    """
    try:
        records = read_records(path) if path.exists() else iter(())
        known = {each["caption"]: each.get("text") for each in records if isinstance(each.get("caption"), int)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"\n")  # ends a line that was not finished
            for index in progress_range(len(inputs.captions), "captions", "recognizing speech"):
                row = int(inputs.captions[index])
                if not isinstance(known.get(row), str):
                    known[row] = recognizer(inputs.speech(index).numpy())
                    file.write(json.dumps({"caption": row, "text": known[row]}).encode() + b"\n")
                    file.flush()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return [str(known[int(row)]) for row in inputs.captions]


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substituted, deleted and inserted words over the words of the references, in percent.

    Words are compared in lower case, without punctuation other than apostrophes.
    """
    from torchaudio.functional import edit_distance  # slow to import

    pairs = [(_words(one), _words(other)) for one, other in zip(references, hypotheses, strict=True)]
    total = sum(len(reference) for reference, _ in pairs)
    return 100 * sum(edit_distance(*pair) for pair in pairs) / max(1, total)


def _words(text: str) -> list[str]:
    kept = "".join(character if character.isalnum() or character == "'" else " " for character in text.lower())
    return kept.split()


def read_texts(manifest: Manifest, split: str, inputs: ModelInputs) -> list[str] | None:
    """Read the texts of all captions; None if the shards have none for some of them."""
    rows = [row for sample in manifest.rows(split).tolist() for row in manifest.captions(sample)]
    texts = dict(zip(rows, read_caption_attributes(manifest, split).text, strict=True))
    chosen = [texts[row] for row in inputs.captions.tolist()]
    return None if None in chosen else [str(text) for text in chosen]


@dataclass(frozen=True)
class TextBaseline:
    """Recall by text, saved beside the results of a run.

    Attributes:
        clip: The text-image model.
        folder: Its folder.
        inputs: The captions and pictures.
        manifest: The shards.
        split: Name of the split.
        run: Run folder.
        limit: Number of pictures, if not all of the split are used.
    """

    clip: TextImageModel
    folder: str
    inputs: ModelInputs
    manifest: Manifest
    split: str
    run: Path
    limit: int | None

    @cached_property
    def _images(self) -> Tensor:
        return self.clip.embed_images(len(self.inputs.samples), lambda index: read_image(self.inputs, index))

    def transcripts_file(self, recognizer: str) -> Path:
        """File of the texts that a recognizer, given by name or folder, found."""
        seconds, name = self.inputs.max_samples / SAMPLE_RATE, Path(recognizer).resolve().name
        if recognizer != POCKETSPHINX:  # other folders may have the same name
            name += f"-{hashlib.sha256(str(Path(recognizer).resolve()).encode()).hexdigest()[:8]}"
        parts = (self.manifest.corpus, self.split, self.manifest.hash[:8], name, f"{seconds:g}s.jsonl")
        return self.run / "transcripts" / quote("-".join(parts), safe="")

    def save(self, name: str, texts: Sequence[str], error_rate: float | None) -> Result:
        """Measure recall by texts, and save it in RUN/results under the name of the text and of the model.

        Args:
            name: Where the texts are from.
            texts: [C].
            error_rate: Word error rate in percent; None: not known.
        """
        inputs, images, embedded = self.inputs, self._images, self.clip.embed_texts(texts)
        caption_picture, process = torch.from_numpy(inputs.caption_picture), ProcessInfo(0, 1, images.device)
        encodings = Encodings(inputs.samples, inputs.captions, caption_picture, images, embedded, tokens=None)
        seconds = inputs.max_samples / SAMPLE_RATE
        retrieval = rank_coarse(encodings, len(images), self.split, seconds, 0, process)
        limit = "" if self.limit is None else f"-limit-{self.limit}"
        report = retrieval.report | {
            "shards": self.manifest.location,
            "checkpoint": f"{name}-{Path(self.folder).resolve().name}{limit}",
            "step": None,
            "run": str(self.run),
            "corpus": self.manifest.corpus,
            "manifest": self.manifest.hash,
            "protocol": {
                "rerank": 0,
                "fuse": None,
                "max_seconds": seconds,
                "image_size": self.clip.image_size,
                "resize": "crop",
            },
            "time": round(time.time(), 3),
            "baseline": {"text": name, "clip": self.folder, "word_error_rate": error_rate, "limit": self.limit},
        }
        return save_result(self.run / RESULTS, report, rank_columns(retrieval, self.manifest))
