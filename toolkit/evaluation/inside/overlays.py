"""Attention of the fusion encoder drawn over the image: in total, and by word or by span of time."""

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from toolkit.evaluation.attention import CrossAttention
from toolkit.evaluation.inside.words import Word

_SIDE, _GAP, _LABEL, _COLUMNS = 144, 10, 34, 6
_SPAN = 0.5  # seconds, without words
_MAX_PANELS = 36
_INK, _GRAY, _PAPER, _HOT = (25, 25, 28), (110, 110, 116), (255, 255, 255), np.array([255.0, 60.0, 0.0])


def spans_of(seconds: float) -> list[Word]:
    """Equal spans of about half a second, to show attention by time where there are no words."""
    count = max(1, round(seconds / _SPAN))
    bounds = np.linspace(0.0, seconds, count + 1).tolist()
    return [Word("", start, end) for start, end in itertools.pairwise(bounds)]


def attention_in(frames: Tensor, seconds: float, word: Word) -> Tensor:
    """Mean attention [P] of the frames [T, P] of an utterance of `seconds` that a word overlaps, at least of one."""
    edges = torch.linspace(0, seconds, len(frames) + 1)
    overlap = torch.minimum(edges[1:], torch.tensor(word.end)) - torch.maximum(edges[:-1], torch.tensor(word.start))
    weight = overlap.clamp(min=0)
    if not weight.sum():
        weight = torch.zeros(len(frames)).index_fill(0, overlap.argmax(), 1.0)
    return (weight / weight.sum()) @ frames


def draw_attention(
    image: np.ndarray, attention: CrossAttention, seconds: float, words: Sequence[Word], title: str
) -> bytes:
    """Draw the image, the attention of the whole utterance, and that of each word, on one scale.

    Args:
        image: uint8 [3, S, S] as the model encodes it, in any resolution.
        attention: Of the pair.
        seconds: Duration of the encoded speech.
        words: Words or spans of time; not drawn if only the class token attends.
        title: Line above the panels.

    Returns:
        A PNG.
    """
    shown = Image.fromarray(image.transpose(1, 2, 0)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    maps = [("all of the caption", "", attention.total)]
    for word in words[:_MAX_PANELS] if len(attention.frames) else []:
        time = f"{word.start:.2f} to {word.end:.2f} s"
        maps.append((word.word or time, time if word.word else "", attention_in(attention.frames, seconds, word)))
    largest = max(float(values.max()) for _, _, values in maps)
    panels = [("image", "", shown)]
    panels += [(name, time, overlay(shown, values, largest)) for name, time, values in maps]
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    width = columns * (_SIDE + _GAP) + _GAP
    page = Image.new("RGB", (width, 34 + rows * (_SIDE + _LABEL + _GAP)), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, 8), _shortened(title, width // 8), _INK, ImageFont.load_default(15))
    for number, (name, time, panel) in enumerate(panels):
        x = _GAP + number % _COLUMNS * (_SIDE + _GAP)
        y = 34 + number // _COLUMNS * (_SIDE + _LABEL + _GAP)
        page.paste(panel, (x, y))
        pen.text((x, y + _SIDE + 2), _shortened(name, 19), _INK, ImageFont.load_default(14))
        pen.text((x, y + _SIDE + 18), time, _GRAY, ImageFont.load_default(11))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def overlay(image: Image.Image, attention: Tensor, largest: float) -> Image.Image:
    """Darken an image where little is attended to, and redden it where much is.

    Args:
        image: Square RGB image.
        attention: [P], of a square grid of patches.
        largest: Attention that is drawn strongest.
    """
    side = math.isqrt(len(attention))
    grid = (attention / max(largest, 1e-12)).clamp(0, 1).view(side, side).numpy().astype(np.float32)
    heat = np.asarray(Image.fromarray(grid).resize(image.size, Image.Resampling.BILINEAR))[..., None]
    pixels = np.asarray(image, np.float32) * (0.35 + 0.65 * heat)
    return Image.fromarray(np.clip(pixels * (1 - 0.35 * heat) + 0.35 * heat * _HOT, 0, 255).astype(np.uint8))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
