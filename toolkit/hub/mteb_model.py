"""An exported model for mteb (the extra `mteb`): SIC as the encoder, SIM as the cross-encoder that re-ranks.

    model = SpeechImageEncoder(folder, training_datasets={"FlickrAudioToImageRetrieval"})
    mteb.evaluate(model, mteb.get_tasks(tasks=["SpokenCOCOA2IRetrieval"]))

Sound files are decoded as everywhere in this package; mteb's own decoder would need FFmpeg.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor
from torch.utils.data import DataLoader

from shards.errors import UserError
from shards.media.audio import mix_down, read_audio, resample
from shards.progress import progress_bar
from toolkit.config.schema import Evaluation, Fuse
from toolkit.evaluation.rerank import fuse_scores
from toolkit.indexing.encoder import Encoder, find_model, groups, model_checksum
from toolkit.indexing.items import Modality
from toolkit.model.outputs import Encoded
from toolkit.model.processor import MAX_FILE_SECONDS, SpeechImageProcessor

_BATCH = 32  # inputs, where mteb gives no batch size


class SpeechImageEncoder(AbsEncoder):
    """Embeds the audio and the images of a task; their similarity is the cosine.

    Args:
        model_name: Exported folder, run folder or hub id.
        revision: Ignored: the revision in the results is the checksum of the model.
        device: A device of torch; None: the GPU if there is one.
        training_datasets: Tasks of mteb whose data the model, its trunks included, was trained on; mteb does not count
            these as zero-shot. An empty set: none.
        name: "organization/name" in the results; None: the hub id, or the name of the folder.
        options: Ignored.

    Raises:
        UserError: There is no such model, or no such device.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        training_datasets: set[str],
        name: str | None = None,
        **options: Any,
    ) -> None:
        folder = find_model(str(model_name))
        self.encoder = Encoder.load(folder, device)
        self.mteb_model_meta = describe(self.encoder, folder, name or _name(model_name), training_datasets, type(self))

    def encode(self, inputs: DataLoader, *, task_metadata: Any, **options: Any) -> np.ndarray:
        """Embed inputs.

        Args:
            inputs: With a column "audio" or "image".
            task_metadata: Names the task in messages.
            options: `batch_size` and `show_progress_bar` are used.

        Returns:
            Float32 [N, D], of unit length.

        Raises:
            UserError: The task has text or video, or an input cannot be decoded.
        """
        modality, dataset = _open(inputs, task_metadata.name)
        batches = list(_chunks(range(len(dataset)), options.get("batch_size") or _BATCH))
        parts = []
        with progress_bar(len(dataset), modality, show=options.get("show_progress_bar", True)) as progress:
            for rows in batches:
                parts.append(
                    self.encoder.embed(modality, _decode_rows(dataset, rows, modality, self.encoder.processor))
                )
                progress(len(rows))
        return torch.cat(parts).numpy()


class SpeechImageCrossEncoder:
    """Scores pairs of audio and image: cosine and match logit, as `toolkit/evaluate.py` does with `--rerank`.

    The tokens of all images of a task are kept in CPU memory; audio is encoded once, batch after batch.

    Args:
        model_name: Exported folder, run folder or hub id.
        revision: Ignored: the revision in the results is the checksum of the model.
        device: A device of torch; None: the GPU if there is one.
        training_datasets: As for `SpeechImageEncoder`.
        name: "organization/name" in the results; None: the hub id, or the name of the folder.
        fuse: Score of a pair, as the configuration key `evaluation.fuse`.
        options: Ignored.

    Raises:
        UserError: There is no such model or device, or `fuse` is fitted and the model's weight is not.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        training_datasets: set[str],
        name: str | None = None,
        fuse: Fuse = "fitted",
        **options: Any,
    ) -> None:
        folder = find_model(str(model_name))
        self.encoder, self.evaluation = Encoder.load(folder, device), Evaluation(fuse=fuse)
        fuse_scores(self.encoder.model, torch.zeros(1), torch.zeros(1), self.evaluation)  # raises at once
        name = f"{name or _name(model_name)}-reranked-{fuse}"
        self.mteb_model_meta = describe(self.encoder, folder, name, training_datasets, type(self))

    def predict(self, inputs1: DataLoader, inputs2: DataLoader, *, task_metadata: Any, **options: Any) -> np.ndarray:
        """Score pairs, one of each row.

        Args:
            inputs1: Queries, with the columns "id" and "audio" or "image"; a query is repeated for each candidate.
            inputs2: Candidates, of the other modality.
            task_metadata: Names the task in messages.
            options: `batch_size` and `show_progress_bar` are used.

        Returns:
            Float32 [N], higher is better.

        Raises:
            UserError: The task is not between audio and images, or an input cannot be decoded.
        """
        sides = dict(_open(inputs, task_metadata.name) for inputs in (inputs1, inputs2))
        if len(sides) != 2:
            raise UserError(f"{task_metadata.name}: re-ranking needs audio on one side and images on the other")
        size = options.get("batch_size") or _BATCH
        images, image_of = self._encode_images(sides["image"], size)
        pairs: dict[int, list[int]] = defaultdict(list)  # row of a caption -> its rows
        first, scores = _first_rows(sides["audio"]), torch.empty(len(image_of))
        for row, caption in enumerate(first):
            pairs[caption].append(row)
        with progress_bar(len(first), "pairs", show=options.get("show_progress_bar", True)) as progress:
            for captions in _chunks(list(pairs), size):
                waves = _decode_rows(sides["audio"], captions, "audio", self.encoder.processor)
                for group in groups("audio", waves, self.encoder.processor.sampling_rate):
                    speech = self.encoder.encode("audio", [waves[number] for number in group])
                    scored = [(number, row) for number, each in enumerate(group) for row in pairs[captions[each]]]
                    for part in _chunks(scored, size):
                        numbers, rows = (torch.tensor(each) for each in zip(*part, strict=True))
                        scores[rows] = self._score(speech, numbers, images, image_of[rows])
                        progress(len(part))
        return scores.numpy()

    def _encode_images(self, dataset: datasets.Dataset, size: int) -> tuple[Encoded, Tensor]:
        """Encode each image once: encodings on the CPU, and the position of each row's image, int64 [N]."""
        first = _first_rows(dataset)
        unique = sorted(set(first))
        parts = [
            self.encoder.encode("image", _decode_rows(dataset, rows, "image", self.encoder.processor))
            for rows in _chunks(unique, size)
        ]
        kept = [torch.cat([getattr(part, key).cpu() for part in parts]) for key in ("embedding", "tokens", "mask")]
        position = {row: number for number, row in enumerate(unique)}
        return Encoded(*kept), torch.tensor([position[row] for row in first])

    @torch.inference_mode()
    def _score(self, speech: Encoded, numbers: Tensor, images: Encoded, rows: Tensor) -> Tensor:
        """Score pairs of a caption of the batch and an image: float32 [M] on the CPU."""
        device, chosen = self.encoder.device, images[rows]
        speech = speech[numbers.to(device)]
        image = Encoded(chosen.embedding.to(device), chosen.tokens.to(device), chosen.mask.to(device))
        logits = self.encoder.model.match(speech, image)[:, 1].float().cpu()
        cosines = (speech.embedding * image.embedding).sum(dim=1).float().cpu()
        return fuse_scores(self.encoder.model, cosines, logits, self.evaluation)


