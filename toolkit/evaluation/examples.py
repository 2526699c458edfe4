"""Examples of what was retrieved, for the report of a run: a few spoken queries with their best pictures.

RUN/examples-00000600.json   the queries are the same at each evaluation of a run, drawn by its seed
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.files import atomic_write
from shards.manifest import Manifest
from shards.media.picture import decode_picture
from shards.reading.reader import Reader
from toolkit.config.schema import Config
from toolkit.data import open_reader
from toolkit.evaluation.gallery import caption_text
from toolkit.evaluation.retrieve import Retrieval
from toolkit.training.checkpointing.background import tell

QUERIES, ANSWERS = 6, 5
SIDE = 96  # pixels of a picture, cropped to a square as the model sees it
_QUALITY = 75  # of the JPEGs: 3 kB or so each
_MAX_TEXT = 300  # characters of a caption


def save_examples(run: Path, step: int, manifest: Manifest, found: Retrieval, config: Config) -> str | None:
    """Write examples of an evaluation beside the log; what cannot be read or written ends no run.

    Args:
        run: The run folder.
        step: When the evaluation was.
        manifest: The shards that were evaluated.
        found: What was retrieved.
        config: Of the run: its seed, and how shards are read.

    Returns:
        Name of the file; None, with a line, if there is none.
    """
    name = f"examples-{step:08d}.json"
    try:
        content = {
            "split": found.report["split"],
            "reranked": bool(found.report["reranked"]),
            "queries": draw_examples(open_reader(config.data, manifest), found, config.seed),
        }
        with atomic_write(run / name) as file:
            file.write(json.dumps(content).encode())
    except (UserError, OSError, ValueError, LookupError) as error:
        tell(f"{run / name} was not written: {error}; training goes on")
        return None
    return name


def draw_examples(reader: Reader, found: Retrieval, seed: int) -> list[dict[str, Any]]:
    """Draw some spoken queries.

    Returns:
        {"text", "rank": place of the right picture from 1, "answers": [{"right", "picture": data URI of a JPEG}]} each.
    """
    count = min(QUERIES, len(found.captions))
    chosen = np.sort(np.random.default_rng(seed).choice(len(found.captions), count, replace=False))
    queries = []
    for query in chosen.tolist():
        best = found.speech_to_image.candidates[query, :ANSWERS].tolist()
        answers = [
            {"right": at == int(found.picture[query]), "picture": _data_uri(reader.picture(int(found.samples[at])))}
            for at in best
        ]
        rank = 1 + int(found.speech_to_image.rank_counts.ahead[query])
        queries.append({"text": caption_text(reader, found, query)[:_MAX_TEXT], "rank": rank, "answers": answers})
    return queries


def _data_uri(stored: bytes) -> str:
    """A small JPEG of a stored picture, as text."""
    buffer = io.BytesIO()
    Image.fromarray(decode_picture(stored, SIDE).transpose(1, 2, 0)).save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
