"""What a stopped run leaves, and how the next one resumes it."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import manifest
from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.writing.folder_lock import UNFINISHED, remove_leftovers
from shards.writing.shard_record import lists_digest
from shards.writing.writer import Format, plan_shards, write_shards
from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import (
    ITEMS,
    contents,
    drawn,
    identities,
    killed_at,
    no_voice,
    shard_corpus,
    stop,
    tone,
    undisturbed,
    write,
)


def test_bad_input_keeps_finished_shards_and_the_next_run_resumes(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    assert sorted(kept) == ["train-000000.tar", "train-000001.tar"]
    tiny.speech(tmp_path / "corpus/4.wav")
    done = []
    report = write_shards(items, out, "tiny", Format(2), {"corpus": "tiny"}, progress=done.append)
    assert sum(done) == len(items)
    assert kept.items() <= identities(out).items()
    assert "4 shards, " in report.text()
    assert ", 2 of them kept from an earlier run\n" in report.text()
    assert contents(out) == undisturbed(tmp_path, items, samples_per_shard=2)


def test_with_skip_bad_a_run_resumes_and_without_it_does_not(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=2), tmp_path / "out"
    kept = stop(items, out)
    items.append(Item("gone", "dev", tmp_path / "gone.jpg", items[0].captions))  # dev is planned anew, train is not
    items.append(Item("end", "test", no_voice, items[0].captions))
    with pytest.raises(UserError, match=r"install the voices; 4 of 6 shards .*: the same command resumes"):
        write(items, out, samples_per_shard=2, skip_bad=True)
    assert kept.items() <= identities(out).items()
    with pytest.raises(UserError, match=r"2\.wav: empty file"):  # the shard without it does not count as complete
        write(items, out, samples_per_shard=2)
    report = write(items[:-1], out, samples_per_shard=2, skip_bad=True)
    assert [one.name for one in report.dropped] == ["u2", "p2", "gone"]
    assert contents(out) == undisturbed(tmp_path, items[:-1], samples_per_shard=2, skip_bad=True)


def other_caption(item, **how):
    return replace(item, captions=(replace(item.captions[0], **how),))


def touched(item):
    os.utime(item.picture, ns=(1, 1))
    return item


def other_recording(item):
    tiny.speech(item.captions[0].audio, seconds=0.1)
    return item


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, touched),
        (0, other_recording),
        (0, partial(replace, image_id="other")),
        (0, partial(replace, twin="p1")),
        (0, partial(other_caption, text="other")),
        (0, partial(other_caption, speaker=None)),
        (0, partial(other_caption, utterance="other")),
        (6, partial(other_caption, audio=partial(tone, 301))),
        (6, partial(other_caption, audio=partial(tone, 300, seconds=0.3))),
        (6, partial(replace, picture=partial(Image.new, "RGB", (20, 20), "blue"))),
        (6, partial(replace, picture=partial(Image.fromarray, np.zeros((2000, 1, 3), np.uint8)))),
    ],
)
def test_a_changed_shard_alone_is_written_again(tmp_path, number, change):
    items = [*shard_corpus(tmp_path / "corpus"), Item("end", "test", no_voice, (Caption("end", no_voice),))]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="4 of 5 shards are finished"):
        write(items, out, samples_per_shard=2)
    before = identities(out)
    again = [*items[:number], change(items[number]), *items[number + 1 : -1]]
    assert write(again, out, samples_per_shard=2).kept == 3
    name = "train-000000.tar" if number == 0 else "dev-000000.tar"
    assert {one for one, identity in identities(out).items() if before[one] != identity} == {name}
    assert contents(out) == undisturbed(tmp_path, again, samples_per_shard=2)


def test_arrays_that_look_alike_are_distinguished(tmp_path):
    pixels = np.zeros((2000, 3, 3), np.uint8)
    other = pixels.copy()
    other[1000] = 255  # numpy shows neither in full
    plans = [
        plan_shards([replace(drawn("a"), picture=partial(Image.fromarray, one))], "tiny", Format(), {})
        for one in (pixels, pixels.copy(), other)
    ]
    digests = [planned.plan.shards["train-000000.tar"] for planned in plans]
    assert digests[0] == digests[1] != digests[2]


def test_shards_of_earlier_versions_are_kept():
    """The digest that was computed before captions had a language; a language counts where there is one."""
    captions = Caption("u", Path("/data/u.wav"), "a text"), Caption("v", Path("/data/v.wav"))
    item = Item("p", "train", Path("/data/p.jpg"), captions)
    digest = lists_digest([item], {"quality": 90})
    assert digest == "bd28468654bf7b4b351608f53331b2bb8eda43be745b7986d6b52c177734a8dc"
    german = replace(item, captions=(replace(captions[0], language="de"), captions[1]))
    assert lists_digest([german], {"quality": 90}) != digest


@pytest.mark.parametrize(
    "harm",
    [
        lambda tar, record: os.truncate(tar, tar.stat().st_size - 1),
        lambda tar, record: os.truncate(record, record.stat().st_size - 1),
        lambda tar, record: tar.unlink(),
        lambda tar, record: record.unlink(),
    ],
    ids=["truncated tar", "truncated record", "lost tar", "lost record"],
)
def test_a_shard_that_is_not_as_recorded_is_written_again(tmp_path, harm):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    harm(out / "train-000000.tar", out / UNFINISHED / "train-000000.tar.json")
    report = write(items, out, samples_per_shard=2, skip_bad=True)
    assert report.kept == 1
    assert identities(out)["train-000001.tar"] == kept["train-000001.tar"]
    assert contents(out) == undisturbed(tmp_path, items, samples_per_shard=2, skip_bad=True)


def test_shards_of_a_corpus_that_shrank_are_removed(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    stop(items, out)
    write(items[:2], out, samples_per_shard=2)
    assert sorted(contents(out)) == ["index.npz", "manifest.json", "report.json", "sources.json", "train-000000.tar"]


def test_another_command_is_refused_where_there_is_something_to_lose(tmp_path):
    items, out = shard_corpus(tmp_path / "corpus", bad=4), tmp_path / "out"
    kept = stop(items, out)
    with pytest.raises(UserError, match=r"unfinished run made with quality 90, now 80: run that .* with --restart$"):
        write(items, out, samples_per_shard=2, quality=80)
    with pytest.raises(UserError, match=r"made with corpus tiny, now other"):
        write_shards(items, out, "other", Format(2), {})
    assert identities(out) == kept
    write_shards(items[:4], out, "other", Format(2), {}, restart=True)
    assert manifest.load(out).corpus == "other"
    assert not kept.items() & identities(out).items()


def test_another_command_takes_over_where_no_shard_is_finished(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(quality=50), {}).plan
    (tmp_path / UNFINISHED).mkdir()
    plan.save(tmp_path / UNFINISHED)
    (tmp_path / "train-000000.tar.77.tmp").write_bytes(b"junk")
    write(ITEMS, tmp_path)
    write(ITEMS, tmp_path / "undisturbed")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == contents(tmp_path / "undisturbed")


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    plan = plan_shards(ITEMS, "tiny", Format(), {"corpus": "tiny"}).plan
    (tmp_path / UNFINISHED).mkdir()
    plan.save(tmp_path / UNFINISHED)
    for name in (
        f"{UNFINISHED}/part-1-of-1.lock",
        f"{UNFINISHED}/plan.json.77.tmp",
        f"{UNFINISHED}/train-000000.tar.json.77.tmp",
        "train-000000.tar",
        "train-000009.tar",
        "old-000000.tar",
        "train-000001.tar.77.tmp",
        "index.npz",
    ):
        (tmp_path / name).write_bytes(b"junk")
    write(ITEMS, tmp_path)
    write(ITEMS, tmp_path / "undisturbed")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == contents(tmp_path / "undisturbed")
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_change_of_a_name(tmp_path, after):
    items = ITEMS[:3]  # none to be resampled: torch is not made for a fork
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    moment = 1
    while killed_at(moment, after, partial(write, items, out := tmp_path / f"{moment}", samples_per_shard=1)):
        notes = out / UNFINISHED
        kept = {name: value for name, value in identities(out).items() if (notes / f"{name}.json").exists()}
        if not (out / manifest.MANIFEST).exists():
            assert write(items, out, samples_per_shard=1).kept == len(kept)
        remove_leftovers(out)
        assert kept.items() <= identities(out).items()
        assert contents(out) == contents(tmp_path / "undisturbed")
        moment += 1
    assert moment > 12  # the plan, three shards with their records, the report, the index, the manifest, the notes
    assert contents(tmp_path / f"{moment}") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_change_of_a_name_while_a_finished_folder_is_made_again(tmp_path, after):
    items = ITEMS[:2]
    write(items, tmp_path / "undisturbed", samples_per_shard=1)
    again, moment, left_finished = True, 0, 0
    while again:
        moment += 1
        out = tmp_path / f"{moment}"
        write(ITEMS[1:3], out, samples_per_shard=2)  # other shards, one of another name
        old = contents(out)
        work = partial(write_shards, items, out, "tiny", Format(1), {"corpus": "tiny"}, restart=True)
        again = killed_at(moment, after, work)
        if (out / manifest.MANIFEST).exists() and again:
            remove_leftovers(out)
            left_finished += 1
            assert contents(out) in (old, contents(tmp_path / "undisturbed")), "neither the old folder nor the new one"
            write_shards(items, out, "tiny", Format(1), {"corpus": "tiny"}, restart=True)
        elif again:
            write(items, out, samples_per_shard=1)
        assert contents(out) == contents(tmp_path / "undisturbed")
    assert moment > 12
    assert left_finished


def test_restart_of_a_finished_folder_removes_nothing_of_others(tmp_path):
    write(ITEMS, tmp_path)
    before = identities(tmp_path)
    (tmp_path / "mine-000001.tar").touch()
    with pytest.raises(UserError, match=r"is not empty \(it contains mine-000001.tar\)"):
        write_shards(ITEMS, tmp_path, "tiny", Format(), {}, restart=True)
    assert before.items() <= identities(tmp_path).items()
    (tmp_path / "mine-000001.tar").unlink()
    write_shards(ITEMS, tmp_path, "tiny", Format(), {"corpus": "tiny"}, restart=True)
    assert not before.items() & identities(tmp_path).items()
