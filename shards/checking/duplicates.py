"""Duplicates in a folder of shards: ids, and pictures and audio files with the same bytes.

The same picture or audio file in two splits is a leak, and a problem. Within a split it may be intended, and is a
warning: recall counts each as a separate query. A caption takes 32 bytes, so that millions fit into memory.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shards.checking.finding import Finding, shortened
from shards.manifest import Manifest
from shards.reading.reader import MAX_META

DIGEST = 16  # bytes of the digest of a picture, an audio file or an utterance id
_EFFECT = "each counts as a separate query"


def digest(data: bytes) -> bytes:
    """Return the first `DIGEST` bytes of the SHA-256."""
    return hashlib.sha256(data).digest()[:DIGEST]


class Digests:
    """Digests of the contents of a shard, zero for what cannot be read; captions are numbered consecutively."""

    def __init__(self, samples: int, captions: int) -> None:
        self.pictures = bytearray(DIGEST * samples)
        self.audio_files = bytearray(DIGEST * captions)
        self.utterances = bytearray(DIGEST * captions)

    @staticmethod
    def put(column: bytearray, number: int, data: bytes) -> None:
        """Store the digest of `data` for a sample or caption."""
        column[DIGEST * number : DIGEST * (number + 1)] = digest(data)


@dataclass(frozen=True, eq=False)
class DigestColumns:
    """The digests of all shards of a folder, as byte strings: pictures [S], audio files [C], utterance ids [C]."""

    pictures: np.ndarray
    audio_files: np.ndarray
    utterances: np.ndarray


def gather_digests(shards: Iterable[Digests]) -> DigestColumns:
    """Concatenate the digests of all shards, in order."""
    digests = list(shards)
    names = ("pictures", "audio_files", "utterances")
    joined = (b"".join(getattr(one, name) for one in digests) for name in names)
    return DigestColumns(*(np.frombuffer(data, dtype=f"S{DIGEST}") for data in joined))


def find_duplicates(m: Manifest, columns: DigestColumns) -> tuple[list[Finding], list[Finding]]:
    """Find duplicate ids, pictures and audio files.

    Returns:
        Problems and warnings; a few of each kind are named, the rest counted.
    """
    problems: list[Finding] = []
    for what, column in (("image id", m.image_id), ("key", m.key)):
        pairs = _equal_pairs(column)
        problems += shortened((_same_id(m, what, column, *pair) for pair in pairs.tolist()), len(pairs))
    shared, repeated = _by_split(m, _equal_pairs(columns.pictures), np.arange(len(m.key)))
    problems += shortened((_same_picture(m, *pair) for pair in shared.tolist()), len(shared))
    warnings = list(shortened((_same_picture(m, *pair) for pair in repeated.tolist()), len(repeated)))

    sample_of = np.repeat(np.arange(len(m.key)), np.diff(m.first_caption))
    pairs = _equal_pairs(columns.audio_files)
    for findings, of_kind in zip((problems, warnings), _by_split(m, pairs, sample_of), strict=True):
        findings += shortened((_same_audio(m, columns, sample_of, *pair) for pair in of_kind.tolist()), len(of_kind))
    pairs = _equal_pairs(columns.utterances)
    # Equal audio files with the same id are already reported.
    pairs = pairs[columns.audio_files[pairs[:, 0]] != columns.audio_files[pairs[:, 1]]]
    warnings += shortened((_same_utterance(m, sample_of, *pair) for pair in pairs.tolist()), len(pairs))
    return problems, warnings


def _equal_pairs(column: np.ndarray) -> np.ndarray:
    """Return consecutive rows with the same value, int [pairs, 2]; empty values are ignored."""
    order = np.argsort(column, kind="stable")
    same = (column[order[1:]] == column[order[:-1]]) & (column[order[1:]] != b"")
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def _by_split(m: Manifest, pairs: np.ndarray, sample_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs [pairs, 2] across splits, and those within a split."""
    split = m.split[sample_of[pairs]]
    apart = split[:, 0] != split[:, 1]
    return pairs[apart], pairs[~apart]


def _same_id(m: Manifest, what: str, column: np.ndarray, one: int, other: int) -> Finding:
    return Finding(_splits(m, one, other), f"{what} {text(column[one])} occurs twice, {_shards(m, one, other)}")


def _same_picture(m: Manifest, one: int, other: int) -> Finding:
    line = f"{text(m.image_id[one])} and {text(m.image_id[other])} are the same picture, {_shards(m, one, other)}"
    return Finding(_splits(m, one, other), line)


def _same_audio(m: Manifest, columns: DigestColumns, sample_of: np.ndarray, one: int, other: int) -> Finding:
    samples = int(sample_of[one]), int(sample_of[other])
    splits = _splits(m, *samples)
    line = f"{_captions(m, sample_of, one, other)} are the same audio file"
    if columns.utterances[one] == columns.utterances[other] != b"":
        line += f", of utterance {_utterance(m, sample_of, one)}"
    leak = m.split[samples[0]] != m.split[samples[1]]
    return Finding(splits, f"{line}, {_shards(m, *samples)}" + ("" if leak else f": {_EFFECT}"))


def _same_utterance(m: Manifest, sample_of: np.ndarray, one: int, other: int) -> Finding:
    samples = int(sample_of[one]), int(sample_of[other])
    line = f"{_captions(m, sample_of, one, other)} are two audio files of utterance {_utterance(m, sample_of, one)}"
    return Finding(_splits(m, *samples), f"{line}, {_shards(m, *samples)}: an id must identify one audio file")


def _captions(m: Manifest, sample_of: np.ndarray, one: int, other: int) -> str:
    """Describe two captions by their pictures and their numbers there."""
    (first, second), samples = (one, other), (int(sample_of[one]), int(sample_of[other]))
    numbers = [row - int(m.first_caption[sample]) for row, sample in zip((first, second), samples, strict=True)]
    if samples[0] == samples[1]:
        return f"captions {numbers[0]} and {numbers[1]} of {text(m.image_id[samples[0]])}"
    named = (f"caption {n} of {text(m.image_id[s])}" for n, s in zip(numbers, samples, strict=True))
    return " and ".join(named)


def _utterance(m: Manifest, sample_of: np.ndarray, row: int) -> str:
    """Return the utterance id of a caption, read from its shard."""
    sample = int(sample_of[row])
    try:
        with open(m.folder / m.shards[m.shard[sample]].name, "rb") as file:
            file.seek(int(m.meta_offset[sample]))
            captions = json.loads(file.read(min(int(m.meta_bytes[sample]), MAX_META)))["captions"]
        return str(captions[row - int(m.first_caption[sample])]["utterance"])
    except (OSError, ValueError, LookupError, TypeError):
        return "(now unreadable)"


def _splits(m: Manifest, one: int, other: int) -> str:
    return " and ".join(dict.fromkeys(m.splits[m.split[row]] for row in (one, other)))


def _shards(m: Manifest, one: int, other: int) -> str:
    names = dict.fromkeys(m.shards[m.shard[row]].name for row in (one, other))
    return f"in {' and '.join(names)}"


def text(stored: bytes) -> str:
    """Decode a byte string of the index; invalid UTF-8 is escaped."""
    return stored.decode("utf-8", "backslashreplace")
