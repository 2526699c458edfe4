"""Encode pictures and captions exactly once, spread over the ranks.

Batch b is encoded by rank b mod W, and the batches are the same for any number of ranks W, so that the embeddings are too.
All ranks make the same number of model calls, because under ZeRO-3 every call is a collective: a rank whose batches are
used up encodes the last one too, and its result is dropped.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.errors import UserError
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture
from toolkit.config.schema import Config
from toolkit.data import open_reader
from toolkit.distributed import all_gather
from toolkit.model.outputs import Encoded
from toolkit.rank_sync import run_on_all_ranks

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_AHEAD = 2  # batches decoded while the model works
_SECONDS_A_LINE = 20  # of progress, where there is no terminal


@dataclass(frozen=True)
class ProcessInfo:
    """This process among the ranks."""

    rank: int
    world_size: int
    device: torch.device
    show_progress: bool = False  # on stderr


@dataclass
class Tokens:
    """What the fusion encoder needs, in the model's precision, in CPU memory.

    Pictures' tokens are whole on every rank: for 5,000 pictures and CLIP ViT-L/14 in bf16 2.6 GB. Captions' tokens stay
    on the rank that encoded them: for 25,000 captions of 4 s and HuBERT-large in bf16 10 GB over all ranks. They
    never travel; a pair is matched where its caption is.
    """

    images: Tensor  # [P, L, H]
    speech: list[Encoded]  # this rank's batches: rank, rank + W, ...
    batch: Tensor  # int64 [C], the batch that a caption is in
    place: Tensor  # int64 [C], its row in that batch
    sizes: list[int]  # captions that each of all ranks' batches has room for: fewer where they are long


@dataclass
class Encodings:
    """P pictures and their C captions; the embeddings are whole on every rank."""

    samples: np.ndarray  # int64 [P], sample numbers
    captions: np.ndarray  # int64 [C], caption rows of the manifest, in the order of `samples`
    picture: Tensor  # int64 [C], ascending: position in `samples` of each caption's picture
    images: Tensor  # float32 [P, D], unit norm, on the device
    speech: Tensor  # float32 [C, D]
    tokens: Tokens | None  # only if they were asked for


def encode(
    model: "SpeechImageModel",
    manifest: Manifest,
    samples: np.ndarray,
    config: Config,
    process: ProcessInfo,
    keep_tokens: bool = False,
) -> Encodings:
    """Encode the given pictures and all their captions; every rank calls this.

    A caption is read from its start, at most `evaluation.max_seconds` of it. A batch has `evaluation.batch_size`
    pictures or captions; of captions longer than `data.max_seconds` only as many as are no longer together than that
    many of that length.

    Raises:
        UserError: a shard is missing or holds a sample that cannot be decoded.
    """
    source = _Source(manifest, samples, config)
    size, device, world_size = config.evaluation.batch_size, process.device, process.world_size

    images, image_tokens = _RowBuffer(len(samples)), _RowBuffer(len(samples))
    sweep = _BatchSchedule(process, [size] * -(-len(samples) // size), np.arange(len(samples)), config.data.workers)
    for rows, loaded in sweep.run("pictures", source.picture):
        encoded = model.encode_image(torch.stack(loaded).to(device))
        images.put(rows, _gather(encoded.embedding, rows, world_size))
        if keep_tokens:
            image_tokens.put(rows, _gather(encoded.tokens, rows, world_size).cpu())

    # Longest first: a batch is padded to its longest, and what does not fit into memory fails at once.
    seconds = manifest.duration[source.captions].clip(max=config.evaluation.max_seconds)
    order = np.argsort(-seconds, kind="stable")
    sizes = _batch_sizes(seconds[order], size, config.data.max_seconds)
    sweep = _BatchSchedule(process, sizes, order, config.data.workers)
    speech, batches = _RowBuffer(len(order)), []
    for rows, loaded in sweep.run("captions", source.speech):
        lengths = torch.tensor([len(wave) for wave in loaded], device=device)
        encoded = model.encode_speech(pad_sequence(loaded, batch_first=True).to(device), lengths)
        speech.put(rows, _gather(encoded.embedding, rows, world_size))
        if keep_tokens:
            batches.append(Encoded(encoded.embedding.cpu(), encoded.tokens.cpu(), encoded.mask.cpu()))

    tokens = Tokens(image_tokens.whole(), batches, *sweep.find(), sizes) if keep_tokens else None
    owner = torch.from_numpy(source.owner)
    return Encodings(samples, source.captions, owner, images.whole(), speech.whole(), tokens)


def _batch_sizes(seconds: np.ndarray, size: int, usual: float) -> list[int]:
    """Most captions a batch, for captions in the order of their batches.

    Args:
        seconds: [C], descending.
        size: Captions a batch, up to a length of `usual`.
        usual: Seconds. A batch of longer ones, with its padding, holds `size * usual` seconds at most, but one caption
            at least.
    """
    sizes, start = [], 0
    while start < len(seconds):
        longest = float(seconds[start])
        sizes.append(size if longest <= usual else max(1, int(size * usual / longest)))
        start += sizes[-1]
    return sizes


def _gather(part: Tensor, batches: list[np.ndarray], world_size: int) -> Tensor:
    """What all ranks have encoded of their batches, [rows, ...], batch by batch; they may be of different sizes."""
    longest = max(len(batch) for batch in batches)
    if len(part) < longest:
        part = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    gathered = all_gather(part, world_size).split(longest)
    return torch.cat([rows[: len(batch)] for rows, batch in zip(gathered, batches, strict=False)])


class _Source:
    """The inputs of the model, by position of the picture or caption."""

    def __init__(self, manifest: Manifest, samples: np.ndarray, config: Config) -> None:
        spans = [manifest.captions(int(sample)) for sample in samples]
        self.manifest, self.samples, self.reader = manifest, samples, open_reader(config.data, manifest)
        self.captions = np.concatenate([np.asarray(span, dtype=np.int64) for span in spans])
        self.owner = np.repeat(np.arange(len(samples)), [len(span) for span in spans])
        self.image_size, self.resize = config.data.image_size, config.data.resize
        self.max_samples = int(config.evaluation.max_seconds * SAMPLE_RATE)

    def picture(self, at: int) -> Tensor:
        """Decode picture number `at`: uint8 [3, S, S]."""
        sample = int(self.samples[at])
        return self._checked(
            sample, lambda: decode_picture(self.reader.picture(sample), self.image_size, resize=self.resize)
        )

    def speech(self, at: int) -> Tensor:
        """Decode caption number `at`: float32 [n]."""
        sample, row = int(self.samples[self.owner[at]]), int(self.captions[at])
        return self._checked(sample, lambda: decode_audio(self.reader.audio(row))[: self.max_samples])

    def _checked(self, sample: int, decode: Callable[[], np.ndarray]) -> Tensor:
        try:
            return torch.from_numpy(decode())
        except UserError as error:
            key = self.manifest.key[sample].decode()
            raise UserError(f"sample {key} of {self.manifest.place}: {error}; make the shards again") from error


@dataclass(frozen=True)
class _BatchSchedule:
    """How N rows are dealt to the ranks: batch b to rank b mod W."""

    process: ProcessInfo
    sizes: list[int]  # rows a batch; the last one may have fewer
    order: np.ndarray  # int64 [N], the rows in the order of their batches
    threads: int

    def run(self, title: str, load: Callable[[int], Tensor]) -> Iterator[tuple[list[np.ndarray], list[Tensor]]]:
        """Yield for each model call the batches of it, rank 0's first, and this rank's inputs.

        Where there are fewer batches than ranks in the last call, the other ranks' inputs are the last batch again. If
        a rank cannot load its rows, all end together, with its reason.
        """
        rank, ranks = self.process.rank, self.process.world_size
        batches = np.split(self.order, np.cumsum(self.sizes)[:-1])
        calls = -(-len(batches) // ranks)
        own = [batches[min(call * ranks + rank, len(batches) - 1)] for call in range(calls)]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            inputs = _loaded_ahead(pool, load, own)
            for call in progress(f"encoding {title}", calls, self.process.show_progress):
                loaded = run_on_all_ranks(lambda: next(inputs), rank, ranks)
                yield batches[call * ranks : (call + 1) * ranks], loaded

    def find(self) -> tuple[Tensor, Tensor]:
        """Tell the batch [N] and the row in that batch [N] of each of N rows."""
        turn = torch.empty(len(self.order), dtype=torch.int64)
        turn[torch.from_numpy(self.order)] = torch.arange(len(self.order))
        ends = torch.tensor(self.sizes).cumsum(0)
        batch = torch.searchsorted(ends, turn, right=True)
        return batch, turn - (ends - torch.tensor(self.sizes))[batch]


class _RowBuffer:
    """N rows that come in parts, of a shape that the first part tells."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: Tensor | None = None

    def put(self, at: list[np.ndarray], part: Tensor) -> None:
        """Set the rows `at`, batch by batch, to those of `part`."""
        if self.rows is None:
            self.rows = part.new_empty(self.count, *part.shape[1:])
        self.rows[torch.from_numpy(np.concatenate(at)).to(part.device)] = part

    def whole(self) -> Tensor:
        """Return all rows once they are there."""
        assert self.rows is not None, "nothing was encoded"
        return self.rows


def _loaded_ahead(
    pool: ThreadPoolExecutor, load: Callable[[int], Tensor], batches: Sequence[np.ndarray]
) -> Iterator[list[Tensor]]:
    """Load batch after batch, a few of them ahead of their use."""
    waiting: deque = deque()
    for batch in batches:
        waiting.append([pool.submit(load, int(at)) for at in batch])
        if len(waiting) > _AHEAD:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def progress(title: str, total: int, show: bool) -> Iterator[int]:
    """Count to `total`, with a bar in a terminal and an occasional line elsewhere, on stderr."""
    if show and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(range(total), title, leave=False)
        return
    shown = time.monotonic()
    for number in range(total):
        yield number
        if show and time.monotonic() - shown > _SECONDS_A_LINE:
            shown = time.monotonic()
            print(f"{title}: {number + 1} of {total} batches", file=sys.stderr, flush=True)
