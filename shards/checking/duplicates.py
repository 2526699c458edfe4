"""What comes twice in a folder of shards: ids, pictures and recordings, the latter two by their bytes.

The same picture or recording in two splits is a leak, and a problem. Within a split it may be meant, and is a warning:
each counts as a query of its own in recall. Of a caption 32 bytes are kept, so that millions fit into memory.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shards.checking.finding import Finding, shortened
from shards.manifest import Manifest
from shards.reading.reader import MAX_META

DIGEST = 16  # bytes that stand for a picture, a recording or an utterance id
_AGAIN = "each counts as a query of its own"


def digest(data: bytes) -> bytes:
    """Bytes that stand for others."""
    return hashlib.sha256(data).digest()[:DIGEST]


class Digests:
    """Digests of what a shard holds, zeros where nothing could be read; captions are numbered through the shard."""

    def __init__(self, samples: int, captions: int) -> None:
        self.pictures = bytearray(DIGEST * samples)
        self.recordings = bytearray(DIGEST * captions)
        self.utterances = bytearray(DIGEST * captions)

    @staticmethod
    def put(column: bytearray, number: int, data: bytes) -> None:
        """Note the digest of `data` as that of a sample or a caption."""
        column[DIGEST * number : DIGEST * (number + 1)] = digest(data)


@dataclass(frozen=True, eq=False)
class Columns:
    """The digests of a whole folder, as byte strings: pictures [S], recordings [C] and utterance ids [C]."""

    pictures: np.ndarray
    recordings: np.ndarray
    utterances: np.ndarray


def gather_digests(shards: Iterable[Digests]) -> Columns:
    """Join the digests of all shards, in their order."""
    every = list(shards)
    names = ("pictures", "recordings", "utterances")
    joined = (b"".join(getattr(one, name) for one in every) for name in names)
    return Columns(*(np.frombuffer(data, dtype=f"S{DIGEST}") for data in joined))


def find_duplicates(m: Manifest, columns: Columns) -> tuple[list[Finding], list[Finding]]:
    """Look for what comes twice.

    Returns:
        Problems and warnings; of each kind a few are named, the rest counted.
    """
    problems: list[Finding] = []
    for what, column in (("image id", m.image_id), ("key", m.key)):
        pairs = _equal_pairs(column)
        problems += shortened((_same_id(m, what, column, *pair) for pair in pairs.tolist()), len(pairs))
    shared, repeated = _by_split(m, _equal_pairs(columns.pictures), np.arange(len(m.key)))
    problems += shortened((_same_picture(m, *pair) for pair in shared.tolist()), len(shared))
    warnings = list(shortened((_same_picture(m, *pair) for pair in repeated.tolist()), len(repeated)))

    sample_of = np.repeat(np.arange(len(m.key)), np.diff(m.first_caption))
    pairs = _equal_pairs(columns.recordings)
    for into, some in zip((problems, warnings), _by_split(m, pairs, sample_of), strict=True):
        into += shortened((_same_recording(m, columns, sample_of, *pair) for pair in some.tolist()), len(some))
    pairs = _equal_pairs(columns.utterances)
    # One recording under one id has been named already.
    pairs = pairs[columns.recordings[pairs[:, 0]] != columns.recordings[pairs[:, 1]]]
    warnings += shortened((_same_utterance(m, sample_of, *pair) for pair in pairs.tolist()), len(pairs))
    return problems, warnings


def _equal_pairs(column: np.ndarray) -> np.ndarray:
    """Neighbouring rows among those of each value, int [pairs, 2]; empty values are nobody's."""
    order = np.argsort(column, kind="stable")
    same = (column[order[1:]] == column[order[:-1]]) & (column[order[1:]] != b"")
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def _by_split(m: Manifest, pairs: np.ndarray, sample_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs [pairs, 2] that are in two splits, and those within one."""
    split = m.split[sample_of[pairs]]
    apart = split[:, 0] != split[:, 1]
    return pairs[apart], pairs[~apart]


def _same_id(m: Manifest, what: str, column: np.ndarray, one: int, other: int) -> Finding:
    return Finding(_splits(m, one, other), f"{what} {text(column[one])} comes twice, {_shards(m, one, other)}")


def _same_picture(m: Manifest, one: int, other: int) -> Finding:
    line = f"{text(m.image_id[one])} and {text(m.image_id[other])} are the same picture, {_shards(m, one, other)}"
    return Finding(_splits(m, one, other), line)


def _same_recording(m: Manifest, columns: Columns, sample_of: np.ndarray, one: int, other: int) -> Finding:
    samples = int(sample_of[one]), int(sample_of[other])
    splits = _splits(m, *samples)
    line = f"{_places(m, sample_of, one, other)} are the same recording"
    if columns.utterances[one] == columns.utterances[other] != b"":
        line += f", of utterance {_utterance(m, sample_of, one)}"
    leak = m.split[samples[0]] != m.split[samples[1]]
    return Finding(splits, f"{line}, {_shards(m, *samples)}" + ("" if leak else f": {_AGAIN}"))


def _same_utterance(m: Manifest, sample_of: np.ndarray, one: int, other: int) -> Finding:
    samples = int(sample_of[one]), int(sample_of[other])
    line = f"{_places(m, sample_of, one, other)} are two recordings of utterance {_utterance(m, sample_of, one)}"
    return Finding(_splits(m, *samples), f"{line}, {_shards(m, *samples)}: an id names one recording")


def _places(m: Manifest, sample_of: np.ndarray, one: int, other: int) -> str:
    """Where two captions are: pictures and numbers of the captions."""
    (first, second), samples = (one, other), (int(sample_of[one]), int(sample_of[other]))
    numbers = [row - int(m.first_caption[sample]) for row, sample in zip((first, second), samples, strict=True)]
    if samples[0] == samples[1]:
        return f"captions {numbers[0]} and {numbers[1]} of {text(m.image_id[samples[0]])}"
    named = (f"caption {n} of {text(m.image_id[s])}" for n, s in zip(numbers, samples, strict=True))
    return " and ".join(named)


def _utterance(m: Manifest, sample_of: np.ndarray, row: int) -> str:
    """The utterance id of a caption, read from its shard, where it was seen a moment ago."""
    sample = int(sample_of[row])
    try:
        with open(m.folder / m.shards[m.shard[sample]].name, "rb") as file:
            file.seek(int(m.meta_offset[sample]))
            captions = json.loads(file.read(min(int(m.meta_bytes[sample]), MAX_META)))["captions"]
        return str(captions[row - int(m.first_caption[sample])]["utterance"])
    except (OSError, ValueError, LookupError, TypeError):
        return "(which cannot be read any more)"


def _splits(m: Manifest, one: int, other: int) -> str:
    return " and ".join(dict.fromkeys(m.splits[m.split[row]] for row in (one, other)))


def _shards(m: Manifest, one: int, other: int) -> str:
    names = dict.fromkeys(m.shards[m.shard[row]].name for row in (one, other))
    return f"in {' and '.join(names)}"


def text(stored: bytes) -> str:
    """A byte string of the index; bytes that are not UTF-8 are shown as such."""
    return stored.decode("utf-8", "backslashreplace")
