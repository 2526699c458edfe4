"""Duplicates in a folder of shards are reported with shard and caption: leaks as problems, others as warnings."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import manifest
from shards.checking.check import CheckResult, check_folder
from shards.checking.duplicates import DIGEST, DigestColumns, find_duplicates
from shards.corpora.item import Item
from shards.manifest import Manifest, ShardInfo
from tests.shards.checking import damage


def check(folder: Path, *more: Item) -> CheckResult:
    return check_folder(damage.write(folder / "shards", [*damage.corpus(), *more]), 0)


def lines(findings: Sequence[object]) -> list[str]:
    return [str(one) for one in findings]


def same_picture(name: str, split: str, seed: int) -> Item:
    """A picture that is there already, with other audio files."""
    return replace(damage.item(name, split, seed=50 + ord(name[0])), picture=partial(damage.drawn, seed))


def same_recording(name: str, split: str, row: int, utterance: str = "new") -> Item:
    """A picture of its own, whose only recording is there already."""
    item = damage.item(name, split, seed=50 + ord(name[0]))
    caption = replace(item.captions[0], audio=partial(damage.spoken, row), utterance=utterance)
    return replace(item, captions=(caption,))


def test_same_picture_in_two_splits(tmp_path: Path) -> None:
    result = check(tmp_path, same_picture("other", "test", 4))
    line = "train and test: t4 and other are the same picture, in train-000001.tar and test-000000.tar"
    assert (lines(result.problems), result.warnings) == ([line], [])


def test_same_picture_within_a_split_is_a_warning(tmp_path: Path) -> None:
    result = check(tmp_path, same_picture("other", "train", 0), same_picture("third", "train", 0))
    assert result.healthy
    reported = lines(result.warnings)
    assert len(reported) == 2
    assert reported[0].startswith("train: t0 and other are the same picture, in train-000000.tar and train-000002.tar")
    assert "other and third" in reported[1]


def test_id_and_key_in_two_splits(folder: Path) -> None:
    m = manifest.load(folder)
    for column in ("image_id", "key"):
        values = getattr(m, column).copy()
        values[10] = b"t4"
        damage.resave(folder, **{column: values})
    reported = lines(check_folder(folder, 0).problems)
    where = "in train-000001.tar and test-000000.tar"
    assert f"train and test: image id t4 occurs twice, {where}" in reported
    assert f"train and test: key t4 occurs twice, {where}" in reported


# The audio files of t4 are those of rows 28 and 29, and the utterances t4-0 and t4-1.


@pytest.mark.parametrize(("split", "shard"), [("dev", "dev-000000.tar"), ("test", "test-000000.tar")])
@pytest.mark.parametrize(("utterance", "named"), [("new", ""), ("t4-1", ", of utterance t4-1")])
def test_same_recording_in_two_splits(tmp_path: Path, split: str, shard: str, utterance: str, named: str) -> None:
    result = check(tmp_path, same_recording("other", split, 29, utterance))
    what = f"caption 1 of t4 and caption 0 of other are the same audio file{named}"
    assert lines(result.problems) == [f"train and {split}: {what}, in train-000001.tar and {shard}"]
    assert result.warnings == []


@pytest.mark.parametrize("codec", ["flac", "wav", "opus"])
def test_same_recording_is_seen_in_any_codec(tmp_path: Path, codec: str) -> None:
    items = [*damage.corpus(), same_recording("other", "test", 29)]
    result = check_folder(damage.write(tmp_path / "shards", items, codec=codec), 0)
    (line,) = lines(result.problems)
    assert line.startswith("train and test: caption 1 of t4 and caption 0 of other are the same audio file")


def test_same_recording_within_a_split_is_a_warning(tmp_path: Path) -> None:
    result = check(tmp_path, same_recording("other", "train", 28))
    assert result.healthy
    line = "train: caption 0 of t4 and caption 0 of other are the same audio file, in train-000001.tar and "
    assert lines(result.warnings) == [f"{line}train-000002.tar: each counts as a separate query"]


def test_row_that_comes_twice_is_a_warning(tmp_path: Path) -> None:
    item = damage.item("other", "dev", seed=50)
    result = check(tmp_path, replace(item, captions=(*item.captions, item.captions[0])))
    assert result.healthy
    line = "dev: captions 0 and 2 of other are the same audio file, of utterance other-0, in dev-000000.tar"
    assert lines(result.warnings) == [f"{line}: each counts as a separate query"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_two_recordings_of_one_utterance_are_a_warning(tmp_path: Path, split: str) -> None:
    item = damage.item("other", split, seed=50)
    captions = (replace(item.captions[0], utterance="t4-1\n"), replace(item.captions[1], utterance="t4-1"))
    result = check(tmp_path, replace(item, captions=captions))
    assert result.healthy
    (line,) = lines(result.warnings)
    assert "caption 1 of t4 and caption 1 of other are two audio files of utterance t4-1, in train-000001.tar" in line
    assert line.endswith(": an id must identify one audio file")


def many(samples: int) -> tuple[Manifest, DigestColumns]:
    """A folder of pictures with five captions each, half in train and half in test, and all of it twice."""
    number = np.arange(samples)
    rows = np.arange(5 * samples)
    chance = np.random.default_rng(1)
    half = chance.bytes(DIGEST * samples // 2), chance.bytes(DIGEST * 5 * samples // 2)
    columns = DigestColumns(*(np.frombuffer(2 * half[one], f"S{DIGEST}") for one in (0, 1, 1)))
    split = (number >= samples // 2).astype(np.int8)
    shards = tuple(ShardInfo(f"{name}.tar", 2**40, "ab" * 32, samples // 2) for name in ("a", "b"))
    index: dict[str, Any] = {name: rows if name in manifest.CAPTION_COLUMNS else number for name in manifest.COLUMNS}
    index |= {"key": np.char.mod(b"%d", number), "image_id": np.char.mod(b"%d", number), "split": split}
    index |= {"shard": split, "first_caption": 5 * np.append(number, samples)}
    made = Manifest(Path("/nowhere"), "", "", shards, ("train", "test"), **index)
    return made, columns


def test_memory_is_bounded_however_much_comes_twice() -> None:
    made, columns = many(120_000)
    tracemalloc.start()
    problems, warnings = find_duplicates(made, columns)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6
    assert [str(one) for one in problems if "more like" in str(one)] == [
        "all splits: and 59,992 more like these",
        "all splits: and 299,992 more like these",
    ]
    assert (len(problems), warnings) == (18, [])
