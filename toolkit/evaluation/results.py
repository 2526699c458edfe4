"""Results of evaluations in a folder: a JSON file each, and beside it the rank of every query in an `.npz`.

A file is named by data set, split, checksum of the shards, checkpoint and protocol, so that evaluations that differ in
any of these stand beside one another, and the same evaluation repeated replaces its own file. Each file is written
atomically, the JSON last: an evaluation that is killed leaves all earlier results as they were.

This module imports neither torch nor a model: tables, reports and comparisons read results anywhere.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from shards.errors import UserError
from shards.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

FOLDER = "results"  # in a run folder
DIRECTIONS = ("speech_to_image", "image_to_speech")
STAGES = ("coarse", "reranked")
_MAX_NAME = 60  # characters of a name in a file name


@dataclass(frozen=True)
class Ranks:
    """Ranks of the best correct candidate of Q queries, in one direction.

    The rank of query q, from 1, is `ahead[q] + 1`, or with equal scores any of `ahead[q] + 1` to
    `ahead[q] + tied[q] + 1`; see `toolkit/evaluation/recall.py`.
    """

    query: "np.ndarray"  # str [Q]: of a caption IMAGE_ID#NUMBER, its number among the picture's captions from 0
    picture: "np.ndarray"  # str [Q], image id of the query's picture: queries of one picture are not independent
    ahead: "np.ndarray"  # int64 [Q], incorrect candidates with a higher score
    tied: "np.ndarray"  # int64 [Q], incorrect candidates with the same score
    correct: "np.ndarray"  # int64 [Q], correct candidates with the same score, itself included


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint on one split.

    Attributes:
        path: The JSON file; the ranks are in the `.npz` of the same stem.
        run: Run folder, or without a run the model's folder or hub id.
        corpus: Corpus of the shards.
        split: Evaluated split.
        manifest: SHA-256 that identifies the shards (`Manifest.hash`).
        checkpoint: Name of the exported model, such as best or last.
        step: Its training step; None if it is not known.
        protocol: Settings that influence the figures: {"rerank" (candidates per query, 0: none), "fuse" (None without
            re-ranking), "max_seconds", "image_size", "resize"}.
        time: Unix time of the evaluation.
        report: All contents of the JSON: the report of `toolkit.evaluation.retrieve.retrieve` ("coarse", "reranked",
            "twins", ...), the attributes above, and where they were computed "intervals" and "measures", which have the
            shape of "coarse" under the names of the stages, and "groups".
    """

    path: Path
    run: str
    corpus: str
    split: str
    manifest: str
    checkpoint: str
    step: int | None
    protocol: dict[str, Any]
    time: float
    report: dict[str, Any]

    @property
    def stages(self) -> list[str]:
        """The measured stages: coarse, and reranked if there was re-ranking."""
        return [stage for stage in STAGES if self.report.get(stage)]

    @property
    def is_baseline(self) -> bool:
        """Whether this is a baseline, stored beside the results of a model; see `toolkit.evaluation.text_baselines`."""
        return bool(self.report.get("baseline"))

    def ranks(self, direction: str, stage: str | None = None) -> Ranks:
        """Read the ranks of the queries.

        Args:
            direction: One of `DIRECTIONS`.
            stage: One of `stages`; default: the last.

        Raises:
            UserError: The file is missing, is damaged, or was written by another evaluation.
        """
        columns = _load_columns(self.path.with_suffix(".npz"), self.report["ranks_sha256"])
        try:
            return ranks_of(columns, direction, stage or self.stages[-1])
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"{self.path.with_suffix('.npz')} is damaged ({error}): repeat this evaluation") from None


def ranks_of(columns: "Mapping[str, np.ndarray]", direction: str, stage: str) -> Ranks:
    """Ranks of one direction and stage, from the columns that `save_result` describes."""
    import numpy as np

    ids = np.char.decode(columns["image_id"], "utf-8", "replace")
    if direction == "speech_to_image":
        picture = ids[columns["caption_picture"]]
        query = np.char.add(np.char.add(picture, "#"), columns["caption_number"].astype(str))
    else:
        query = picture = ids[columns["query_picture"]]
    counts = (columns[f"{stage}.{direction}.{name}"].astype(np.int64) for name in ("ahead", "tied", "right"))
    return Ranks(query, picture, *counts)


