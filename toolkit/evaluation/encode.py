"""Encode pictures and captions exactly once, spread over the ranks.

Batch b is encoded by rank b mod W, and the batches are the same for any number of ranks W, so that the vectors are too.
All ranks make the same number of model calls, because under ZeRO-3 every call is a collective: a rank whose batches are
used up encodes one more, and its result is dropped.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.audio import SAMPLE_RATE, decode_audio
from shards.errors import UserError
from shards.manifest import Manifest
from shards.picture import decode_picture
from toolkit.config import Config
from toolkit.distributed import agree_all, all_gather
from toolkit.model.encoded import Encoded
from toolkit.training.data import open_reader

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

_AHEAD = 2  # batches decoded while the model works
_SECONDS_A_LINE = 20  # of progress, where there is no terminal


@dataclass(frozen=True)
class Process:
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


@dataclass
class Encodings:
    """P pictures and their C captions; the vectors are whole on every rank."""

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
    process: Process,
    keep_tokens: bool = False,
) -> Encodings:
    """Encode the given pictures and all their captions; every rank calls this.

    A caption is read from its start, at most `data.max_seconds` of it.

    Raises:
        UserError: a shard is missing or holds a sample that cannot be decoded.
    """
    source = _Source(manifest, samples, config)
    sweep = _Sweep(process, config.evaluation.batch_size, config.data.workers)
    device, world_size = process.device, process.world_size

    images, image_tokens = _Rows(len(samples)), _Rows(len(samples))
    for at, loaded in sweep.run("pictures", source.picture, np.arange(len(samples))):
        encoded = model.encode_image(torch.stack(loaded).to(device))
        images.put(at, all_gather(encoded.vector, world_size))
        if keep_tokens:
            image_tokens.put(at, all_gather(encoded.tokens, world_size).cpu())

    # Longest first: a batch is padded to its longest, and what does not fit into memory fails at once.
    order = np.argsort(-manifest.duration[source.captions], kind="stable")
    speech, batches = _Rows(len(order)), []
    for at, loaded in sweep.run("captions", source.speech, order):
        lengths = torch.tensor([len(wave) for wave in loaded], device=device)
        encoded = model.encode_speech(pad_sequence(loaded, batch_first=True).to(device), lengths)
        speech.put(at, all_gather(encoded.vector, world_size))
        if keep_tokens:
            batches.append(Encoded(encoded.vector.cpu(), encoded.tokens.cpu(), encoded.mask.cpu()))

    tokens = Tokens(image_tokens.whole(), batches, *sweep.find(order)) if keep_tokens else None
    owner = torch.from_numpy(source.owner)
    return Encodings(samples, source.captions, owner, images.whole(), speech.whole(), tokens)


class _Source:
    """The inputs of the model, by position of the picture or caption."""

    def __init__(self, manifest: Manifest, samples: np.ndarray, config: Config) -> None:
        spans = [manifest.captions(int(sample)) for sample in samples]
        self.manifest, self.samples, self.reader = manifest, samples, open_reader(config.data, manifest)
        self.captions = np.concatenate([np.asarray(span, dtype=np.int64) for span in spans])
        self.owner = np.repeat(np.arange(len(samples)), [len(span) for span in spans])
        self.image_size, self.resize = config.data.image_size, config.data.resize
        self.max_samples = int(config.data.max_seconds * SAMPLE_RATE)

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
class _Sweep:
    """How N rows are dealt to the ranks: in batches of one size, batch b to rank b mod W."""

    process: Process
    batch_size: int
    threads: int

    def run(
        self, title: str, load: Callable[[int], Tensor], order: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Yield for each model call the rows that all ranks encode in it, in rank order, and this rank's inputs.

        Where the rows do not fill all batches of the last call, the last one is repeated; of what the ranks encode only
        the first `len(rows)` are to be kept. If a rank cannot load its rows, all end together, with its reason.
        """
        size = min(self.batch_size, len(order))
        rank, ranks = self.process.rank, self.process.world_size
        calls = -(-len(order) // (size * ranks))
        filled = order[np.arange(calls * ranks * size).clip(max=len(order) - 1)]
        own = filled.reshape(calls, ranks, size)[:, rank]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            batches = _loaded_ahead(pool, load, own)
            for call in progress(f"encoding {title}", calls, self.process.show_progress):
                loaded = agree_all(lambda: next(batches), rank, ranks)
                yield order[call * ranks * size :][: ranks * size], loaded

    def find(self, order: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tell the batch [N] and the row in that batch [N] of each of N rows."""
        turn = torch.empty(len(order), dtype=torch.int64)
        turn[torch.from_numpy(order)] = torch.arange(len(order))
        size = min(self.batch_size, len(order))
        return turn // size, turn % size


class _Rows:
    """N rows that come in parts, of a shape that the first part tells."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: Tensor | None = None

    def put(self, at: np.ndarray, part: Tensor) -> None:
        """Set the rows `at` to the first of `part`."""
        if self.rows is None:
            self.rows = part.new_empty(self.count, *part.shape[1:])
        self.rows[torch.from_numpy(at).to(part.device)] = part[: len(at)]

    def whole(self) -> Tensor:
        """Return all rows once they are there."""
        assert self.rows is not None, "nothing was encoded"
        return self.rows


def _loaded_ahead(
    pool: ThreadPoolExecutor, load: Callable[[int], Tensor], batches: np.ndarray
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
