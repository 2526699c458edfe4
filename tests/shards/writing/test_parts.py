"""Runs that share a folder: one writer at a time, parts, and their merge."""

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest

from shards import files, manifest
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.writing.folder_lock import UNFINISHED, Part, claim_folder, count_finished
from shards.writing.writer import Format, merge_shards, plan_shards
from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import ITEMS, contents, identities, killed_at, undisturbed, write, write_one_part


def test_one_writer_at_a_time(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(), {"corpus": "tiny"}).plan
    with claim_folder(tmp_path, plan=plan):
        with pytest.raises(UserError, match=rf"^another make_shards is writing to {tmp_path}: wait for it"):
            write(ITEMS, tmp_path)
        assert (tmp_path / UNFINISHED / "plan.json").exists()
    assert contents(tmp_path) == {}
    write(ITEMS, tmp_path)


# fsync of: the plan and its folder, a shard, its folder, its record, the report, the index
@pytest.mark.parametrize(("moment", "kept"), [(1, 0), (2, 0), (3, 0), (5, 0), (7, 1), (9, 1)])
def test_full_disk_leaves_finished_shards_or_nothing(tmp_path, monkeypatch, moment, kept):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(descriptor)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write(ITEMS[:1], tmp_path / "out")
    assert (tmp_path / "out").exists() == bool(kept)
    assert not list(tmp_path.glob("**/*.tmp"))
    assert write(ITEMS[:1], tmp_path / "out").kept == kept
    assert contents(tmp_path / "out") == undisturbed(tmp_path, ITEMS[:1])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_in_any_order_give_the_same_bytes(tmp_path, parts):
    out = tmp_path / "out"
    written = [write_one_part(ITEMS, out, number, parts) for number in range(parts, 0, -1)]
    assert sum(shards for shards, _ in written) == len(ITEMS)
    assert [kept for _, kept in written] == [0] * parts
    assert not (out / "manifest.json").exists()
    assert write_one_part(ITEMS, out, 1, parts) == (0, written[-1][0])
    before = identities(out)
    report = merge_shards(out)
    undisturbed = write(ITEMS, tmp_path / "undisturbed", samples_per_shard=1)
    assert report == undisturbed
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert identities(out) == before


def test_a_new_tar_never_goes_with_an_old_record(tmp_path):
    items = [Item("p", "train", tiny.photo(tmp_path / "p.png"), (Caption("u", tmp_path / "u.wav"),))]
    other = tiny.speech(tmp_path / "other.wav").read_bytes()  # as long, so that the tar has the same size
    moment, refused = 0, 0
    again = True
    while again:
        moment += 1
        tiny.speech(tmp_path / "u.wav")
        out = tmp_path / f"{moment}"
        write_one_part(items, out, 1, 1, codec="wav")
        (tmp_path / "u.wav").write_bytes(other)
        again = killed_at(moment, True, partial(write_one_part, items, out, 1, 1, codec="wav"))
        if not count_finished(out):
            refused += 1
            continue
        merge_shards(out)
        (shard,) = manifest.load(out).shards
        assert shard.sha256 == files.file_sha256(out / shard.name)
    assert refused >= 2


def test_another_number_of_parts_resumes(tmp_path):
    write_one_part(ITEMS, tmp_path / "out", 2, 3)
    assert write_one_part(ITEMS, tmp_path / "out", 2, 2) == (1, 1)
    assert write(ITEMS, tmp_path / "out", samples_per_shard=1).kept == 3
    assert contents(tmp_path / "out") == undisturbed(tmp_path, ITEMS, samples_per_shard=1)


def test_merge_names_missing_shards(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"out contains no parts to merge: write them with .* --part I/N"):
        merge_shards(out)
    assert not out.exists()
    write_one_part(ITEMS, out, 2, 3)
    line = r"^3 of 5 shards are missing.*: train-000000\.tar \(part 1/3\), train-000002\.tar \(part 3/3\), "
    with pytest.raises(UserError, match=line + r"dev-000000\.tar \(part 1/3\): run --part 1/3, 3/3 again$"):
        merge_shards(out)
    write_one_part(ITEMS, out, 1, 3)
    write_one_part(ITEMS, out, 3, 3)
    os.truncate(out / "train-000001.tar", 1024)
    with pytest.raises(UserError, match=r"1 of 5 .* train-000001\.tar \(part 2/3\): run --part 2/3 again"):
        merge_shards(out)
    assert not (out / "manifest.json").exists()
    assert write_one_part(ITEMS, out, 2, 3) == (1, 1)
    merge_shards(out)
    assert len(manifest.load(out).key) == 5
    with pytest.raises(UserError, match="contains no parts to merge"):
        merge_shards(out)


