"""Samples of stock tars: members grouped by key as `webdataset` groups them, and what each member is.

`webdataset` only groups here: its decoders, some of which run code from the data, and its openers, some of which start
programs, are never called.
"""

import argparse
import fnmatch
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shards.corpora.records import as_object
from shards.corpora.text_files import parse_json
from shards.errors import UserError
from shards.manifest import SPLIT
from shards.progress import Progress, progress_bar
from shards.remote import Remote, is_url
from shards.tars.members import TarListing, TarMember, list_tar
from shards.worker_pool import run_tasks

logger = logging.getLogger(__name__)

IMAGE, AUDIO, TEXT, JSON = "jpg;jpeg;png;webp", "wav;flac;mp3;ogg;opus", "txt", "json"
DEFAULT_SPLIT = "train"
_SPLIT_WORDS = ("train", "training", "dev", "val", "valid", "validation", "test")
_MAX_NAMED = 8  # endings named in a message
_HINT = "--root is a folder of tars, or their names: data/train-{000..009}.tar, 'data/*.tar', s3://bucket/a-{0..9}.tar"


@dataclass(frozen=True)
class Layout:
    """What the members of a sample are, by what follows the key in their names: `jpg` is KEY.jpg, KEY.0.jpg, ...

    Where several fit one part, the first counts, as in `webdataset`.
    """

    image: tuple[str, ...] = tuple(IMAGE.split(";"))
    audio: tuple[str, ...] = tuple(AUDIO.split(";"))
    text: tuple[str, ...] = (TEXT,)
    json: tuple[str, ...] = (JSON,)

    def is_text(self, name: str) -> bool:
        """Whether a member is text or JSON, which is read while the tar is listed."""
        return bool(_match(name.rpartition("/")[2].partition(".")[2].lower(), (*self.text, *self.json)))

    def is_known(self, name: str) -> bool:
        """Whether a member is anything of a sample."""
        endings = (*self.image, *self.audio, *self.text, *self.json)
        return bool(_match(name.rpartition("/")[2].partition(".")[2].lower(), endings))


@dataclass
class StockSample:
    """The members of one key; captions are in natural order of what precedes their ending, so 2 before 10."""

    key: str
    pictures: list[TarMember] = field(default_factory=list)  # one, unless the layout is ambiguous
    audio: dict[str, TarMember] = field(default_factory=dict)  # by what is between key and ending: "" for KEY.wav
    texts: dict[str, bytes | None] = field(default_factory=dict)  # likewise; None: longer than 1 MiB
    json: dict[str, bytes | None] = field(default_factory=dict)
    text_members: dict[str, TarMember] = field(default_factory=dict)
    json_members: dict[str, TarMember] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Parse KEY.json; empty if there is none; raises as `parse_object` does."""
        return parse_object(self.json[""]) if "" in self.json else {}


@dataclass
class StockTar:
    """The samples of one tar, and what does not fit: pairs of a key ("" if unknown) and a reason."""

    location: str
    samples: list[StockSample]
    problems: list[tuple[str, str]]
    ignored: set[str]  # endings of members that the layout does not name


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which members are what, and the splits."""
    for name, default, what in (
        ("image", IMAGE, "picture"),
        ("audio", AUDIO, "audio of the captions: KEY.wav, or KEY.0.wav, KEY.1.wav, ..."),
        ("text", TEXT, "text of a caption"),
        ("json", JSON, "JSON of the sample"),
    ):
        parser.add_argument(
            f"--{name}", type=_endings, default=_endings(default), metavar="END", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--split",
        type=_split_pattern,
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="split of the tars whose path or name matches, such as dev=val-*.tar; several times (default: from the "
        "JSON, else from a folder or name such as train or val)",
    )


def _endings(text: str) -> list[str]:
    endings = [one.strip().strip(".").lower() for one in text.split(";")]
    if not all(re.fullmatch(r"[^/;\s]+", one) for one in endings):
        raise argparse.ArgumentTypeError(f"expected endings such as {IMAGE}, got {text!r}")
    return endings


