"""Retrieved examples for the report of a run: a few spoken queries, which can be played, with their best pictures.

They are written to RUN/examples-STEP.json, those of the final evaluation to RUN/examples-final.json. The queries are
sampled with the seed of the run, so they are the same at each evaluation.
"""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.files import atomic_write
from shards.html.render import data_url
from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE, decode_audio, encode_audio
from shards.media.picture import decode_picture
from shards.reading.reader import Reader
from toolkit.config.schema import Config
from toolkit.data import open_reader
from toolkit.evaluation.example_sheet import caption_text
from toolkit.evaluation.retrieve import Retrieval

logger = logging.getLogger(__name__)

QUERIES, ANSWERS = 6, 5
SIDE = 96  # pixels of a picture, cropped to a square as for the model
_QUALITY = 75  # of the JPEGs, about 3 kB each
_MAX_TEXT = 300  # characters of a caption
_MAX_SECONDS = 20.0  # of a caption; about 5 kB a second as Opus


def save_examples(run: Path, step: int | None, manifest: Manifest, retrieval: Retrieval, config: Config) -> str | None:
    """Write examples of an evaluation to the run folder; a failure is a warning and stops nothing.

    Args:
        run: The run folder.
        step: Training step of the evaluation; None: it is the final evaluation.
        manifest: The shards that were evaluated.
        retrieval: Result of the evaluation.
        config: Configuration of the run.

    Returns:
        Name of the file; None if it could not be written.
    """
    name = "examples-final.json" if step is None else f"examples-{step:08d}.json"
    try:
        content = {
            "split": retrieval.report["split"],
            "reranked": bool(retrieval.report["reranked"]),
            "queries": draw_examples(open_reader(config.data, manifest), retrieval, config.seed),
        }
        with atomic_write(run / name) as file:
            file.write(json.dumps(content).encode())
    except (UserError, OSError, ValueError, LookupError) as error:
        logger.warning("%s was not written: %s; only reports need it", run / name, error)
        return None
    return name


def draw_examples(reader: Reader, retrieval: Retrieval, seed: int) -> list[dict[str, Any]]:
    """Sample spoken queries.

    Returns:
        For each query {"text", "rank": rank of the correct picture from 1, "audio": data URI of Ogg Opus, "answers":
        [{"right", "picture": data URI of a JPEG}]}.
    """
    count = min(QUERIES, len(retrieval.captions))
    chosen = np.sort(np.random.default_rng(seed).choice(len(retrieval.captions), count, replace=False))
    queries = []
    for query in chosen.tolist():
        best = retrieval.speech_to_image.candidates[query, :ANSWERS].tolist()
        answers = [
            {
                "right": index == int(retrieval.caption_picture[query]),
                "picture": _data_uri(reader.picture(int(retrieval.samples[index]))),
            }
            for index in best
        ]
        rank = 1 + int(retrieval.speech_to_image.rank_counts.ahead[query])
        spoken = {"text": caption_text(reader, retrieval, query)[:_MAX_TEXT], "rank": rank}
        audio = _audio_uri(reader.audio(int(retrieval.captions[query])))
        queries.append({**spoken, "audio": audio, "answers": answers})
    return queries


def _data_uri(stored: bytes) -> str:
    """Encode a stored picture as a small JPEG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(decode_picture(stored, SIDE).transpose(1, 2, 0)).save(buffer, "JPEG", quality=_QUALITY)
    return data_url("image/jpeg", buffer.getvalue())


def _audio_uri(stored: bytes) -> str:
    """Encode the begin of a stored caption as Opus in a data URI."""
    wave = decode_audio(stored)[: int(_MAX_SECONDS * SAMPLE_RATE)]
    return data_url("audio/ogg", encode_audio(wave, "opus"))
