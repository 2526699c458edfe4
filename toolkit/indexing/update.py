"""Update of an index: encode new and changed items, drop items that no longer exist."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shards.errors import TransientError, UserError
from shards.progress import progress_bar
from toolkit.evaluation.encode import prefetch
from toolkit.indexing.approximate import MIN_ITEMS, refresh
from toolkit.indexing.encoder import Encoder, model_checksum
from toolkit.indexing.items import Item, ItemSource, printable
from toolkit.indexing.store import HEAD, Head, Index, read_head, write_head
from toolkit.indexing.writer import Journal, commit, locked, remove_leftovers

logger = logging.getLogger(__name__)

UNITS = {"image": "images", "audio": "audio files"}


@dataclass(frozen=True)
class Changes:
    """How a source differs from an index; each item is in one of the lists."""

    to_encode: list[Item]  # new and changed items
    to_keep: list[Item]  # items of the index that are unchanged
    added: int  # number of new items
    changed: int  # number of changed items
    dropped: int  # number of items that no longer exist

    def __str__(self) -> str:
        return f"{self.added:,} new, {self.changed:,} changed, {self.dropped:,} gone, {len(self.to_keep):,} unchanged"


class Update(NamedTuple):
    """Result of an update."""

    changes: Changes  # differences between the index and its source
    unreadable: list[str]  # names of the items that were left out
    rows: int  # number of items in the index now


def compare(indexed: Sequence[Item], listed: Sequence[Item], unlisted: Sequence[str] = ()) -> Changes:
    """Compare the items of an index with those of its source.

    Args:
        indexed: Items of the index.
        listed: Items of the source.
        unlisted: Prefixes of names that could not be listed: their items are kept.
    """
    old, new = {item.name: item for item in indexed}, {item.name: item for item in listed}
    to_keep = [item for item in indexed if new.get(item.name) == item]
    if unlisted:
        prefixes = tuple(unlisted)
        to_keep += [item for item in indexed if item.name not in new and item.name.startswith(prefixes)]
    to_encode = [item for item in listed if old.get(item.name) != item]
    changed = sum(item.name in old for item in to_encode)
    return Changes(to_encode, to_keep, len(to_encode) - changed, changed, len(indexed) - len(to_keep) - changed)


def plan(folder: Path, source: ItemSource, model: Path) -> tuple[Head, Changes, list[Item]]:
    """Compare an index, which may not exist yet, with its source; writes nothing.

    Returns:
        The head, the changes, and all items of the source.

    Raises:
        UserError: The index is of another model or source, or the source is empty.
    """
    from toolkit.model.retrieval import SpeechImageConfig

    checksum, description = model_checksum(model), source.describe()
    head = read_head(folder)
    if head is None:
        dim = SpeechImageConfig.from_pretrained(model).embed_dim
        head = Head(source.modality, checksum, "", description, dim)
    check_model(head, checksum, folder)
    indexed_source, given_source = head.source | {"hash": ""}, description | {"hash": ""}
    if (head.modality, indexed_source) != (source.modality, given_source):
        indexed, given = _described(head.modality, indexed_source), _described(source.modality, given_source)
        raise UserError(f"{folder} is an index of {indexed}, not of {given}: give another folder as --out")
    items = source.items()
    if not items:
        location = description.get("place", "the list")
        raise UserError(f"no {UNITS[source.modality]} in {location}: check the folder and the endings of the names")
    earlier = Index.open(folder).items() if (folder / HEAD).exists() else []
    head = replace(head, source=description, model_folder=str(model.resolve()))
    return head, compare(earlier, items, source.unlisted), items


def _described(modality: str, source: dict[str, str]) -> str:
    location = source.get("place", "files")
    split = f", split {source['split']}" if "split" in source else ""
    return f"{UNITS[modality]} {location}{split}"


def check_model(head: Head, checksum: str, folder: Path) -> None:
    """Refuse a model that did not make the embeddings of an index.

    Raises:
        UserError: It is another one.
    """
    if head.model != checksum:
        raise UserError(
            f"{folder} was made with another model ({head.model[:12]}, this one is {checksum[:12]}): pass that model, "
            "or make a new index"
        )


def update(
    folder: Path,
    source: ItemSource,
    model: Path,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | None = None,
    dtype: str = "float16",
    approximate_from: int = MIN_ITEMS,
) -> Update:
    """Make or update an index; a killed update continues.

    Args:
        folder: The index.
        source: The items.
        model: Folder of the exported model.
        batch_size: Items encoded at once.
        workers: Threads that decode; None: one per core, at most 8.
        device: Where the model computes; None: the GPU if there is one.
        dtype: Of the embeddings of a new index.
        approximate_from: Number of items from which on there is an approximate index too.

    Raises:
        UserError: Another model, source or process; nothing can be read or written.
    """
    with locked(folder):
        head, changes, _ = plan(folder, source, model)
        if not (folder / HEAD).exists():
            foreign = [path.name for path in folder.iterdir() if path.name != "lock"]
            if foreign:
                raise UserError(f"{folder} is not empty ({foreign[0]}) and holds no index: give a new folder")
            head = replace(head, dtype=dtype)
            write_head(folder, head)
        index, journal = Index.open(folder), Journal(folder, head)
        index.head = head  # of the source as it is now
        todo = [item for item in changes.to_encode if item not in journal.rows]
        unreadable = []
        if len(todo) < len(changes.to_encode):
            logger.info("continuing: %s were encoded before", f"{len(changes.to_encode) - len(todo):,}")
        if todo:
            encoder = Encoder.load(model, device)
            with progress_bar(len(todo), UNITS[source.modality], "encoding") as progress:
                for batch, embeddings, failed in embed_items(encoder, source, todo, batch_size, workers):
                    journal.append(batch, embeddings.numpy())
                    unreadable += failed
                    progress(len(batch) + len(failed))
        kept = changes.to_keep + [item for item in changes.to_encode if item in journal.rows]
        if len(kept) == len(changes.to_keep) == len(index) and head == read_head(folder):
            journal.close()
            remove_leftovers(folder, head)
        else:
            head = commit(index, journal, kept)
        if measured := refresh(Index.open(folder), approximate_from):
            logger.info("%s", measured)
        return Update(changes, unreadable, head.rows)


def embed_items(
    encoder: Encoder, source: ItemSource, items: Sequence[Item], batch_size: int = 32, workers: int | None = None
) -> Iterator[tuple[list[Item], Tensor, list[str]]]:
    """Decode in threads and encode in batches.

    Yields:
        For each batch its items, their embeddings float32 [n, D] on the CPU, and the names of those left out: each is
        named in a warning.
    """
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    for batch, inputs in zip(batches, decode_batches(encoder, source, batches, workers), strict=True):
        readable = [(item, value) for item, value in zip(batch, inputs, strict=True) if isinstance(value, Tensor)]
        failed = {item.name: str(value) for item, value in zip(batch, inputs, strict=True) if isinstance(value, str)}
        done = [item for item, _ in readable]
        embeddings = torch.empty(0, encoder.model.config.embed_dim)
        if readable:
            embeddings = encoder.embed(source.modality, [value for _, value in readable])
            finite = embeddings.isfinite().all(dim=1)
            failed |= {done[row].name: "its embedding is not finite" for row in (~finite).nonzero().flatten().tolist()}
            done, embeddings = [done[row] for row in finite.nonzero().flatten().tolist()], embeddings[finite]
        for name, reason in failed.items():
            path = source.path(name)
            text = reason if reason.startswith(path) else f"{path}: {reason}"
            logger.warning("%s", f"{printable(text)}: left out")
        yield done, embeddings, list(failed)


def decode_batches(
    encoder: Encoder, source: ItemSource, batches: Sequence[Sequence[Item]], workers: int | None = None
) -> Iterator[list[Tensor | str]]:
    """Decode batches in order, with a few of them in flight; the reason in place of an input that is unreadable."""

    def load(item: Item) -> Tensor | str:
        try:
            return source.load(item, encoder.processor)
        except TransientError:  # of the disk that holds the shards, not of one item
            raise
        except (UserError, OSError, ValueError, MemoryError) as error:
            return str(error) or type(error).__name__

    count = workers or min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count) as pool:
        try:
            yield from prefetch(pool, load, batches)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