def describe(encoder: Encoder, folder: Path, name: str, training_datasets: set[str], loader: type) -> ModelMeta:
    """Return what mteb stores of a model; what is unknown is None."""
    parameters = list(encoder.model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return ModelMeta(
        loader=loader,
        loader_kwargs={"training_datasets": set(training_datasets)},
        name=name,
        revision=model_checksum(folder),  # mteb keeps results by name and revision
        release_date=None,
        languages=None,
        n_parameters=sum(parameter.numel() for parameter in parameters),
        memory_usage_mb=round(size / 2**20, 3),
        max_tokens=None,
        embed_dim=int(encoder.model.config.embed_dim),
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction("cosine"),
        use_instructions=False,
        training_datasets=set(training_datasets),
        modalities=["audio", "image"],
        model_type=["dense" if loader is SpeechImageEncoder else "cross-encoder"],
    )


def _name(model_name: str) -> str:
    """Return the hub id, or "local/" and the name of the folder."""
    return f"local/{Path(model_name).resolve().name}" if Path(model_name).is_dir() else str(model_name)


def _open(inputs: DataLoader, task: str) -> tuple[Modality, datasets.Dataset]:
    """Return the modality of inputs, and their data set with the bytes of audio files."""
    dataset: Any = inputs.dataset
    modalities = [kind for kind in ("text", "audio", "image", "video") if kind in dataset.features]
    if modalities not in (["audio"], ["image"]):
        names = " and ".join(modalities) or "no modality"
        raise UserError(f"{task} has inputs of {names}: expected audio or images alone")
    if isinstance(dataset.features.get("audio"), datasets.Audio):
        dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    return ("audio" if modalities == ["audio"] else "image"), dataset


def _decode_rows(
    dataset: datasets.Dataset, rows: Sequence[int], modality: Modality, processor: SpeechImageProcessor
) -> list[Tensor]:
    """Decode rows: uint8 [3, S, S] or float32 [n]."""
    values = [dataset[int(row)][modality] for row in rows]
    if modality == "image":
        return list(processor(images=values)["images"])
    inputs = processor(speech=[_wave(value) for value in values])
    return [wave[:length] for wave, length in zip(inputs["waveforms"], inputs["lengths"].tolist(), strict=True)]


def _wave(value: dict[str, Any]) -> np.ndarray:
    """Decode a value of a column of audio: a file, or an array with its sampling rate."""
    if value.get("array") is not None:
        wave = np.asarray(value["array"], dtype=np.float32)
        return resample(mix_down(wave), int(value["sampling_rate"]))
    return read_audio(value["bytes"] or Path(value["path"]), MAX_FILE_SECONDS)


def _first_rows(dataset: datasets.Dataset) -> list[int]:
    """Return for each row the first row with its id."""
    first: dict[str, int] = {}
    return [first.setdefault(key, row) for row, key in enumerate(dataset["id"])]


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))
