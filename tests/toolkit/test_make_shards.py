"""The command make_shards: every corpus, mistakes, bad input, the dry run and parts."""

import json
import re

import pytest

from shards.corpora import CORPORA
from shards.errors import UserError
from shards.manifest import load
from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import contents, identities
from tests.toolkit.shard_runs import counts, finished, make, start


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in CORPORA)])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        make(*arguments)
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out or arguments == ["--help"]


@pytest.mark.parametrize(
    ("name", "corpus", "expected"),
    [
        ("flickr8k", tiny.flickr8k, {"train": 3, "dev": 1, "test": 1}),
        ("spokencoco", tiny.spokencoco, {"train": 3, "dev": 3}),
        ("places", tiny.places, {"train": 2, "dev_seen": 1, "dev_unseen": 1}),
        ("table", tiny.one_row_table, {"train": 1}),
    ],
)
def test_every_corpus_from_disk_to_manifest(tmp_path, capsys, name, corpus, expected):
    make(name, "--root", corpus(tmp_path / "corpus"), "--out", tmp_path / "out", "--jobs", 1)
    made = load(tmp_path / "out")
    assert made.corpus == name
    assert counts(tmp_path / "out") == expected
    output = capsys.readouterr().out
    assert f"{tmp_path}/out: written in" in output
    assert "nothing dropped" in output


def odd_audio(root):
    """A table of recordings that need mixing down, resampling, or a look at their content."""
    folder = root / "audio"
    tiny.speech(folder / "8 channels.wav", channels=8)
    tiny.speech(folder / "cd.flac", rate=44100, channels=2, subtype="PCM_24")
    tiny.speech(folder / "mp3.wav", rate=24000, format="MP3")
    tiny.speech(folder / "phone.wav", rate=8000, subtype="ULAW")
    tiny.speech(folder / "web.opus", rate=48000, format="OGG", subtype="OPUS")
    tiny.speech(folder / "espeak.wav", rate=22050)
    names = sorted(path.name for path in folder.iterdir())
    return tiny.table(root, [{"image": f"{n}.png", "audio": f"audio/{name}"} for n, name in enumerate(names)])


def test_same_bytes_whatever_the_jobs(tmp_path):
    root = odd_audio(tmp_path / "corpus")
    for jobs in ("1", "2"):
        job = start("table", "--root", root, "--out", tmp_path / jobs, "--jobs", jobs, "--samples-per-shard", "2")
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
    assert len(contents(tmp_path / "1")) == 7
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert load(tmp_path / "1").duration.tolist() == pytest.approx([0.25] * 6, abs=0.1)


def test_a_place_whose_name_is_too_long(tmp_path):
    out = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=r"cannot write into .*: File name too long"):
        make("table", "--root", tiny.one_row_table(tmp_path / "corpus"), "--out", out, "--jobs", 1)
    with pytest.raises(UserError, match="contains no parts to merge"):
        make("merge", "--out", out)


def test_finished_folder_is_left_as_it_is(tmp_path, capsys):
    root = tiny.flickr8k(tmp_path / "corpus")
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 2)
    output = capsys.readouterr().out
    assert "finished already, made with the same arguments" in output
    assert "train" in output
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="contains shards made with quality 90, now 80: give another --out"):
        make("flickr8k", "--root", root, "--out", tmp_path / "out", "--quality", 80)
    with pytest.raises(UserError, match="made with corpus flickr8k, now places"):
        make("places", "--root", root, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "arguments are required: CORPUS"),
        (["flickr30k", "--out", "x"], "invalid choice: 'flickr30k'"),
        (["flickr8k", "--out", "x"], "required: --root"),
        (["flickr8k", "--root", "x"], "required: --out"),
        (
            ["table", "--root", "x", "--out", "y", "--jobs", "0"],
            "--jobs: expected a whole number of at least 1, got '0'",
        ),
        (["table", "--root", "x", "--out", "y", "--quality", "101"], "from 1 to 100, got '101'"),
        (["table", "--root", "x", "--out", "y", "--max-seconds", "nan"], "--max-seconds: expected seconds"),
        (["table", "--root", "x", "--out", "y", "--max-seconds", "601"], "--max-seconds: .* at most 600, got '601'"),
        (["table", "--root", "x", "--out", "y", "--codec", "mp3"], "--codec: invalid choice: 'mp3'"),
        (
            ["table", "--root", "x", "--out", "y", "--short-sid", "9"],
            "--short-side: expected a whole number of at least 16",
        ),
        (["table", "--root", "/no/where", "--out", "y"], "/no/where: no such folder"),
        (["table", "--root", "x", "--out", "y", "--part", "0/3"], "--part: expected I/N with I from 1 to N, as in 2/8"),
        (["table", "--root", "x", "--out", "y", "--part", "4/3"], "--part: expected I/N .*, got '4/3'"),
        (["table", "--root", "x", "--out", "y", "--part", "2"], "--part: expected I/N .*, got '2'"),
        (
            ["table", "--root", "x", "--out", "y", "--part", "1/2", "--restart"],
            "--restart and --part: remove y instead",
        ),
        (["merge"], "required: --out"),
        (["merge", "--out", "/no/where"], "/no/where contains no parts to merge"),
    ],
)
def test_mistakes_on_the_command_line(arguments, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)