def save_result(folder: Path, report: Mapping[str, Any], columns: Mapping[str, "np.ndarray"]) -> Result:
    """Write the result of an evaluation; the same evaluation's earlier result is replaced.

    Groups of the earlier result are kept if its ranks are the same.

    Args:
        folder: Created if it does not exist; of a run, RUN/results.
        report: Contents of the JSON; see `Result`.
        columns: Contents of the `.npz`: byte strings "image_id" [P]; int32 "caption_picture" [C] and "caption_number"
            [C], the position of each caption's picture and its number there; int32 "query_picture" [Q]; and int32
            STAGE.DIRECTION.ahead, .tied and .right, [C] or [Q].

    Raises:
        UserError: The folder cannot be written.
    """
    import numpy as np

    stream = io.BytesIO()
    arrays: dict[str, Any] = dict(columns)
    np.savez(stream, **arrays)
    path = folder / f"{result_name(report)}.json"
    sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
    groups = {**_earlier_groups(path, sha256), **(report.get("groups") or {})} or None
    complete = {**report, "groups": groups, "ranks_sha256": sha256}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path.with_suffix(".npz")) as file:
            file.write(stream.getvalue())
        with atomic_write(path) as file:
            file.write(json.dumps(complete, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return _result(path, complete)


def _earlier_groups(path: Path, sha256: str) -> dict[str, Any]:
    """Groups of the result that will be replaced, which remain true if the ranks are the same."""
    try:
        earlier = json.loads(path.read_bytes())
        return dict(earlier["groups"]) if earlier["ranks_sha256"] == sha256 else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def result_name(report: Mapping[str, Any]) -> str:
    """Name of a result's files without their suffix, from what distinguishes it from other results."""
    protocol = report["protocol"]
    step = "" if report["step"] is None else f"step-{report['step']}"
    reranking = f"rerank-{protocol['rerank']}-{protocol['fuse']}" if protocol["rerank"] else "coarse"
    image = f"{protocol['image_size']}-{protocol['resize']}"
    names = [_file_name(report[key]) for key in ("corpus", "split", "checkpoint")]
    parts = [*names[:2], report["manifest"][:8], names[2], step, reranking, f"{protocol['max_seconds']}s", image]
    return "-".join(part for part in parts if part)


def _file_name(name: str) -> str:
    """Escape a name for a file system; the end of a long one is replaced by a checksum."""
    escaped = quote(name, safe="")
    return escaped if len(escaped) <= _MAX_NAME else escaped[:_MAX_NAME] + hashlib.sha256(name.encode()).hexdigest()[:8]


def load_results(run: Path) -> list[Result]:
    """Load the results of a run, oldest first; empty if it was not evaluated.

    Args:
        run: A run folder, a folder of results, or the JSON file of one.

    Raises:
        UserError: The folder does not exist, or a file in it is not a result.
    """
    if run.is_file():
        return [_load_result(run, "name a JSON file of RUN/results")]
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run folder or a folder of results")
    pairs = [path for path in run.glob("*.npz") if path.with_suffix(".json").is_file()]
    folder = run if pairs and not (run / FOLDER).is_dir() else run / FOLDER
    return sorted(map(_load_result, folder.glob("*.json")), key=lambda result: (result.time, result.path.name))


def _load_result(path: Path, fix: str = "move it elsewhere") -> Result:
    try:
        return _result(path, json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the result of an evaluation ({error!r}): {fix}") from None


def _result(path: Path, report: dict[str, Any]) -> Result:
    names = ("run", "corpus", "split", "manifest", "checkpoint", "step", "protocol", "time")
    values = {name: report[name] for name in names}
    report["coarse"]["mean_R@1"], report["ranks_sha256"], dict(values["protocol"])  # raises if it is another file
    return Result(path, **values, report=report)


def _load_columns(path: Path, sha256: str) -> "dict[str, np.ndarray]":
    import numpy as np

    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path} does not belong to {path.stem}.json: repeat this evaluation")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            if any(member.compress_type != zipfile.ZIP_STORED for member in stored.zip.infolist()):
                raise ValueError("a column is compressed")  # it could fill the memory
            return {name: stored[name] for name in stored.files}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; repeat this evaluation") from None
    except (ValueError, TypeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): repeat this evaluation") from None


def format_results(results: Iterable[Result]) -> str:
    """Format results as a table, a line for each stage; R@1 with its interval where there is one."""
    header = ("run", "data", "checkpoint", "protocol", *(f"{d} R@{k}" for d in ("S>I", "I>S") for k in (1, 5, 10)))
    rows = [(*header, "mean R@1", "95 %")]
    for result in results:
        step = "" if result.step is None else f" @ {result.step:,}"
        data = f"{result.corpus} {result.split} {result.manifest[:8]}"
        for stage in result.stages:
            recall = result.report[stage]
            figures = [f"{value:.1f}" for direction in DIRECTIONS for value in recall[direction].values()]
            interval = result.report.get("intervals", {}).get(stage, {}).get("mean_R@1")
            bounds = f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else ""
            checkpoint = f"baseline {result.checkpoint}" if result.is_baseline else f"{result.checkpoint}{step}"
            name = (result.run, data, checkpoint, describe_protocol(result.protocol, stage))
            rows.append((*name, *figures, f"{recall['mean_R@1']:.1f}", bounds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join([*names, *numbers]).rstrip())
    return "\n".join(lines)


def describe_protocol(protocol: Mapping[str, Any], stage: str) -> str:
    """Describe a protocol in a few words: ranking, longest audio, image."""
    ranking = f"best {protocol['rerank']} by {protocol['fuse']}" if stage == "reranked" else "coarse"
    return f"{ranking}, {protocol['max_seconds']:g} s, {protocol['image_size']} px {protocol['resize']}"