def _split_pattern(text: str) -> str:
    name, separator, pattern = text.partition("=")
    if not separator or not SPLIT.fullmatch(name) or not pattern:
        raise argparse.ArgumentTypeError(f"expected NAME=PATTERN such as train=train-*.tar, got {text!r}")
    return text


def layout_of(options: argparse.Namespace) -> Layout:
    """Return the layout that the options of `add_layout` say."""
    return Layout(*(tuple(getattr(options, name)) for name in ("image", "audio", "text", "json")))


def find_tars(roots: Sequence[str]) -> list[str]:
    """Expand folders with their subfolders, patterns, braces and URLs to tars, in natural order and each once.

    Returns:
        Absolute paths and URLs.

    Raises:
        UserError: There is no tar, or a location is not one that is read.
    """
    tars: dict[str, None] = {}
    for root in roots:
        expanded = [tar for location in _expand_braces(root) for tar in _expand(location)]
        if not expanded:
            given = is_url(root) or glob.has_magic(root) or "{" in root or os.path.exists(root)
            problem = f"no tar in {root}" if given else f"{root}: no such folder, or no access to it (--root)"
            raise UserError(f"{problem}: {_HINT}")
        tars |= dict.fromkeys(expanded)
    return list(tars)


def _expand_braces(location: str) -> list[str]:
    if re.match(r"pipe:|[\w+]*::", location):
        raise UserError(f"{location}: only files and plain URLs are read, no commands and no chains: {_HINT}")
    if not is_url(location) and os.path.exists(location):
        return [location]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(location))
    except ValueError as error:
        raise UserError(f"{location}: {error}: {_HINT}") from None


def _expand(location: str) -> list[str]:
    if is_url(location):
        return _expand_url(location)
    if os.path.isdir(location):
        paths = [str(path) for path in Path(location).rglob("*.tar")]
    elif os.path.exists(location):
        paths = [location]
    else:
        paths = glob.glob(location, recursive=True) if glob.has_magic(location) else []
    return [os.path.abspath(tar) for tar in sorted(paths, key=natural_order)]


