"""The requests of the page of `search.py --serve`: search by the bytes of a query, attention, and indexed items."""

import hashlib
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from shards.media.audio import encode_audio, read_audio, read_recording
from shards.media.picture import open_picture, read_picture
from toolkit.evaluation.attention import cross_attention
from toolkit.indexing.items import Item, printable
from toolkit.indexing.search import Hit, Searcher
from toolkit.model.outputs import Encoded

MAX_BODY = 32 << 20  # bytes of a query
MAX_PIXELS = 64_000_000  # of a posted picture, or of one in shards
MAX_ITEM_SECONDS = 600.0  # of a recording that the page plays
SHORT_SIDE, QUALITY = 384, 85  # of the pictures on the page
_REMEMBERED = 8  # encoded queries, in memory
_DECODED_AT_ONCE = 2  # pictures or recordings; bounds memory


class ItemMissing(UserError):
    """There is no such item, or its file has changed since it was indexed."""


@dataclass(frozen=True)
class Query:
    """An encoded query."""

    encoded: Encoded  # output of the encoder, [1]
    seconds: float  # duration of a recording; 0 for an image
    warning: str | None  # why a recording may be unusable; None: it is audible


class PageAnswers:
    """Answers to the page, for several threads; the model is used by one of them at a time.

    A query is kept as its encoding only, of the last few queries, in memory.

    Args:
        searcher: Searches the index.
        top: Results of a search.
        rerank: Candidates of the second, re-ranked order; 0: none.
    """

    def __init__(self, searcher: Searcher, top: int, rerank: int) -> None:
        self.searcher, self.top, self.rerank = searcher, top, rerank
        self._model = threading.Lock()
        self._decoders = threading.BoundedSemaphore(_DECODED_AT_ONCE)
        self._queries: OrderedDict[bytes, Query] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Return what the page has to know of the index and of the limits."""
        processor = self.searcher.encoder.processor
        return {
            "indexed": self.searcher.index.head.modality,
            "items": len(self.searcher.index),
            "rerank": min(self.rerank, len(self.searcher.index)),
            "max_seconds": processor.max_seconds,
            "max_bytes": MAX_BODY,
            "sampling_rate": processor.sampling_rate,
            "resize": processor.resize,
        }

    def search(self, body: bytes, rerank: bool) -> dict[str, Any]:
        """Search by the bytes of an audio file or a picture.

        Args:
            body: WAV or another format of libsndfile; JPEG, PNG or WebP.
            rerank: Re-rank the best candidates, which takes longer.

        Raises:
            UserError: The query cannot be decoded, or is too long or too large.
        """
        with self._model:
            query = self._query(body)
            with torch.inference_mode():
                (hits,) = self.searcher.search(query.encoded, self.top, self.rerank if rerank else 0)
        return {"results": [_shown(hit) for hit in hits], "warning": query.warning}

    def attention(self, body: bytes, row: int) -> dict[str, Any]:
        """Compute the cross-attention of a query and an indexed item.

        Returns:
            Rows of P weights, each summing to 1: `frames` one per pooled speech frame, their mean `total`, and `match`
            of the class token; the side of the square of patches; the duration of the speech in seconds.

        Raises:
            UserError: The query or the item cannot be decoded.
        """
        item, encoder = self._item(row), self.searcher.encoder
        modality = self.searcher.index.head.modality
        with self._model:
            query = self._query(body)
            decoded = self.searcher.source.load(item, encoder.processor)
            encoded = encoder.encode(modality, [decoded])
            speech, image = (query.encoded, encoded) if modality == "image" else (encoded, query.encoded)
            weights = cross_attention(encoder.model, speech, image)
        seconds = query.seconds if modality == "image" else len(decoded) / encoder.processor.sampling_rate
        return {
            "side": math.isqrt(len(weights.match)),
            "seconds": seconds,
            "total": _rounded(weights.total),
            "match": _rounded(weights.match),
            "frames": _rounded(weights.frames),
        }

    def item(self, row: int) -> tuple[str, bytes]:
        """Encode an indexed item again, small: its media type, JPEG or WAV, and its bytes.

        Raises:
            UserError: There is none, its file has changed, or it cannot be decoded.
        """
        item = self._item(row)
        with self._decoders:
            content = self.searcher.source.content(item.name)
            if self.searcher.index.head.modality == "image":
                picture = open_picture(content, MAX_PIXELS) if isinstance(content, bytes) else content
                return "image/jpeg", read_picture(picture, SHORT_SIDE, QUALITY)
            return "audio/wav", encode_audio(read_audio(content, MAX_ITEM_SECONDS), "wav")

    def _item(self, row: int) -> Item:
        """Return an indexed item that is unchanged."""
        if not 0 <= row < len(self.searcher.index):
            raise ItemMissing(f"no item {row}: the index has {len(self.searcher.index):,}")
        item = self.searcher.index.item(row)
        if not self.searcher.source.is_current(item):
            raise ItemMissing(f"{printable(item.name)} has changed since it was indexed: update the index")
        return item

    def _query(self, body: bytes) -> Query:
        key = hashlib.sha256(body).digest()
        query = self._queries.pop(key, None) or self._encode(body)
        self._queries[key] = query
        while len(self._queries) > _REMEMBERED:
            self._queries.popitem(last=False)
        return query

    def _encode(self, body: bytes) -> Query:
        encoder, modality = self.searcher.encoder, self.searcher.query_modality
        if modality == "image":
            image = encoder.processor(images=[open_picture(body, MAX_PIXELS)])["images"][0]
            return Query(encoder.encode("image", [image]), 0.0, None)
        try:
            recording = read_recording(body, encoder.processor.max_seconds)
        except UserError as error:  # the page has no such option
            raise UserError(str(error).removesuffix(" (--max-seconds)")) from None
        wave = torch.from_numpy(recording.wave)
        return Query(encoder.encode("audio", [wave]), len(wave) / encoder.processor.sampling_rate, recording.warning)


def _shown(hit: Hit) -> dict[str, Any]:
    """A result as the page shows it; the path on this machine stays here."""
    numbers = {"cosine": hit.cosine, "match": hit.match, "score": hit.score}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
    return {"row": hit.row, "name": printable(hit.name), **finite}


def _rounded(weights: Tensor) -> Any:
    return (weights.double() * 1e6).round().div(1e6).tolist()
