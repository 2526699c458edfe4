"""Source files that change between runs, and folders of earlier versions."""

import json
import os

import pytest

from shards.corpora.text_files import ListFile
from shards.errors import UserError
from shards.writing.folder_lock import UNFINISHED, Part, claim_folder
from shards.writing.writer import Format, merge_shards, plan_shards, write_shards
from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import (
    CHANGES,
    ITEMS,
    contents,
    identities,
    shard_corpus,
    stop,
    undisturbed,
    write,
    write_one_part,
)  # fmt: skip


@pytest.mark.parametrize(("change", "line"), CHANGES)
@pytest.mark.parametrize("name", ["0.png", "1.wav"])
def test_a_file_that_changes_after_it_was_read_is_noticed_at_the_end(tmp_path, name, change, line):
    items, out = shard_corpus(tmp_path / "corpus"), tmp_path / "out"
    done = []

    def progress(count):
        done.append(count)
        if len(done) == 4:  # the first shard is written, the second nearly
            change(tmp_path / "corpus" / name)

    with pytest.raises(
        UserError, match=rf"{name} {line} since train-000000\.tar was written: run the same command again"
    ):
        write_shards(items, out, "tiny", Format(2), {"corpus": "tiny"}, progress=progress)
    assert write(items, out, samples_per_shard=2).kept == 3
    assert contents(out) == undisturbed(tmp_path, items, samples_per_shard=2)


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_merge_refuses_parts_made_from_files_that_changed_since(tmp_path, change, line):
    items = shard_corpus(tmp_path / "corpus")
    for number in (1, 2):
        write_one_part(items, tmp_path / "out", number, 2)
    change(tmp_path / "corpus/1.wav")
    shard = r"since train-000001\.tar was written"
    with pytest.raises(UserError, match=rf"corpus/1\.wav {line} {shard}: run --part 2/2 again$"):
        merge_shards(tmp_path / "out")
    assert write_one_part(items, tmp_path / "out", 2, 2) == (1, 3)
    merge_shards(tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed(tmp_path, items, samples_per_shard=1)


def test_merge_takes_files_that_were_touched_and_names_how_many_are_missing(tmp_path):
    items = shard_corpus(tmp_path / "corpus")
    for number in (1, 2):
        write_one_part(items, tmp_path / "out", number, 2)
    os.utime(tmp_path / "corpus/1.wav", ns=(1, 1))
    (tmp_path / "corpus/2.wav").unlink()
    (tmp_path / "corpus/2.png").unlink()
    report = merge_shards(tmp_path / "out")
    assert report.missing_sources == 2
    assert "\n2 source files are missing now: whether these changed is unknown\n" in report.text()


def test_parts_that_read_other_lists_are_refused_while_one_is_running(tmp_path):
    plans = [
        plan_shards(items, "tiny", Format(), {}, 2, lists=[ListFile("t.csv", 1, sha)]).plan
        for items, sha in ((ITEMS, "a"), (ITEMS[:3], "b"))
    ]
    line = r"the corpus changed since it started \(t\.csv was edited\): wait for it"
    with (
        claim_folder(tmp_path, Part(1, 2), plans[0]),
        pytest.raises(UserError, match=line),
        claim_folder(tmp_path, Part(2, 2), plans[1]),
    ):
        pass


def forget(notes):
    """Make plan and records those of a version that did not note what shards are made from."""
    for path in notes.glob("*.json"):
        stored = json.loads(path.read_bytes())
        for name in ("sources", "lists", "pictures", "captions", "dropped")[: 1 if "sha256" in stored else None]:
            stored.pop(name, None)
        path.write_text(json.dumps(stored))


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    forget(out / UNFINISHED)
    tiny.speech(tmp_path / "corpus/4.wav")
    assert write(items, out, samples_per_shard=2).kept == 2
    assert kept.items() <= identities(out).items()
    assert contents(out) == undisturbed(tmp_path, items, samples_per_shard=2)


def test_parts_of_an_earlier_version_are_merged_without_a_record_of_their_sources(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus"), tmp_path / "out"
    write_one_part(items, out, 1, 1)
    forget(out / UNFINISHED)
    merge_shards(out)
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    expected = contents(tmp_path / "undisturbed")
    del expected["sources.json"]
    assert contents(out) == expected
