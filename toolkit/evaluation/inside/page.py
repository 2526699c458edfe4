"""A page about what was found inside a model, with pictures and playable audio: one file that loads nothing."""

import itertools
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shards.errors import UserError
from shards.html.chart import bar_chart, line_chart
from shards.html.render import audio_url, data_url, write_html
from shards.reading.reader import Reader
from toolkit.evaluation.inside.result import Inside, describe_gap

PAGE = "inside.html"
_NAMES = {
    "noised": "noised tokens",
    "right": "reconstructed with its pair",
    "other": "with another pair's",
    "none": "alone",
}


def write_page(result: Inside, reader: Reader) -> Path:
    """Write `inside.html` into the folder of a result.

    Args:
        result: What was found.
        reader: Of the shards.

    Returns:
        The page.

    Raises:
        UserError: A picture or caption cannot be read, or the page cannot be written.
    """
    pairs = result.attention if isinstance(result.attention, list) else []
    step = "" if result.step is None else f", step {result.step:,}"
    size = f"{result.pictures:,} pictures, {result.captions:,} spoken captions"
    hardest = result.hardest
    values = {
        "title": f"Inside {result.run}",
        "subtitle": f"{result.corpus} {result.split}: {size}; checkpoint {result.checkpoint}{step}",
        "gap": describe_gap(result),
        "charts": distribution_charts(result),
        "denoising": denoising_charts(result),
        "denoising_reason": result.denoising.get("reason"),
        "attention": [_attention(result.folder, pair, reader) for pair in pairs],
        "attention_reason": result.attention.get("reason") if isinstance(result.attention, dict) else None,
        "hardest_captions": [_caption(each, reader) for each in hardest["speech_to_image"]],
        "hardest_pictures": [_picture(each, reader) for each in hardest["image_to_speech"]],
    }
    path = result.folder / PAGE
    try:
        write_html(path, Path(__file__).with_name("page.html"), **values)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def distribution_charts(result: Inside) -> list[Markup]:
    """Draw the cosines of right and wrong pairs, and the ranks of both directions."""
    return [_similarity_chart(result), *(_rank_chart(result, direction) for direction in result.ranks)]


def denoising_charts(result: Inside) -> list[Markup]:
    """Draw the denoising curves of each modality; none where they were not measured."""
    return [] if "reason" in result.denoising else [_denoising_chart(*item) for item in result.denoising.items()]


def _similarity_chart(result: Inside) -> Markup:
    edges = result.similarity["edges"]
    centers = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    curves = {}
    for name in ("right", "wrong"):
        counts = result.similarity[name]
        curves[f"{name} pairs"] = {c: 100 * n / max(1.0, sum(counts)) for c, n in zip(centers, counts, strict=True)}
    # In groups of their own: the legend names no last value, which says nothing of a distribution.
    return line_chart("pairs by cosine, percent", curves, "cosine", groups={name: name for name in curves})


def _rank_chart(result: Inside, direction: str) -> Markup:
    edges, counts = result.ranks[direction]["edges"], result.ranks[direction]["counts"]
    names = [str(low) if high == low + 1 else f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    shares = {name: 100 * count / max(1, sum(counts)) for name, count in zip(names, counts, strict=True)}
    return bar_chart(f"{direction.replace('_', ' ')}: rank of the correct one, percent of queries", {"queries": shares})


def _denoising_chart(side: str, curves: dict[str, Any]) -> Markup:
    shown = {text: dict(zip(curves["ratio"], curves[name], strict=True)) for name, text in _NAMES.items()}
    return line_chart(f"{side} tokens: {curves['loss']} loss", shown, "ratio of noise")


def _attention(folder: Path, pair: dict[str, Any], reader: Reader) -> dict[str, Any]:
    image = data_url("image/png", (folder / Path(pair["image"]).name).read_bytes())
    query = pair["query"]
    return {"match": pair["match"], "image": image, "text": _text(query), "audio": _audio(query, reader)}


def _caption(each: dict[str, Any], reader: Reader) -> dict[str, Any]:
    right = each["answer"]["sample"]
    shown = list(enumerate(each["found"], 1))
    if all(one["sample"] != right for _, one in shown):
        shown.append((each["rank"], each["answer"]))
    answers = [
        {"number": number, "right": one["sample"] == right, "picture": _image(one, reader)} for number, one in shown
    ]
    return {**each, "text": _text(each["query"]), "audio": _audio(each["query"], reader), "answers": answers}


def _picture(each: dict[str, Any], reader: Reader) -> dict[str, Any]:
    recordings = [("best of its own", each["answer"], each["similarity"])]
    recordings += [
        (f"found as number {number}", reference, similarity)
        for number, (reference, similarity) in enumerate(zip(each["found"], each["found_similarity"], strict=True), 1)
    ]
    blank = {"picture": None, "problem": None, "waveform": ""}
    cards: list[dict[str, Any]] = [
        {**blank, "text": _text(one), "note": f"{note}, cosine {cosine:.3f}", "audio": _audio(one, reader)}
        for note, one, cosine in recordings[:3]
    ]
    more = {"note": f"rank of its first caption: {each['rank']}", "picture": _image(each["query"], reader)}
    return {"title": each["query"]["id"], "problem": None, "recordings": cards, "more": None, **more}


def _text(reference: dict[str, Any]) -> str:
    return reference["text"] or f"caption {reference['caption']} of {reference['id']}"


def _image(reference: dict[str, Any], reader: Reader) -> str:
    return data_url("image/jpeg", reader.picture(reference["sample"]))


def _audio(reference: dict[str, Any], reader: Reader) -> str:
    return audio_url(reader.audio(reference["caption"]))
