"""Retrieved examples of a run, as `toolkit/evaluation/examples.py` writes them, checked before they enter a page."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.files import read_object

FINAL = "examples-final.json"  # of the final evaluation
_NAME = re.compile(r"examples-\d{8}\.json")  # the only files that a log can have read
_MAX_BYTES = 4 << 20
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")  # the only source that a picture can have
_AUDIO = re.compile(r"data:audio/(flac|ogg|wav);base64,[A-Za-z0-9+/]+=*")


def read_examples(run: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Read the examples of the final evaluation, or of the last one in the log whose file can be read.

    Args:
        run: The run folder.
        records: Records of its log.

    Returns:
        {"note": which queries these are, "queries": values of the macro `query` of `shards/html/parts.html`}; None
        without examples.
    """
    names = [(FINAL, None), *((record.get("examples"), record.get("step")) for record in reversed(records))]
    for name, step in names:
        if isinstance(name, str) and (name == FINAL or _NAME.fullmatch(name)):
            found = read_object(run / name, _MAX_BYTES)
            if found and isinstance(found.get("queries"), list):
                how = "re-ranked" if found.get("reranked") else "by the global embeddings"
                when = "Final evaluation" if step is None else f"Step {step}"
                note = (
                    f"{when}, {found.get('split')}, {how}: spoken queries sampled once by the run's seed, whatever is "
                    "found for them, and the images found, best first. Framed: the correct one."
                )
                return {"note": note, "queries": [_query(one) for one in found["queries"] if isinstance(one, dict)]}
    return None


def _query(query: dict[str, Any]) -> dict[str, Any]:
    answers = query.get("answers")
    return {
        "text": str(query.get("text")),
        "rank": str(query.get("rank")),
        "audio": _valid(query.get("audio"), _AUDIO),
        "answers": [
            {"right": bool(answer.get("right")), "picture": answer["picture"]}
            for answer in (answers if isinstance(answers, list) else [])
            if isinstance(answer, dict) and _valid(answer.get("picture"), _PICTURE)
        ],
    }


def _valid(source: Any, pattern: re.Pattern[str]) -> str | None:
    return source if isinstance(source, str) and pattern.fullmatch(source) else None