def _expand_url(url: str) -> list[str]:
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    pattern = url if glob.has_magic(url) else f"{url.rstrip('/')}/*.tar"
    start = pattern[: re.search(r"[*?[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    remote = Remote(start)
    paths = remote.with_retries("", lambda system, path: system.glob(path + pattern[len(start) :].lstrip("/")))
    base = remote.with_retries("", lambda system, path: path.rstrip("/"))
    tars = [f"{start}/{path[path.index(base) + len(base) :].lstrip('/')}" for path in paths if path.endswith(".tar")]
    return sorted(tars, key=natural_order)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers inside names are compared as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts]


def split_of(location: str, patterns: Sequence[str]) -> str | None:
    """Return the split of a tar: of the first pattern that its path or name matches, else of a word in its path.

    Args:
        location: Path or URL.
        patterns: NAME=PATTERN, in the order of the command line.

    Returns:
        None if patterns are given and none matches, or if its path names no split. A word in its name comes before its
        folder, which has to be called like a split (train, val2014), and of several words the last counts.
    """
    for name, _, pattern in (one.partition("=") for one in patterns):
        for one in _expand_braces(pattern):
            if fnmatch.fnmatch(location, one) or fnmatch.fnmatch(location, f"*/{one}"):
                return name
    if patterns:
        return None
    *_, folder, name = ["", *location.lower().split("/")]
    in_name = [word for word in re.split(r"[^a-z]+", name) if word in _SPLIT_WORDS]
    in_folder = [word for word in (folder.rstrip("0123456789"),) if word in _SPLIT_WORDS]
    return next(reversed(in_folder + in_name), None)


def read_tars(locations: Sequence[str], layout: Layout, jobs: int) -> Iterator[StockTar]:
    """List tars in parallel and group their members, and yield them in the order given.

    Raises:
        UserError: A tar is missing or cannot be opened.
    """
    with progress_bar(len(locations), "tars", "listing") as progress:
        task = partial(_list_task, layout)
        listings = dict(run_tasks(task, {location: location for location in locations}, jobs, progress))
    for location in locations:
        yield group(location, listings.pop(location), layout)


def _list_task(layout: Layout, location: str, progress: Progress) -> TarListing:
    listing = list_tar(location, layout.is_text)
    progress(1)
    return listing


def group(location: str, listing: TarListing, layout: Layout) -> StockTar:
    """Group the members of a tar to samples by `webdataset.tariterators.group_by_keys`."""
    from webdataset.tariterators import base_plus_ext, group_by_keys

    problems: list[tuple[str, str]] = []

    def note(error: Exception) -> bool:
        reason = str(error.args[0]) if error.args else repr(error)
        problems.append((str(base_plus_ext(reason.split(": ")[0])[0] or ""), reason.split(" dict_keys")[0]))
        return True

    known = [number for number, member in enumerate(listing.members) if layout.is_known(member.name)]
    files = ({"fname": listing.members[n].name, "data": n, "__url__": location} for n in known)
    samples, seen = [], set()
    for members in group_by_keys(files, handler=note):
        key = members.pop("__key__")
        del members["__url__"]
        if key in seen:
            problems.append((key, "its members are not next to each other: pack them in order, e.g. tar --sort=name"))
            continue
        seen.add(key)
        samples.append(_sample(key, members, listing, layout))
    if listing.problem:
        problems.append(("", listing.problem))
    ignored = {_ending(member.name) for member in listing.members if not layout.is_known(member.name)}
    return StockTar(location, samples, problems, ignored)


def _sample(key: str, members: dict[str, int], listing: TarListing, layout: Layout) -> StockSample:
    sample = StockSample(key)
    pictures = _chosen(members, layout.image)
    sample.pictures = [listing.members[number] for number in pictures.values()]
    sample.audio = {part: listing.members[number] for part, number in _chosen(members, layout.audio).items()}
    for endings, contents, by_part in (
        (layout.text, sample.texts, sample.text_members),
        (layout.json, sample.json, sample.json_members),
    ):
        for part, number in _chosen(members, endings).items():
            contents[part], by_part[part] = listing.texts.get(number), listing.members[number]
    return sample


def _chosen(members: dict[str, int], endings: Sequence[str]) -> dict[str, int]:
    """Return the members with one of the endings by what precedes it, in natural order."""
    chosen: dict[str, tuple[int, int]] = {}
    for suffix, number in members.items():
        if match := _match(suffix, endings):
            part, rank = match
            chosen[part] = min(chosen.get(part, (rank, number)), (rank, number))
    return {part: chosen[part][1] for part in sorted(chosen, key=natural_order)}


def _match(suffix: str, endings: Sequence[str]) -> tuple[str, int] | None:
    """Return what precedes an ending in a suffix, and the rank of the ending; None if none matches."""
    for rank, ending in enumerate(endings):
        if suffix == ending:
            return "", rank
        if suffix.endswith(f".{ending}"):
            return suffix[: -len(ending) - 1], rank
    return None


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()[:20] or "no ending"


def describe_ignored(tars: Sequence[StockTar]) -> str:
    """Return the endings of members that were not used, for a message; "" if there are none."""
    endings = sorted(set().union(*(tar.ignored for tar in tars)))
    more = f" and {len(endings) - _MAX_NAMED} more" if len(endings) > _MAX_NAMED else ""
    return ", ".join(map(repr, endings[:_MAX_NAMED])) + more


def parse_object(data: bytes | None) -> dict[str, Any]:
    """Parse the JSON of a sample.

    Raises:
        BadRecord: It is not an object.
        ValueError: It is longer than 1 MiB, not UTF-8, or not JSON.
    """
    if data is None:
        raise ValueError("longer than 1 MiB")
    try:
        return as_object(parse_json(data.decode("utf-8-sig")))
    except RecursionError:
        raise ValueError("nested too deeply") from None
