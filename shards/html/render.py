"""Rendering of pages from Jinja2 templates.

A page extends `base.html`, which holds the style and forbids scripts and everything that is not in the file itself.
Values are escaped wherever they are inserted; only `Markup`, made by a template or a chart, is inserted as it is.
"""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shards.files import atomic_write

_HERE = Path(__file__).parent
_AUDIO_TYPES = {b"fLaC": "audio/flac", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}  # by the first bytes


def write_html(path: Path, template: Path, **values: Any) -> None:
    """Render a page and write it atomically; its template may include what is in its folder and in this one.

    Raises:
        OSError: The file cannot be written.
    """
    page = environment(template.parent).get_template(template.name).render(values)
    with atomic_write(path) as file:
        # A name in a damaged tar or in a log may contain lone surrogates.
        file.write(page.encode(errors="backslashreplace"))


@cache
def environment(folder: Path = _HERE) -> Environment:
    """Return the templates of a folder and of this one; an undefined variable is an error."""
    loader = FileSystemLoader(list(dict.fromkeys([folder, _HERE])))
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_macro(template: str, macro: str, *arguments: Any) -> Markup:
    """Render one macro of a template in this folder."""
    return getattr(environment().get_template(template).module, macro)(*arguments)


def audio_url(data: bytes) -> str:
    """Encode an audio file of a shard as a data URL."""
    return data_url(_AUDIO_TYPES.get(data[:4], "audio/mpeg"), data)


def data_url(mime: str, data: bytes) -> str:
    """Encode bytes as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