def test_merge_refuses_parts_of_a_corpus_that_changed_between_them(tmp_path):
    items = [*ITEMS[:3], replace(ITEMS[4], image_id="t-0")]
    write_one_part(ITEMS, tmp_path, 1, 2)
    write_one_part(items, tmp_path, 2, 2)  # train: t-2, t-1, t-0 rather than t-3; no extra
    with pytest.raises(UserError, match=r"1 of 4 shards .* train-000002\.tar \(part 1/2\): run --part 1/2 again"):
        merge_shards(tmp_path)
    assert write_one_part(items, tmp_path, 1, 2) == (1, 1)
    merge_shards(tmp_path)
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    (tmp_path / "undisturbed").rename(tmp_path.with_name("undisturbed"))
    assert contents(tmp_path) == contents(tmp_path.with_name("undisturbed"))


def test_parts_running_at_the_same_time(tmp_path):
    out = tmp_path / "out"
    items = [Item("late", "dev", tmp_path / "late.png", ITEMS[0].captions), *ITEMS]
    plan = plan_shards(items, "tiny", Format(samples_per_shard=1), {"corpus": "tiny"}, 2).plan
    with claim_folder(out, Part(1, 2), plan):
        temporary = out / "train-000000.tar.77.tmp"
        temporary.touch()
        for number, of in ((1, 2), (1, 1), (2, 3)):
            with pytest.raises(UserError, match=r"another make_shards is writing to .* \(part 1/2\): wait for it"):
                write_one_part(items, out, number, of)
        with pytest.raises(UserError, match=r"\(part 1/2\): wait"):
            merge_shards(out)
        with pytest.raises(UserError, match="quality 90, now 80"):
            write_one_part(items, out, 2, 2, quality=80)
        with pytest.raises(UserError, match=r"corpus changed since it started \(.*\): wait for it, or stop it, then"):
            write_one_part(ITEMS, out, 2, 2)
        with pytest.raises(UserError, match=r"late\.png: no such file"):
            write_one_part(items, out, 2, 2)
        assert temporary.exists(), "of the running part"
        assert (out / UNFINISHED / "plan.json").exists()
        tiny.photo(tmp_path / "late.png")
        write_one_part(items, out, 2, 2)
    assert not temporary.exists()
    assert write_one_part(items, out, 1, 2) == (3, 0)
    merge_shards(out)
    assert not (out / UNFINISHED).exists()


def test_last_part_to_fail_leaves_nothing(tmp_path):
    bad = [Item("bad", "train", tmp_path / "none.jpg", ITEMS[0].captions)]
    with pytest.raises(UserError, match=r"no such file$"):
        write_one_part(bad, tmp_path / "out", 1, 2)
    assert not (tmp_path / "out").exists()


def test_the_last_one_removes_the_notes_while_another_starts(tmp_path, monkeypatch):
    calls = []

    def flock(descriptor, how, real=fcntl.flock):
        calls.append(how)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / UNFINISHED)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert write_one_part(ITEMS, tmp_path, 1, 1) == (5, 0)
    assert len(calls) > 1


def test_without_locks_of_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    out = tmp_path / "out"
    bad = [ITEMS[1], Item("bad", "train", tmp_path / "none.jpg", ITEMS[0].captions)]
    with pytest.raises(UserError, match=r"none\.jpg"):
        write_one_part(bad, out, 2, 2)
    assert (out / UNFINISHED / "plan.json").exists()  # the other part may be running
    write_one_part(ITEMS[1:3], out, 1, 2)
    write_one_part(ITEMS[1:3], out, 2, 2)
    merge_shards(out)
    assert len(manifest.load(out).key) == 2
