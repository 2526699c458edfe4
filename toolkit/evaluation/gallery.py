"""An image of retrieved examples: spoken queries with their pictures, and pictures with their captions."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.files import atomic_write
from shards.manifest import Manifest
from shards.reading.reader import Reader
from toolkit.evaluation.recall import RankCounts
from toolkit.evaluation.retrieve import Retrieval

SPOKEN, SHOWN = 8, 4  # queries of each direction
PICTURES, CAPTIONS = 5, 3  # candidates per query
NOTE = "Queries are equally spaced over the split, not selected by their result. Green: correct."

_SIDE, _GAP, _MARGIN, _LABEL, _FRAME = 112, 12, 28, 260, 5
_WIDTH = 2 * _MARGIN + _LABEL + PICTURES * (_SIDE + _GAP)
_INK, _GREY, _GREEN, _PAPER = (25, 25, 28), (120, 120, 126), (22, 148, 72), (255, 255, 255)


@dataclass
class Spoken:
    """A spoken query and the pictures found for it, best first."""

    text: str
    rank: int  # of the correct picture, from 1
    pictures: list[Image.Image]
    right: list[bool]


@dataclass
class Shown:
    """A picture query and the captions found for it, best first."""

    picture: Image.Image
    rank: int  # of the first correct caption, from 1
    texts: list[str]
    right: list[bool]


def save_gallery(manifest: Manifest, retrieval: Retrieval, path: Path) -> None:
    """Draw examples of an evaluation, and save them as a PNG."""
    reader = Reader(manifest)
    spoken, shown = examples(reader, retrieval)
    image = draw_gallery(titles(retrieval.report, manifest.corpus), spoken, shown)
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def equally_spaced(total: int, count: int) -> list[int]:
    """Return up to `count` equally spaced numbers below `total`."""
    count = min(total, count)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def examples(reader: Reader, retrieval: Retrieval) -> tuple[list[Spoken], list[Shown]]:
    """Read the examples to draw."""

    def picture(index: int) -> Image.Image:
        with Image.open(io.BytesIO(reader.picture(int(retrieval.samples[index])))) as opened:
            return ImageOps.fit(opened.convert("RGB"), (_SIDE, _SIDE))

    def text(index: int) -> str:
        return caption_text(reader, retrieval, index)

    spoken = []
    for query in equally_spaced(len(retrieval.captions), SPOKEN):
        best = retrieval.speech_to_image.candidates[query, :PICTURES].tolist()
        right = [index == int(retrieval.picture[query]) for index in best]
        rank = _rank(retrieval.speech_to_image.rank_counts, query)
        spoken.append(Spoken(text(query), rank, [picture(index) for index in best], right))
    shown = []
    for query in equally_spaced(len(retrieval.queries), SHOWN):
        best = retrieval.image_to_speech.candidates[query, :CAPTIONS].tolist()
        index = int(retrieval.queries[query])
        right = [int(retrieval.picture[caption]) == index for caption in best]
        rank = _rank(retrieval.image_to_speech.rank_counts, query)
        shown.append(Shown(picture(index), rank, [text(caption) for caption in best], right))
    return spoken, shown


def caption_text(reader: Reader, retrieval: Retrieval, index: int) -> str:
    """Return the text of a caption, or its utterance id if the shards contain no text."""
    sample = int(retrieval.samples[retrieval.picture[index]])
    number = int(retrieval.captions[index] - reader.manifests[0].first_caption[sample])
    caption = reader.meta(sample)["captions"][number]
    return caption.get("text") or f"(no text: utterance {caption.get('utterance')})"


def _rank(rank_counts: RankCounts, query: int) -> int:
    return 1 + int(rank_counts.ahead[query])


def titles(report: dict[str, Any], corpus: str) -> list[str]:
    """Return the heading, and a line with the recall of each direction."""
    reranked = report["reranked"]
    recall = reranked or report["coarse"]
    method = f"best {reranked['k']} re-ranked" if reranked else "coarse"
    size = f"{report['captions']:,} spoken captions, {report['pictures']:,} pictures"
    lines = [f"{corpus}, {report['split']}: {size}, {method}"]
    for name in ("speech_to_image", "image_to_speech"):
        figures = "   ".join(f"{cutoff} {value:.1f} %" for cutoff, value in recall[name].items())
        lines.append(f"{name.replace('_', ' ').capitalize()}:   {figures}")
    return lines


def draw_gallery(titles: list[str], spoken: list[Spoken], shown: list[Shown]) -> Image.Image:
    """Draw all examples on one page.

    Args:
        titles: Heading of the page, and of each of the two directions.
        spoken: Rows of the upper part.
        shown: Rows of the lower part.
    """
    row = _SIDE + _GAP + 2 * _FRAME
    height = 2 * _MARGIN + 34 + 30 + 2 * 46 + row * (len(spoken) + len(shown))
    page = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), titles[0], _INK, _font(20))
    pen.text((_MARGIN, _MARGIN + 30), NOTE, _GREY, _font(13))
    y = _MARGIN + 64
    for heading, rows in ((titles[1], spoken), (titles[2], shown)):
        pen.text((_MARGIN, y + 12), heading, _INK, _font(16))
        y += 46
        for example in rows:
            (_draw_spoken if isinstance(example, Spoken) else _draw_shown)(page, pen, y, example)
            y += row
    return page


def _draw_spoken(page: Image.Image, pen: ImageDraw.ImageDraw, y: int, example: Any) -> None:
    lines = textwrap.wrap(f"\u201c{example.text}\u201d", 32, max_lines=5, placeholder=" ...")
    pen.multiline_text((_MARGIN, y + 4), "\n".join(lines), _INK, _font(15), spacing=3)
    pen.text((_MARGIN, y + _SIDE - 14), f"rank of the correct picture: {example.rank}", _GREY, _font(12))
    for column, (picture, right) in enumerate(zip(example.pictures, example.right, strict=True)):
        _paste(page, pen, _MARGIN + _LABEL + column * (_SIDE + _GAP), y, picture, right)


def _draw_shown(page: Image.Image, pen: ImageDraw.ImageDraw, y: int, example: Any) -> None:
    _paste(page, pen, _MARGIN, y, example.picture, False)
    left = _MARGIN + _SIDE + 24
    for number, (text, right) in enumerate(zip(example.texts, example.right, strict=True)):
        line = textwrap.shorten(text, 80, placeholder=" ...")
        pen.text((left, y + 8 + 26 * number), f"{number + 1}.  {line}", _GREEN if right else _INK, _font(15))
    pen.text((left, y + _SIDE - 14), f"rank of the first correct caption: {example.rank}", _GREY, _font(12))


def _paste(page: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, picture: Image.Image, right: bool) -> None:
    if right:
        pen.rectangle((x - _FRAME, y - _FRAME, x + _SIDE + _FRAME - 1, y + _SIDE + _FRAME - 1), _GREEN)
    page.paste(picture, (x, y))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
