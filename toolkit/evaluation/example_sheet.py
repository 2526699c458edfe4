"""A PNG of retrieved examples: spoken queries with their pictures, and picture queries with their captions."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.files import atomic_write
from shards.manifest import Manifest
from shards.media.picture import open_picture
from shards.reading.reader import Reader
from toolkit.evaluation.recall import RankCounts
from toolkit.evaluation.retrieve import Retrieval

SPEECH_QUERIES, IMAGE_QUERIES = 8, 4
PICTURES, CAPTIONS = 5, 3  # candidates per query
NOTE = "Queries are equally spaced over the split, not selected by their result. Green: correct."

_SIDE, _GAP, _MARGIN, _LABEL, _FRAME = 112, 12, 28, 260, 5
_WIDTH = 2 * _MARGIN + _LABEL + PICTURES * (_SIDE + _GAP)
_INK, _GRAY, _GREEN, _PAPER = (25, 25, 28), (120, 120, 126), (22, 148, 72), (255, 255, 255)


@dataclass
class SpeechQuery:
    """A spoken query and the pictures found for it, best first."""

    text: str
    rank: int  # of the correct picture, from 1
    pictures: list[Image.Image]
    correct: list[bool]


@dataclass
class ImageQuery:
    """A picture query and the captions found for it, best first."""

    picture: Image.Image
    rank: int  # of the first correct caption, from 1
    texts: list[str]
    correct: list[bool]


def save_example_sheet(manifest: Manifest, retrieval: Retrieval, path: Path) -> None:
    """Draw examples of an evaluation, and save them as a PNG."""
    reader = Reader(manifest)
    speech_queries, image_queries = examples(reader, retrieval)
    image = draw_example_sheet(titles(retrieval.report, manifest.corpus), speech_queries, image_queries)
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def equally_spaced(total: int, count: int) -> list[int]:
    """Return up to `count` equally spaced numbers below `total`."""
    count = min(total, count)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def examples(reader: Reader, retrieval: Retrieval) -> tuple[list[SpeechQuery], list[ImageQuery]]:
    """Read the examples to draw."""

    def picture(index: int) -> Image.Image:
        with open_picture(reader.picture(int(retrieval.samples[index]))) as opened:
            return ImageOps.fit(opened.convert("RGB"), (_SIDE, _SIDE))

    def text(index: int) -> str:
        return caption_text(reader, retrieval, index)

    speech_queries = []
    for query in equally_spaced(len(retrieval.captions), SPEECH_QUERIES):
        best = retrieval.speech_to_image.candidates[query, :PICTURES].tolist()
        correct = [index == int(retrieval.caption_picture[query]) for index in best]
        rank = _rank(retrieval.speech_to_image.rank_counts, query)
        speech_queries.append(SpeechQuery(text(query), rank, [picture(index) for index in best], correct))
    image_queries = []
    for query in equally_spaced(len(retrieval.queries), IMAGE_QUERIES):
        best = retrieval.image_to_speech.candidates[query, :CAPTIONS].tolist()
        index = int(retrieval.queries[query])
        correct = [int(retrieval.caption_picture[caption]) == index for caption in best]
        rank = _rank(retrieval.image_to_speech.rank_counts, query)
        image_queries.append(ImageQuery(picture(index), rank, [text(caption) for caption in best], correct))
    return speech_queries, image_queries


def caption_text(reader: Reader, retrieval: Retrieval, index: int) -> str:
    """Return the text of a caption, or its utterance id if the shards contain no text."""
    sample = int(retrieval.samples[retrieval.caption_picture[index]])
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


def draw_example_sheet(
    titles: list[str], speech_queries: list[SpeechQuery], image_queries: list[ImageQuery]
) -> Image.Image:
    """Draw all examples on one page.

    Args:
        titles: Heading of the page, and of each of the two directions.
        speech_queries: Rows of the upper part.
        image_queries: Rows of the lower part.
    """
    row = _SIDE + _GAP + 2 * _FRAME
    height = 2 * _MARGIN + 34 + 30 + 2 * 46 + row * (len(speech_queries) + len(image_queries))
    page = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), titles[0], _INK, _font(20))
    pen.text((_MARGIN, _MARGIN + 30), NOTE, _GRAY, _font(13))
    y = _MARGIN + 64
    for heading, rows in ((titles[1], speech_queries), (titles[2], image_queries)):
        pen.text((_MARGIN, y + 12), heading, _INK, _font(16))
        y += 46
        for example in rows:
            (_draw_speech_query if isinstance(example, SpeechQuery) else _draw_image_query)(page, pen, y, example)
            y += row
    return page


def _draw_speech_query(page: Image.Image, pen: ImageDraw.ImageDraw, y: int, example: Any) -> None:
    lines = textwrap.wrap(f"\u201c{example.text}\u201d", 32, max_lines=5, placeholder=" ...")
    pen.multiline_text((_MARGIN, y + 4), "\n".join(lines), _INK, _font(15), spacing=3)
    pen.text((_MARGIN, y + _SIDE - 14), f"rank of the correct picture: {example.rank}", _GRAY, _font(12))
    for column, (picture, correct) in enumerate(zip(example.pictures, example.correct, strict=True)):
        _paste(page, pen, _MARGIN + _LABEL + column * (_SIDE + _GAP), y, picture, correct)


def _draw_image_query(page: Image.Image, pen: ImageDraw.ImageDraw, y: int, example: Any) -> None:
    _paste(page, pen, _MARGIN, y, example.picture, False)
    left = _MARGIN + _SIDE + 24
    for number, (text, correct) in enumerate(zip(example.texts, example.correct, strict=True)):
        line = textwrap.shorten(text, 80, placeholder=" ...")
        pen.text((left, y + 8 + 26 * number), f"{number + 1}.  {line}", _GREEN if correct else _INK, _font(15))
    pen.text((left, y + _SIDE - 14), f"rank of the first correct caption: {example.rank}", _GRAY, _font(12))


def _paste(page: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, picture: Image.Image, correct: bool) -> None:
    if correct:
        pen.rectangle((x - _FRAME, y - _FRAME, x + _SIDE + _FRAME - 1, y + _SIDE + _FRAME - 1), _GREEN)
    page.paste(picture, (x, y))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