def spoiled(root, what, train=4, dev=2, test=2):
    """A corpus of which something of the sixth picture is bad, and the name of that."""
    tiny.flickr8k(root, {"train": train, "dev": dev, "test": test})
    (wav,), (jpg,) = root.glob("flickr_audio/wavs/1005_*_1.wav"), root.glob("Flicker8k_Dataset/1005_*.jpg")
    if what == "no root":
        return root / "nowhere", "nowhere"
    if what == "missing audio":
        wav.unlink()
    if what == "empty audio":
        wav.write_bytes(b"")
    if what == "long audio":
        tiny.speech(wav, seconds=31)
    if what == "text for a picture":
        jpg.write_text("no picture")
    return root, jpg.name if what == "text for a picture" else wav.name


@pytest.mark.parametrize("what", ["no root", "missing audio", "empty audio", "long audio", "text for a picture"])
def test_bad_input_in_the_first_shard_is_one_line_and_nothing_is_left(tmp_path, what):
    root, named = spoiled(tmp_path / "corpus", what, train=8, dev=0, test=0)
    out = tmp_path / "out"
    job = start("flickr8k", "--root", root, "--out", out)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2
    *told, error = errors.splitlines()
    assert error.startswith("error: ")
    assert named in error
    assert all("is empty" in line for line in told), "besides, splits that are listed as empty are told"
    assert not out.exists()


def test_missing_input_is_seen_before_the_first_shard(tmp_path):
    root, named = spoiled(tmp_path / "corpus", "missing audio")
    with pytest.raises(UserError, match=rf"{named} is missing: complete the corpus"):
        make("flickr8k", "--root", root, "--out", tmp_path / "out", "--samples-per-shard", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_bad_input_after_finished_shards(tmp_path, capsys, jobs):
    root, named = spoiled(tmp_path / "corpus", "empty audio")
    arguments = ("flickr8k", "--root", root, "--samples-per-shard", "1", "--jobs", jobs, "--out")
    job = start(*arguments, tmp_path / "out")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2
    line = rf"error: .*{named}: empty file .*; ([4-7]) of 8 shards are finished and kept: .*, or with --skip-bad,.*\n"
    assert (kept := re.fullmatch(line, errors)), errors
    before = finished(tmp_path / "out")
    assert len(before) == int(kept[1])
    make(*arguments, tmp_path / "out", "--skip-bad")
    assert f", {kept[1]} of them kept from an earlier run" in capsys.readouterr().out
    assert before.items() <= identities(tmp_path / "out").items()
    make(*arguments, tmp_path / "undisturbed", "--skip-bad")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", ["missing audio", "empty audio", "long audio", "text for a picture"])
def test_bad_input_skipped(tmp_path, capsys, what):
    root, named = spoiled(tmp_path / "corpus", what)
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 1, "--skip-bad")
    output = capsys.readouterr().out
    picture = what == "text for a picture"
    assert ("dropped: 1 pictures, 2 captions" if picture else "dropped: 0 pictures, 1 captions") in output
    assert named in output
    assert counts(tmp_path / "out") == {"train": 4, "dev": 1 if picture else 2, "test": 2}


