"""Source files of shards: recorded as they are read, stored with a checksum, compared by content if times differ."""

import os
from pathlib import Path

import numpy as np
import pytest

from shards.corpora.item import Caption, Item
from shards.corpora.text_files import ListFile, note_list, noted_lists
from shards.errors import UserError
from shards.writing import sources as module
from shards.writing.sources import (
    SOURCES,
    Differences,
    Sources,
    by_split,
    compare,
    compare_files,
    compare_lists,
    crc32,
    files_of,
    load_sources,
    save_sources,
    sources_problem,
    stamp,
)


def columns(paths: list[Path]) -> list[np.ndarray]:
    return list(np.array([(*stamp(path), crc32(path)) for path in paths], np.int64).reshape(-1, 3).T)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    every = [tmp_path / f"{n}.wav" for n in range(5)]
    for n, path in enumerate(every):
        path.write_bytes(bytes([n]) * 10)
    return every


def test_lists_are_noted_as_they_are_read(tmp_path: Path) -> None:
    note_list(tmp_path / "before", b"")
    with noted_lists() as noted:
        note_list(tmp_path / "a", b"one")
        note_list(tmp_path / "b", b"")
    note_list(tmp_path / "after", b"")
    assert [(one.path, one.bytes) for one in noted] == [(str(tmp_path / "a"), 3), (str(tmp_path / "b"), 0)]
    assert noted[0].sha256.startswith("7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")


def test_lists_are_compared_by_name_and_content_wherever_they_are() -> None:
    then = [ListFile("/a/t.json", 1, "x"), ListFile("/b/t.json", 1, "y"), ListFile("/a/u.json", 1, "z")]
    now = [ListFile("/c/t.json", 1, "x"), ListFile("/d/t.json", 1, "other"), ListFile("/c/v.json", 1, "z")]
    lines = ["/d/t.json was edited", "/c/v.json is read now and was not before"]
    assert compare_lists(then, now, complete=False) == lines
    assert compare_lists(then, now) == [*lines, "/a/u.json was read before and is not now"]
    assert compare_lists(then, then) == []


def test_files_nobody_touched_are_not_read(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    then = columns(paths)
    monkeypatch.setattr(module, "crc32", lambda path: pytest.fail(f"{path} was read"))
    assert compare_files(paths, *then) == Differences()


def test_touched_files_are_compared_by_content(paths: list[Path]) -> None:
    then = columns(paths)
    for path in paths:
        os.utime(path, ns=(1, 1))
    assert compare_files(paths, *then) == Differences()
    paths[3].write_bytes(bytes(10))
    assert compare_files(paths, *then) == Differences([f"{paths[3]} has other content"])
    paths[4].write_bytes(b"")
    assert compare_files(paths, *then) == Differences([f"{paths[4]} has another size"])


def test_files_that_come_or_go(paths: list[Path]) -> None:
    paths[0].unlink()
    then = columns(paths)
    assert compare_files(paths, *then) == Differences()
    paths[0].write_bytes(b"here")
    paths[1].unlink()
    paths[2].unlink()
    assert compare_files([*paths, paths[1]], *np.hstack([then, [[10], [7], [7]]])) == Differences(
        [f"{paths[0]} exists now"], missing=2, missing_example=str(paths[1])
    )
    paths[3].unlink()
    paths[3].mkdir()
    os.mkfifo(paths[1])
    assert len(compare_files(paths, *then).changed) >= 2


def test_all_that_changed_is_counted_and_a_file_of_several_samples_is_one(paths: list[Path]) -> None:
    then = columns(paths * 2)
    for path in paths:
        path.write_bytes(b"x")
    differences = compare_files(paths * 2, *then)
    assert str(differences).endswith("2.wav has another size; 2 more files changed")
    assert str(differences).count("another size") == 3


def items_of(paths: list[Path]) -> list[Item]:
    splits = ("extra", "dev", "train", "train", "dev")
    return [
        Item(path.stem, split, path, (Caption(path.stem, path), Caption("drawn", lambda: (np.zeros((1, 9)), 1))))
        for path, split in zip(paths, splits, strict=True)
    ]


def test_files_are_in_the_order_of_the_shards(paths: list[Path]) -> None:
    splits = by_split(items_of(paths))
    assert list(splits) == ["train", "dev", "extra"]
    order = [path.stem for some in splits.values() for path in files_of(some)]
    assert order == ["2", "2", "3", "3", "1", "1", "4", "4", "0", "0"]


def recorded(paths: list[Path]) -> Sources:
    order = [paths[n] for n in (2, 2, 3, 3, 1, 1, 4, 4, 0, 0)]
    return Sources(5, 10, (ListFile("t.csv", 1, "x"),), *columns(order))


def test_a_corpus_is_compared_with_what_was_recorded(paths: list[Path]) -> None:
    then, lists = recorded(paths), [ListFile("/moved/t.csv", 1, "x")]
    assert compare(then, lists, items_of(paths)) == Differences()
    assert compare(then, [], items_of(paths)).changed == ["t.csv was read before and is not now"]
    assert compare(then, lists, items_of(paths)[1:2]).changed == ["4 pictures fewer", "8 captions fewer"]
    other = [Item(one.image_id, one.split, one.picture, (one.captions[1],) * 2) for one in items_of(paths)]
    assert compare(then, lists, other).changed == ["it names 5 files rather than 10"]
    paths[1].write_bytes(b"x")
    assert compare(then, lists, items_of(paths)).changed == [f"{paths[1]} has another size"]


def test_saved_sources_are_loaded(paths: list[Path], tmp_path: Path) -> None:
    assert load_sources(tmp_path) is None
    save_sources(tmp_path, then := recorded(paths))
    assert sources_problem(tmp_path) is None
    loaded = load_sources(tmp_path)
    assert loaded is not None
    assert (loaded.pictures, loaded.captions, loaded.lists) == (5, 10, then.lists)
    for name in ("bytes", "time", "crc32"):
        assert getattr(loaded, name).tolist() == getattr(then, name).tolist()


def test_every_bit_that_is_turned_and_every_cut_is_noticed(tmp_path: Path) -> None:
    save_sources(tmp_path, Sources(1, 1, (ListFile("t", 1, "x"),), *np.zeros((3, 1), np.int64)))
    path = tmp_path / SOURCES
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert sources_problem(tmp_path), place
        path.write_bytes(data[:place])
        assert sources_problem(tmp_path), place
    with pytest.raises(UserError, match=r"sources\.json is damaged: its checksum differs"):
        load_sources(tmp_path)
