"""Results of looking inside a model: a folder with `inside.json` and images, and their loader.

RUN/inside/NAME/ is named by data set, split, checkpoint and protocol, and replaced as a whole:

    inside.json   {"format": 1, "run", "shards", "corpus", "split", "manifest", "checkpoint", "step", "model",
                   "protocol", "pictures", "captions", "gap", "similarity", "ranks", "hardest", "attention",
                   "denoising"}
    attention-N.png

"manifest" and "model" are SHA-256 checksums. A reference to an input, from which
`Reader(manifest)` reads picture and audio, is {"sample": number of the sample, "caption": row of the caption or null,
"id": image id, "text": of the caption or null}. This module imports neither torch nor a model.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import sync

FOLDER, FILE = "inside", "inside.json"
FORMAT = 1


@dataclass(frozen=True)
class Inside:
    """What was found in one checkpoint on one split; fields are named as the keys of the JSON.

    Attributes:
        folder: Contains the JSON and the images.
        run: Run folder.
        shards: Folder or URL of the shards.
        corpus: Corpus of the shards.
        split: Split.
        manifest: SHA-256 that identifies the shards.
        checkpoint: Name of the exported model.
        step: Its training step; None if it is not known.
        model: SHA-256 of the exported model.
        protocol: {"limit", "seed", "max_seconds", "image_size", "resize"}.
        pictures: Number of pictures.
        captions: Number of captions.
        gap: Modality gap: {"centroids": distance between the mean embeddings of speech and of images, "right" and
            "wrong": mean cosine of a caption with its picture and with the others}.
        similarity: Histogram of cosines: {"edges" [n + 1], "right" [n], "wrong" [n]}, numbers of pairs.
        ranks: Histogram of the rank of the best correct candidate of each query, by direction: {"edges" [n + 1], from
            an edge up to the next, which is not included, "counts" [n]}.
        hardest: By direction, queries by descending rank: {"query": reference, "rank", "similarity", "answer": the
            correct candidate with the highest cosine, "found": the best candidates, "found_similarity"}.
        attention: Pairs drawn in `attention-N.png`: {"image": file name, "query": reference, "match": probability of a
            match, "words": [{"word", "start", "end"}] in seconds, or null without text}; {"reason"} if there are none.
        denoising: By modality: {"loss": name of CMD's loss, "ratio" [n], and losses of the noised tokens "noised" [n],
            and of tokens reconstructed from the "right" [n], "other" [n] or "none" [n] of the other modality;
            {"reason"} if the denoiser is not available.
    """

    folder: Path
    run: str
    shards: str
    corpus: str
    split: str
    manifest: str
    checkpoint: str
    step: int | None
    model: str
    protocol: dict[str, Any]
    pictures: int
    captions: int
    gap: dict[str, float]
    similarity: dict[str, list[float]]
    ranks: dict[str, dict[str, list[int]]]
    hardest: dict[str, list[dict[str, Any]]]
    attention: list[dict[str, Any]] | dict[str, str]
    denoising: dict[str, Any]


def load_inside(run: Path) -> list[Inside]:
    """Load what was found inside the models of a run, sorted by folder; empty if nothing was.

    Raises:
        UserError: The run folder does not exist, or a file is not such a result.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run folder")
    return [read_inside(path.parent) for path in sorted((run / FOLDER).glob(f"[!.]*/{FILE}"))]


def read_inside(folder: Path) -> Inside:
    """Read a folder of RUN/inside.

    Raises:
        UserError: Its JSON cannot be read or is not such a result.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError("it has another format")
        return Inside(folder=folder, **values)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a result of analyze.py inside ({error}): move it elsewhere") from None


def save_inside(folder: Path, values: Mapping[str, Any], images: Mapping[str, bytes]) -> Inside:
    """Write a result as a folder that appears at once, in place of an earlier one.

    Args:
        folder: RUN/inside/NAME.
        values: Fields of `Inside` other than `folder`.
        images: Contents of the PNG files by name.

    Raises:
        UserError: The folder cannot be written.
    """
    fresh, old = (folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}") for _ in "12")
    try:
        fresh.mkdir(parents=True)
        for name, content in images.items():
            (fresh / name).write_bytes(content)
        with open(fresh / FILE, "wb") as file:
            file.write(json.dumps({"format": FORMAT, **values}, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
    return read_inside(folder)


def describe_gap(result: Inside) -> str:
    """Describe the modality gap in a line."""
    centroids, right, wrong = (f"{result.gap[name]:.3f}" for name in ("centroids", "right", "wrong"))
    return f"Modality gap: centroids {centroids} apart; mean cosine of right pairs {right}, of wrong pairs {wrong}"


def format_inside(result: Inside) -> str:
    """Format modality gap and denoising curves as a table."""
    lines = [
        f"{result.corpus} {result.split}, checkpoint {result.checkpoint}: {result.pictures:,} pictures, "
        f"{result.captions:,} spoken captions",
        describe_gap(result),
    ]
    if "reason" in result.denoising:
        return "\n".join([*lines, f"denoising: {result.denoising['reason']}"])
    for side, curves in result.denoising.items():
        lines.append(f"denoising of {side} tokens, {curves['loss']:<16}  noised  by pair by other  by none")
        for row in zip(*(curves[name] for name in ("ratio", "noised", "right", "other", "none")), strict=True):
            lines.append(
                f"  ratio of noise {row[0]:>6.2f}" + f"{'':<21}" + "".join(f"{value:>9.3f}" for value in row[1:])
            )
    return "\n".join(lines)
