"""A picture of what was retrieved: some spoken queries with their pictures, some pictures with their captions."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.manifest import Manifest
from shards.reading.reader import Reader
from toolkit.evaluation.recall import RankCounts
from toolkit.evaluation.retrieve import Retrieval

SPOKEN, SHOWN = 8, 4  # examples of each direction
PICTURES, CAPTIONS = 5, 3  # answers shown of each
NOTE = "Queries are taken at equal distances over the split, whatever was found for them. Green: a right answer."

_SIDE, _GAP, _MARGIN, _LABEL, _FRAME = 112, 12, 28, 260, 5
_WIDTH = 2 * _MARGIN + _LABEL + PICTURES * (_SIDE + _GAP)
_INK, _GREY, _GREEN, _PAPER = (25, 25, 28), (120, 120, 126), (22, 148, 72), (255, 255, 255)


@dataclass
class Spoken:
    """A caption and the pictures found for it, best first."""

    text: str
    rank: int  # where the right picture stands, from 1
    pictures: list[Image.Image]
    right: list[bool]


@dataclass
class Shown:
    """A picture and the captions found for it, best first."""

    picture: Image.Image
    rank: int
    texts: list[str]
    right: list[bool]


def save_gallery(manifest: Manifest, found: Retrieval, path: Path) -> None:
    """Draw examples of a retrieval as a PNG."""
    reader = Reader(manifest)
    spoken, shown = examples(reader, found)
    image = draw_gallery(titles(found.report, manifest.corpus), spoken, shown)
    image.save(path, format="PNG")


def equally_spaced(total: int, count: int) -> list[int]:
    """Up to `count` of the numbers below `total`, at equal distances."""
    count = min(total, count)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def examples(reader: Reader, found: Retrieval) -> tuple[list[Spoken], list[Shown]]:
    """Read the examples that are to be drawn."""

    def picture(at: int) -> Image.Image:
        with Image.open(io.BytesIO(reader.picture(int(found.samples[at])))) as opened:
            return ImageOps.fit(opened.convert("RGB"), (_SIDE, _SIDE))

    def text(at: int) -> str:
        return caption_text(reader, found, at)

    spoken = []
    for query in equally_spaced(len(found.captions), SPOKEN):
        best = found.speech_to_image.candidates[query, :PICTURES].tolist()
        right = [at == int(found.picture[query]) for at in best]
        rank = _rank(found.speech_to_image.rank_counts, query)
        spoken.append(Spoken(text(query), rank, [picture(at) for at in best], right))
    shown = []
    for query in equally_spaced(len(found.queries), SHOWN):
        best = found.image_to_speech.candidates[query, :CAPTIONS].tolist()
        at = int(found.queries[query])
        right = [int(found.picture[caption]) == at for caption in best]
        rank = _rank(found.image_to_speech.rank_counts, query)
        shown.append(Shown(picture(at), rank, [text(caption) for caption in best], right))
    return spoken, shown


def caption_text(reader: Reader, found: Retrieval, at: int) -> str:
    """What caption number `at` of a retrieval says, if the shards know that."""
    sample = int(found.samples[found.picture[at]])
    number = int(found.captions[at] - reader.manifests[0].first_caption[sample])
    caption = reader.meta(sample)["captions"][number]
    return caption.get("text") or f"(no text: utterance {caption.get('utterance')})"


def _rank(rank_counts: RankCounts, query: int) -> int:
    return 1 + int(rank_counts.ahead[query])


def titles(report: dict[str, Any], corpus: str) -> list[str]:
    """Say what was measured, and each direction's recall."""
    reranked = report["reranked"]
    recall = reranked or report["coarse"]
    how = f"best {reranked['k']} re-ranked" if reranked else "coarse"
    size = f"{report['captions']:,} spoken captions, {report['pictures']:,} pictures"
    lines = [f"{corpus}, {report['split']}: {size}, {how}"]
    for name in ("speech_to_image", "image_to_speech"):
        figures = "   ".join(f"{cutoff} {value:.1f} %" for cutoff, value in recall[name].items())
        lines.append(f"{name.replace('_', ' ').capitalize()}:   {figures}")
    return lines


def draw_gallery(titles: list[str], spoken: list[Spoken], shown: list[Shown]) -> Image.Image:
    """Lay the examples out on one page.

    Args:
        titles: Heading, and the line above each of the two directions.
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
    pen.text((_MARGIN, y + _SIDE - 14), f"right picture: number {example.rank}", _GREY, _font(12))
    for column, (picture, right) in enumerate(zip(example.pictures, example.right, strict=True)):
        _paste(page, pen, _MARGIN + _LABEL + column * (_SIDE + _GAP), y, picture, right)


def _draw_shown(page: Image.Image, pen: ImageDraw.ImageDraw, y: int, example: Any) -> None:
    _paste(page, pen, _MARGIN, y, example.picture, False)
    left = _MARGIN + _SIDE + 24
    for number, (text, right) in enumerate(zip(example.texts, example.right, strict=True)):
        line = textwrap.shorten(text, 80, placeholder=" ...")
        pen.text((left, y + 8 + 26 * number), f"{number + 1}.  {line}", _GREEN if right else _INK, _font(15))
    pen.text((left, y + _SIDE - 14), f"first right caption: number {example.rank}", _GREY, _font(12))


def _paste(page: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, picture: Image.Image, right: bool) -> None:
    if right:
        pen.rectangle((x - _FRAME, y - _FRAME, x + _SIDE + _FRAME - 1, y + _SIDE + _FRAME - 1), _GREEN)
    page.paste(picture, (x, y))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