def faulty(root):
    """A table with a row without a recording, a row that comes twice, and a recording in two splits."""
    names = ("train", "train", "dev", "test")
    tiny.table(root, [{"image": f"{n}.png", "audio": f"{n}.wav", "split": name} for n, name in enumerate(names)])
    tiny.photo(root / "leak.png")
    with (root / "table.csv").open("a") as file:
        file.write("9.png,,,,train\nleak.png,0.wav,,,dev\n3.png,3.wav,,,test\n")
    return root


def test_problems_of_a_corpus_are_reported_before_anything_is_written(tmp_path):
    root = faulty(tmp_path / "corpus")
    with pytest.raises(UserError, match=r"table\.csv line 6: audio is empty; --skip-bad drops and reports such"):
        make("table", "--root", root, "--out", tmp_path / "out")
    table = root / "table.csv"
    table.write_text(table.read_text().replace("9.png,,", "9.png,9.wav,"))
    tiny.photo(root / "9.png"), tiny.speech(root / "9.wav")
    with pytest.raises(
        UserError, match=r"line 8: the same picture and audio file as at table\.csv line 5 \(and 1 more\)"
    ):
        make("table", "--root", root, "--out", tmp_path / "out", "--dry-run")
    table.write_text(table.read_text().replace("3.png,3.wav,,,test\n", "", 1))
    with pytest.raises(UserError, match=r"line 2: audio file \S+/0\.wav is in split train, and in split dev: .*line 6"):
        make("table", "--root", root, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_problems_of_a_corpus_are_dropped_and_reported(tmp_path, capsys, parts):
    root, out = faulty(tmp_path / "corpus"), tmp_path / "out"
    arguments = ("table", "--root", root, "--out", out, "--jobs", 1, "--samples-per-shard", 1, "--skip-bad")
    make(*arguments, "--dry-run")
    assert "dropped: 1 pictures, 3 captions" in capsys.readouterr().out
    if parts == 1:
        make(*arguments)
    else:
        for number in (1, 2):
            make(*arguments, "--part", f"{number}/2")
        make("merge", "--out", out)
    output = capsys.readouterr().out
    assert counts(out) == {"train": 1, "dev": 2, "test": 1}
    assert "dropped: 1 pictures, 3 captions" in output
    for told in (
        "table.csv line 6: audio is empty",
        "table.csv line 8: the same picture",
        "line 2: audio file",
        "no capt",
    ):
        assert told in output
    assert len(json.loads((out / "report.json").read_text())["dropped"]) == 4


def test_dry_run(tmp_path, capsys):
    root = tiny.flickr8k(tmp_path / "corpus")
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--dry-run", "--samples-per-shard", 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:-1]] == [
        ["train", "3", "6", "2"],
        ["dev", "1", "2", "1"],
        ["test", "1", "2", "1"],
        ["all", "5", "10", "4"],
    ]
    assert not (tmp_path / "out").exists()
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 1)
    before = contents(tmp_path / "out")
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--dry-run", "--quality", 80)
    assert contents(tmp_path / "out") == before


def test_parts_at_once(tmp_path, capsys):
    root, out = tiny.flickr8k(tmp_path / "corpus", {"train": 4, "dev": 1, "test": 1}), tmp_path / "new" / "out"
    arguments = ("flickr8k", "--root", root, "--samples-per-shard", "1", "--jobs", "1", "--out")
    jobs = [start(*arguments, out, "--part", f"{number}/3") for number in (1, 2, 3)]
    for number, job in enumerate(jobs, 1):
        output, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        assert f"{out}: part {number}/3: 2 shards written in" in output
        assert f"after the last part: make_shards.py merge --out {out}" in output
    make("merge", "--out", out)
    assert "6 shards, " in capsys.readouterr().out
    make(*arguments, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    capsys.readouterr()
    make("merge", "--out", out)
    make(*arguments, out, "--part", "2/3")
    assert capsys.readouterr().out.count(f"{out}: finished already") == 2


def test_notes_left_beside_the_manifest_are_removed(tmp_path):
    root = tiny.flickr8k(tmp_path / "corpus")
    arguments = ("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 1)
    make(*arguments)
    before = contents(tmp_path / "out")
    (tmp_path / "out/.unfinished").mkdir()
    make(*arguments)
    assert contents(tmp_path / "out") == before
