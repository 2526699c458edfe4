"""Encode each picture and caption exactly once, distributed over the ranks.

Batch b is encoded by rank b mod W. The batches, and with them the embeddings, are the same for any world size W. All
ranks make the same number of model calls, because under ZeRO-3 every call is a collective: a rank without a batch in
the last round encodes the last batch again, and that result is dropped.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.errors import UserError
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture
from shards.progress import progress_range
from toolkit.config.schema import Config
from toolkit.data import open_reader
from toolkit.distributed import all_gather
from toolkit.model.outputs import Encoded
from toolkit.rank_sync import run_on_all_ranks

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

logger = logging.getLogger(__name__)

_PREFETCH = 2  # batches decoded while the model computes


@dataclass(frozen=True)
class ProcessInfo:
    """Rank, world size and device of this process."""

    rank: int
    world_size: int
    device: torch.device
    show_progress: bool = False


@dataclass
class Tokens:
    """Token sequences for the fusion encoder, in the model's precision and in CPU memory.

    Image tokens are replicated on every rank: 2.6 GB for 5,000 pictures and CLIP ViT-L/14 in bf16. Speech tokens stay
    on the rank that encoded them: 10 GB over all ranks for 25,000 captions of 4 s and HuBERT-large in bf16. A pair is
    scored on the rank that has its caption.
    """

    images: Tensor  # [P, L, H]
    speech: list[Encoded]  # this rank's batches: rank, rank + W, ...
    batch: Tensor  # int64 [C], the batch of each caption
    place: Tensor  # int64 [C], the row of each caption in its batch
    sizes: list[int]  # maximum number of captions of each batch, over all ranks


@dataclass
class Encodings:
    """Encodings of P pictures and their C captions; the embeddings are replicated on every rank."""

    samples: np.ndarray  # int64 [P], sample numbers
    captions: np.ndarray  # int64 [C], caption rows of the manifest, in the order of `samples`
    caption_picture: Tensor  # int64 [C], ascending: position in `samples` of each caption's picture
    images: Tensor  # float32 [P, D], unit norm, on the device
    speech: Tensor  # float32 [C, D], likewise
    tokens: Tokens | None  # None if not requested


def encode(
    model: "SpeechImageModel",
    manifest: Manifest,
    samples: np.ndarray,
    config: Config,
    process: ProcessInfo,
    keep_tokens: bool = False,
) -> Encodings:
    """Encode pictures and all their captions; called on every rank.

    Captions are truncated to `evaluation.max_seconds`. A batch has `evaluation.batch_size` pictures or captions; a
    batch with captions longer than `data.max_seconds` has fewer, so that its padded duration is no greater.

    Args:
        model: In evaluation mode.
        manifest: The shards.
        samples: Int64 [P], numbers of the samples to encode.
        config: Sections `data` and `evaluation` are used.
        process: This process.
        keep_tokens: Keep the token sequences, for re-ranking.

    Raises:
        UserError: A shard is missing or holds a sample that cannot be decoded.
    """
    inputs = ModelInputs(manifest, samples, config)
    images, image_tokens = encode_images(model, inputs.image, len(samples), config, process, keep_tokens)
    seconds = manifest.duration[inputs.captions].clip(max=config.evaluation.max_seconds)
    speech, tokens = encode_captions(model, inputs.speech, seconds, config, process, image_tokens)
    return Encodings(samples, inputs.captions, torch.from_numpy(inputs.caption_picture), images, speech, tokens)


def encode_images(
    model: "SpeechImageModel",
    load: Callable[[int], Tensor],
    count: int,
    config: Config,
    process: ProcessInfo,
    keep_tokens: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Encode images; called on every rank.

    Args:
        model: In evaluation mode.
        load: Returns image i, uint8 [3, S, S]; called in several threads.
        count: Number P of images.
        config: Sections `data` and `evaluation` are used.
        process: This process.
        keep_tokens: Keep the tokens.

    Returns:
        Embeddings float32 [P, D], on the device; tokens [P, L, H] on the CPU, or None.
    """
    size = config.evaluation.batch_size
    images, tokens = _RowBuffer(count), _RowBuffer(count)
    schedule = _BatchSchedule(process, [size] * -(-count // size), np.arange(count), config.data.workers)
    for rows, loaded in schedule.load_batches("pictures", load):
        encoded = model.encode_image(torch.stack(loaded).to(process.device))
        images.put(rows, _gather(encoded.embedding, rows, process.world_size))
        if keep_tokens:
            tokens.put(rows, _gather(encoded.tokens, rows, process.world_size).cpu())
    return images.complete(), tokens.complete() if keep_tokens else None


def encode_captions(
    model: "SpeechImageModel",
    load: Callable[[int], Tensor],
    seconds: np.ndarray,
    config: Config,
    process: ProcessInfo,
    image_tokens: Tensor | None = None,
) -> tuple[Tensor, Tokens | None]:
    """Encode captions; called on every rank.

    Args:
        model: In evaluation mode.
        load: Returns the waveform of caption i, float32 [n]; called in several threads.
        seconds: [C], longest duration of each waveform.
        config: Sections `data` and `evaluation` are used.
        process: This process.
        image_tokens: Tokens of the images; None: no tokens are kept.

    Returns:
        Embeddings float32 [C, D], on the device; the tokens of images and captions, or None.
    """
    # Longest first: batches need little padding, and a batch too large for the memory fails at once.
    order = np.argsort(-seconds, kind="stable")
    sizes = _batch_sizes(seconds[order], config.evaluation.batch_size, config.data.max_seconds)
    schedule = _BatchSchedule(process, sizes, order, config.data.workers)
    speech, batches = _RowBuffer(len(order)), []
    for rows, loaded in schedule.load_batches("captions", load):
        lengths = torch.tensor([len(wave) for wave in loaded], device=process.device)
        encoded = model.encode_speech(pad_sequence(loaded, batch_first=True).to(process.device), lengths)
        speech.put(rows, _gather(encoded.embedding, rows, process.world_size))
        if image_tokens is not None:
            batches.append(Encoded(encoded.embedding.cpu(), encoded.tokens.cpu(), encoded.mask.cpu()))
    tokens = None if image_tokens is None else Tokens(image_tokens, batches, *schedule.locate_rows(), sizes)
    return speech.complete(), tokens


def _batch_sizes(seconds: np.ndarray, size: int, usual: float) -> list[int]:
    """Maximum number of captions of each batch.

    Args:
        seconds: [C], durations of the captions in the order of the batches, descending.
        size: Captions per batch if none is longer than `usual`.
        usual: Seconds. A batch with longer captions has at most `size * usual` seconds including padding, but at least
            one caption.
    """
    sizes, start = [], 0
    while start < len(seconds):
        longest = float(seconds[start])
        sizes.append(size if longest <= usual else max(1, int(size * usual / longest)))
        start += sizes[-1]
    return sizes


def _gather(part: Tensor, batches: list[np.ndarray], world_size: int) -> Tensor:
    """All-gather the ranks' encoded batches, which may differ in size: [rows, ...], batch after batch."""
    largest = max(len(batch) for batch in batches)
    if len(part) < largest:
        part = torch.cat([part, part.new_zeros(largest - len(part), *part.shape[1:])])
    gathered = all_gather(part, world_size).split(largest)
    return torch.cat([rows[: len(batch)] for rows, batch in zip(gathered, batches, strict=False)])


class ModelInputs:
    """The model's inputs: images and waveforms, decoded by the position of picture or caption."""

    def __init__(self, manifest: Manifest, samples: np.ndarray, config: Config) -> None:
        spans = [manifest.captions(int(sample)) for sample in samples]
        self.manifest, self.samples, self.reader = manifest, samples, open_reader(config.data, manifest)
        self.captions = np.concatenate([np.asarray(span, dtype=np.int64) for span in spans])
        self.caption_picture = np.repeat(np.arange(len(samples)), [len(span) for span in spans])
        self.image_size, self.resize = config.data.image_size, config.data.resize
        self.max_samples = int(config.evaluation.max_seconds * SAMPLE_RATE)

    def image(self, index: int) -> Tensor:
        """Decode a picture into the image that the model encodes: uint8 [3, S, S]."""
        sample = int(self.samples[index])
        return self._decode(
            sample, lambda: decode_picture(self.reader.picture(sample), self.image_size, resize=self.resize)
        )

    def speech(self, index: int) -> Tensor:
        """Decode a caption: float32 [n]."""
        sample, row = int(self.samples[self.caption_picture[index]]), int(self.captions[index])
        return self._decode(sample, lambda: decode_audio(self.reader.audio(row))[: self.max_samples])

    def _decode(self, sample: int, decode: Callable[[], np.ndarray]) -> Tensor:
        try:
            return torch.from_numpy(decode())
        except UserError as error:
            key = self.manifest.key[sample].decode()
            raise UserError(f"sample {key} of {self.manifest.location}: {error}; make the shards again") from error


@dataclass(frozen=True)
class _BatchSchedule:
    """Assignment of N rows to batches, and of batch b to rank b mod W."""

    process: ProcessInfo
    sizes: list[int]  # rows per batch; the last batch may have fewer
    order: np.ndarray  # int64 [N], the rows in the order of the batches
    threads: int  # that decode inputs

    def load_batches(
        self, title: str, load: Callable[[int], Tensor]
    ) -> Iterator[tuple[list[np.ndarray], list[Tensor]]]:
        """Yield for each model call the rows of all ranks' batches in order of ranks, and this rank's inputs.

        A rank without a batch in the last call gets the last batch again. If loading fails on one rank, it fails on
        all ranks, with the reason of that rank.
        """
        rank, ranks = self.process.rank, self.process.world_size
        batches = np.split(self.order, np.cumsum(self.sizes)[:-1])
        calls = -(-len(batches) // ranks)
        own = [batches[min(call * ranks + rank, len(batches) - 1)] for call in range(calls)]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            inputs = prefetch(pool, load, [rows.tolist() for rows in own])
            for call in progress_range(calls, "batches", f"encoding {title}", self.process.show_progress):
                loaded = run_on_all_ranks(lambda: next(inputs), rank, ranks)
                yield batches[call * ranks : (call + 1) * ranks], loaded

    def locate_rows(self) -> tuple[Tensor, Tensor]:
        """Return the batch of each row, int64 [N], and its position in that batch, int64 [N]."""
        position = torch.empty(len(self.order), dtype=torch.int64)
        position[torch.from_numpy(self.order)] = torch.arange(len(self.order))
        ends = torch.tensor(self.sizes).cumsum(0)
        batch = torch.searchsorted(ends, position, right=True)
        return batch, position - (ends - torch.tensor(self.sizes))[batch]


class _RowBuffer:
    """Tensor of N rows that is filled in parts; allocated with the shape and type of the first part."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: Tensor | None = None

    def put(self, batches: list[np.ndarray], part: Tensor) -> None:
        """Set the rows of `batches` to `part`."""
        if self.rows is None:
            self.rows = part.new_empty(self.count, *part.shape[1:])
        self.rows[torch.from_numpy(np.concatenate(batches)).to(part.device)] = part

    def complete(self) -> Tensor:
        """Return the filled tensor."""
        assert self.rows is not None, "nothing was encoded"
        return self.rows


def prefetch(
    pool: ThreadPoolExecutor, load: Callable[[Any], Any], batches: Iterable[Iterable[Any]]
) -> Iterator[list[Any]]:
    """Load batches in order, with a few of them in flight."""
    pending: deque = deque()
    for batch in batches:
        pending.append([pool.submit(load, each) for each in batch])
        if len(pending) > _PREFETCH:
            yield [future.result() for future in pending.popleft()]
    while pending:
        yield [future.result() for future in pending.popleft()]
