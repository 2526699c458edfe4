"""What is known of the captions of a split: text, speaker, language, accent, duration, to group results by."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.corpora.synthesis.espeak import ACCENTS
from shards.manifest import Manifest
from shards.reading.bad_samples import UnreadableSampleError
from shards.reading.reader import MAX_META, Reader

logger = logging.getLogger(__name__)

_THREADS = 16  # concurrent requests to remote shards
_SYNTHESIZED = "scenes"  # the corpus whose speakers are voices of espeak-ng, which are named by accent and variant
_ACCENTS = frozenset(accent for accents in ACCENTS.values() for accent in accents)


@dataclass(frozen=True)
class CaptionAttributes:
    """The captions of a split in the order of the manifest's rows; None: the shards do not say."""

    text: list[str | None]  # transcript of each caption
    speaker: list[str | None]  # who says it; of the scenes the synthesizer's voice
    language: list[str | None]  # code of the language, as in `en`
    # Variety of the language that a voice of espeak-ng speaks, by its name there, as in `en-gb-scotland`; `en` is
    # British. Only the scenes have such voices.
    accent: list[str | None]
    duration: np.ndarray  # seconds, float32 [captions]


def read_caption_attributes(manifest: Manifest, split: str) -> CaptionAttributes:
    """Read text, speaker and language of all captions of a split from the JSON of its samples.

    Args:
        manifest: The data set.
        split: Name of the split. In remote shards, each of its samples takes a request.

    Raises:
        UserError: There is no such split, or a shard is missing or differs in size from the manifest.
        TransientError: The disk or network does not respond.
    """
    samples = manifest.rows(split)
    rows = np.concatenate([np.arange(0), *(manifest.captions(sample) for sample in samples.tolist())])
    attributes = CaptionAttributes([], [], [], [], manifest.duration[rows])
    unreadable = 0
    for sample, captions in zip(samples.tolist(), _captions(manifest, samples), strict=True):
        count = len(manifest.captions(sample))
        if len(captions) != count:
            captions, unreadable = [{}] * count, unreadable + 1
        for name in ("text", "speaker", "language"):
            getattr(attributes, name).extend(_text(caption, name) for caption in captions)
    attributes.accent.extend(_accent(manifest.corpus, speaker) for speaker in attributes.speaker)
    if unreadable:
        logger.warning(
            "%s: the JSON of %s samples of split %s is damaged: texts, speakers and languages of these are unknown",
            manifest.location,
            f"{unreadable:,}",
            split,
        )
    return attributes


def _captions(manifest: Manifest, samples: np.ndarray) -> Iterable[list[Any]]:
    """Yield the captions in the JSON of each sample; an empty list if it is damaged."""
    reader = Reader(manifest)

    def captions(sample: int) -> list[Any]:
        if manifest.meta_bytes[sample] > MAX_META:
            return []
        try:
            stored = reader.meta(sample)["captions"]
        except (UnreadableSampleError, KeyError, TypeError, ValueError, RecursionError):  # not a sample's JSON
            return []
        return stored if isinstance(stored, list) else []

    if not manifest.url:
        return map(captions, samples.tolist())
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(captions, samples.tolist()))


def _accent(corpus: str, speaker: str | None) -> str | None:
    accent = (speaker or "").partition("+")[0]
    return accent if corpus == _SYNTHESIZED and accent in _ACCENTS else None


def _text(caption: Any, name: str) -> str | None:
    value = caption.get(name) if isinstance(caption, dict) else None
    return value if isinstance(value, str) and value else None
