"""A trained model with its preprocessing: from decoded inputs to embeddings and tokens."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.errors import UserError
from shards.files import file_sha256
from toolkit.indexing.items import Modality
from toolkit.model.outputs import Encoded

if TYPE_CHECKING:
    from toolkit.model.processor import SpeechImageProcessor
    from toolkit.model.retrieval import SpeechImageModel

logger = logging.getLogger(__name__)

_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.bin")
_NOT_IN_CHECKSUM = ("match_weight", "transformers_version")  # they do not change an embedding
_USUAL_SECONDS = 8.0  # a batch of longer audio files is encoded in parts


@dataclass(frozen=True)
class Encoder:
    """A model on its device, in evaluation mode."""

    model: "SpeechImageModel"
    processor: "SpeechImageProcessor"  # its preprocessing
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> "Encoder":
        """Load an exported model.

        Args:
            folder: A result of `find_model`.
            device: A device of torch; None: the GPU if there is one.

        Raises:
            UserError: The folder holds no model, or there is no such device.
        """
        from toolkit.model.processor import SpeechImageProcessor
        from toolkit.run_folder import load_model

        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        processor = SpeechImageProcessor.from_pretrained(folder)
        model = load_model(folder).eval()
        try:
            target = torch.device(name)
            model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
        return cls(model, processor, target)

    @torch.inference_mode()
    def encode(self, modality: Modality, inputs: Sequence[Tensor]) -> Encoded:
        """Encode images uint8 [3, S, S] or waveforms float32 [n] as one batch, on the device."""
        if modality == "image":
            return self.model.encode_image(torch.stack(list(inputs)).to(self.device))
        lengths = torch.tensor([len(wave) for wave in inputs], device=self.device)
        return self.model.encode_speech(pad_sequence(list(inputs), batch_first=True).to(self.device), lengths)

    def embed(self, modality: Modality, inputs: Sequence[Tensor]) -> Tensor:
        """Compute embeddings float32 [B, D] on the CPU; audio of similar length is encoded together."""
        embeddings = torch.empty(len(inputs), self.model.config.embed_dim)
        for rows in groups(modality, inputs, self.processor.sampling_rate):
            encoded = self.encode(modality, [inputs[row] for row in rows])
            embeddings[rows] = encoded.embedding.float().cpu()
        return embeddings


def groups(modality: Modality, inputs: Sequence[Tensor], rate: int) -> Iterator[list[int]]:
    """Yield rows to encode together: audio by length, longest first, with bounded padded seconds.

    Args:
        modality: Images are one group.
        inputs: Decoded inputs [B].
        rate: Sampling rate in Hz.
    """
    if modality == "image":
        yield list(range(len(inputs)))
        return
    order = sorted(range(len(inputs)), key=lambda row: -len(inputs[row]))
    start, budget = 0, _USUAL_SECONDS * rate * len(inputs)
    while start < len(order):
        count = max(1, int(budget / len(inputs[order[start]])))
        yield order[start : start + count]
        start += count


def find_model(source: str, checkpoint: str | None = None) -> Path:
    """Find the folder of an exported model.

    Args:
        source: A run folder, an exported folder, or a hub id.
        checkpoint: Exported model of a run: best, last or a folder; None: best, else last.

    Raises:
        UserError: There is none.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if checkpoint is None and (folder / "config.json").is_file():
            return folder
        from toolkit.run_folder import find_export

        return find_export(folder, checkpoint)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise UserError(f"--model {source}: no such folder; pass a run, an exported folder or a hub id")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except Exception as error:  # of the connection, of the name, of the hub
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model {source}: no such folder, and not on the hub: {reason}") from None


def model_checksum(folder: Path) -> str:
    """SHA-256 of the parts of an exported model that affect its embeddings.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kept = {key: value for key, value in config.items() if key not in _NOT_IN_CHECKSUM}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        weights = sorted({path for pattern in _FILES[2:] for path in folder.glob(pattern)})
        for path in (folder / _FILES[1], *weights):
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: pass a folder that training exported") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None
    return digest.hexdigest()
