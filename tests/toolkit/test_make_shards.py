import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.corpora import CORPORA
from shards.errors import UserError
from shards.manifest import load
from tests.shards import tiny_corpora as tiny
from toolkit import make_shards
from toolkit.make_shards import main

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"


def make(*arguments):
    main([str(one) for one in arguments])


def start(*arguments, **how):
    """Run the script as a user does, in another folder."""
    command = [sys.executable, ROOT / "toolkit/make_shards.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **how)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """What a shard keeps if no one writes it again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def finished(folder):
    """The shards of an unfinished folder that a rerun may not touch."""
    return {name: how for name, how in identities(folder).items() if (folder / f".unfinished/{name}.json").exists()}


def counts(folder):
    made = load(folder)
    return {split: len(made.rows(split)) for split in made.splits}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in CORPORA)])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        make(*arguments)
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out or arguments == ["--help"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from toolkit.make_shards import build_parser; build_parser();"
        "print(*{'torch', 'torchaudio', 'transformers', 'soundfile', 'tqdm'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


ON_DISK = [
    ("flickr8k", tiny.flickr8k),
    ("spokencoco", tiny.spokencoco),
    ("places", tiny.places),
    ("table", tiny.one_row_table),
]


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


# A finished folder whose corpus changed.

LISTS = (".csv", ".json", ".txt")


def files(root, *endings):
    return [path for path in sorted(root.rglob("*")) if path.suffix in endings]


def remake(name, tmp_path, *more, root="corpus"):
    make(name, "--root", tmp_path / root, "--out", tmp_path / "out", "--jobs", 1, *more)


@pytest.fixture(params=ON_DISK, ids=lambda one: one[0])
def finished_one(request, tmp_path, capsys):
    """The name of a corpus that is made into shards, its lists in `corpus`."""
    name, corpus = request.param
    corpus(tmp_path / "corpus")
    remake(name, tmp_path)
    capsys.readouterr()
    return name


def refused(name, tmp_path, *more, **where):
    """What is said of a corpus that changed; the shards stay as they are."""
    before = identities(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        remake(name, tmp_path, *more, **where)
    assert identities(tmp_path / "out") == before
    assert caught.value.code == 2
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_an_edit_of_any_list_is_noticed(finished_one, tmp_path, capsys):
    lists = files(tmp_path / "corpus", *LISTS)
    assert lists
    for path in lists:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"a", b"A", 1) if b"a" in data else data + b"\n")
        told = refused(finished_one, tmp_path)
        assert told.startswith(f"{tmp_path}/out is finished, but its corpus changed since: {path} was edited"), told
        assert told.endswith(": give another --out, or make it again with --restart")
        assert refused(finished_one, tmp_path, "--part", "1/2").endswith(f"another --out, or remove {tmp_path}/out")
        path.write_bytes(data)
    remake(finished_one, tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def turn_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))  # the clock of the file system may not be fine enough


@pytest.mark.parametrize(("change", "line"), [(lengthen, "has another size"), (turn_a_bit, "has other content")])
@pytest.mark.parametrize("endings", [(".jpg", ".png"), (".wav",)])
def test_a_change_of_any_file_is_noticed(finished_one, tmp_path, endings, change, line):
    for path in files(tmp_path / "corpus", *endings):
        data, status = path.read_bytes(), path.stat()
        change(path)
        assert f"its corpus changed since: {path} {line}: give another" in refused(finished_one, tmp_path)
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_many_changed_files_are_counted(tmp_path):
    tiny.flickr8k(tmp_path / "corpus")
    remake("flickr8k", tmp_path)
    for path in files(tmp_path / "corpus", ".wav"):
        lengthen(path)
    told = refused("flickr8k", tmp_path)
    assert told.count("has another size") == 3
    assert "; 7 more files changed: give another" in told


def test_a_corpus_that_was_touched_copied_or_moved_is_the_same(finished_one, tmp_path, capsys):
    before = contents(tmp_path / "out")
    for path in files(tmp_path / "corpus", *LISTS, ".jpg", ".png", ".wav"):
        os.utime(path, ns=(1, 1))
    remake(finished_one, tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    remake(finished_one, tmp_path, root="elsewhere")
    assert f"finished already, made from the same files, then at {tmp_path}/corpus\n" in capsys.readouterr().out
    lengthen(files(tmp_path / "elsewhere", ".wav")[0])
    told = refused(finished_one, tmp_path, root="elsewhere")
    assert f"shards made with root {tmp_path}/corpus, now {tmp_path}/elsewhere ({tmp_path}/elsewhere/" in told
    assert "has another size): give another --out, or remove the folder" in told
    assert contents(tmp_path / "out") == before


def test_what_is_gone_is_not_called_unchanged(finished_one, tmp_path, capsys):
    before = identities(tmp_path / "out")
    media = files(tmp_path / "corpus", ".jpg", ".png", ".wav")
    media[0].unlink()
    remake(finished_one, tmp_path)
    line = rf"the same arguments; 1 of the \d+ files of their corpus are missing \({media[0]}\): whether these changed"
    assert re.search(line, capsys.readouterr().out)
    lengthen(media[1])
    assert f"{media[1]} has another size" in refused(finished_one, tmp_path)
    for path in files(tmp_path / "corpus", *LISTS):
        path.unlink()
    remake(finished_one, tmp_path)
    output = capsys.readouterr().out
    assert "finished already, made with the same arguments; their corpus could not be read (" in output
    assert "): whether it changed since is unknown\n" in output
    with pytest.raises(UserError):
        remake(finished_one, tmp_path, "--restart")
    assert identities(tmp_path / "out") == before


def test_a_row_more_is_noticed_and_restart_makes_all_again(tmp_path, capsys):
    rows = [{"image": f"{n}.png", "audio": f"{n}.wav"} for n in range(3)]
    tiny.table(tmp_path / "corpus", rows[:1])
    remake("table", tmp_path)
    before = identities(tmp_path / "out")
    tiny.table(tmp_path / "corpus", rows)
    assert "table.csv was edited; 2 pictures more; 2 captions more: give" in refused("table", tmp_path)
    remake("table", tmp_path, "--restart")
    assert counts(tmp_path / "out") == {"train": 3}
    assert not before.items() & identities(tmp_path / "out").items()
    tiny.table(tmp_path / "corpus", rows[:2])
    assert "table.csv was edited; 1 picture fewer; 1 caption fewer: give" in refused("table", tmp_path)
    assert "made with quality 90, now 80: give another --out" in refused(
        "table", tmp_path, "--restart", "--quality", 80
    )
    (tmp_path / "corpus/table.csv").write_text("picture,sound\n")
    assert "table.csv was edited: give another" in refused("table", tmp_path)
    refused("table", tmp_path, "--restart")
    capsys.readouterr()


def test_a_list_that_is_there_now_is_noticed(tmp_path):
    tiny.places(tmp_path / "corpus")
    (tmp_path / "corpus/dev_unseen_2020.json").rename(tmp_path / "later")
    remake("places", tmp_path)
    (tmp_path / "later").rename(tmp_path / "corpus/dev_unseen_2020.json")
    line = "dev_unseen_2020.json is read now and was not before; 1 picture more; 1 caption more: give another"
    assert line in refused("places", tmp_path)
    remake("places", tmp_path, "--restart")
    (tmp_path / "corpus/dev_unseen_2020.json").unlink()
    assert "dev_unseen_2020.json was read then and is not now; 1 picture fewer" in refused("places", tmp_path)


def test_a_drawn_corpus_is_its_arguments(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    for _ in range(2):
        make("scenes", "--pictures", 1, "--dev", 0, "--test", 0, "--out", tmp_path / "out", "--jobs", 1)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


def test_folders_that_do_not_say_what_they_were_made_from(finished_one, tmp_path, capsys):
    path = tmp_path / "out/sources.json"
    data = path.read_bytes()
    for damaged in (data[:-1], data.replace(b"1", b"2", 1), b"", data + data):
        path.write_bytes(damaged)
        remake(finished_one, tmp_path)
        line = f"made with the same arguments; the record of their corpus cannot be read ({path} is damaged"
        assert line in capsys.readouterr().out
    path.unlink()
    remake(finished_one, tmp_path)
    line = "the same arguments; an earlier version did not record their corpus: whether it changed since is"
    assert line in capsys.readouterr().out


def test_a_folder_of_before_an_option_was_there(tmp_path, capsys, monkeypatch):
    tiny.one_row_table(tmp_path / "corpus")
    content = make_shards._content
    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_content", lambda options: content(options) | {"other": False, "more": 3})
        remake("table", tmp_path)
    assert "made with more 3, now None" in refused("table", tmp_path)
    monkeypatch.setattr(make_shards, "_content", lambda options: content(options) | {"new": None, "more": 3})
    remake("table", tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


def test_an_interrupted_run_does_not_mix_old_and_new(tmp_path):
    tiny.flickr8k(tmp_path / "corpus")
    spoken = files(tmp_path / "corpus", ".wav")
    late = spoken[-1].read_bytes()
    spoken[-1].write_bytes(b"")
    with pytest.raises(UserError, match="of 5 shards are finished and kept"):
        remake("flickr8k", tmp_path, "--samples-per-shard", 1)
    spoken[-1].write_bytes(late)
    texts = tmp_path / "corpus/Flickr8k_text/Flickr8k.token.txt"
    texts.write_text(texts.read_text().replace("caption 0 of 1000_ab0", "other words"))
    tiny.speech(spoken[2], seconds=0.3)
    remake("flickr8k", tmp_path, "--samples-per-shard", 1)
    make("flickr8k", "--root", tmp_path / "corpus", "--out", tmp_path / "fresh", "--samples-per-shard", 1, "--jobs", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


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


def test_problems_of_a_corpus_are_told_before_anything_is_written(tmp_path):
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
    with pytest.raises(UserError, match=r"line 2: audio file \S+/0\.wav is in split train, and in split dev: .* line 6"):
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


@pytest.fixture
def slow_corpus(tmp_path):
    """Pictures that take a while to read, as links to one file."""
    root = tmp_path / "corpus"
    tiny.photo(root / "large.png", (2000, 1000))
    tiny.speech(root / "speech.wav")
    rows = []
    for n in range(60):
        os.link(root / "large.png", root / f"{n}.png")
        os.link(root / "speech.wav", root / f"{n}.wav")
        rows.append({"image": f"{n}.png", "audio": f"{n}.wav"})
    return tiny.table(root, rows)


def slow_arguments(root, out):
    return ("table", "--root", str(root), "--out", str(out), "--jobs", "2", "--samples-per-shard", "3")


def start_slow(root, out):
    """Start two workers on the slow corpus and wait until they have finished a shard."""
    before = len(finished(out))
    job = start(*slow_arguments(root, out), start_new_session=True)
    deadline = time.monotonic() + 60
    while len(finished(out)) == before:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "no shard after a minute"
        time.sleep(0.02)
    return job


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_stopping_keeps_finished_shards(slow_corpus, tmp_path, number, code, line):
    job = start_slow(slow_corpus, tmp_path / "out")
    os.killpg(job.pid, number)  # as a terminal or a scheduler does: all processes
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code
    assert re.fullmatch(rf"{tmp_path}/out: \d+ of 20 shards are finished and kept: the same command.*\n{line}", errors)
    assert not list(tmp_path.glob("out/**/*.tmp"))
    assert finished(tmp_path / "out")


def test_stopping_before_the_first_shard_leaves_nothing(slow_corpus, tmp_path):
    job = start(*slow_arguments(slow_corpus, tmp_path / "out")[:-1], "80")
    deadline = time.monotonic() + 60
    # With something in it: until then modules are imported, where Python itself may lose an interrupt.
    while not any(path.stat().st_size for path in tmp_path.glob("out/*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_killed_worker_is_named(slow_corpus, tmp_path):
    job = start_slow(slow_corpus, tmp_path / "out")
    workers = [pid for pid in children(job.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert f"(pid {workers[1]}) was killed by SIGKILL while making train-0000" in errors
    assert "of 20 shards are finished and kept: the same command" in errors
    assert errors.count("\n") == 1
    assert finished(tmp_path / "out")


def test_rerun_after_kills_ends_with_the_same_bytes(slow_corpus, tmp_path):
    out, chance = tmp_path / "out", random.Random(1)
    kept = {}
    for _ in range(3):
        job = start_slow(slow_corpus, out)
        time.sleep(chance.uniform(0, 0.2))
        job.kill()
        job.communicate(timeout=60)
        assert not (out / "manifest.json").exists()
        now = finished(out)
        assert kept.items() <= now.items()
        kept = now
    make(*slow_arguments(slow_corpus, out))
    assert kept.items() <= identities(out).items()
    make(*slow_arguments(slow_corpus, tmp_path / "undisturbed"))
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.skipif(not (SHARED / "audio-fixtures").is_dir(), reason="no audio fixtures")
def test_real_audio_that_decoders_trip_over(tmp_path):
    folder = SHARED / "audio-fixtures"
    tiny.photo(tmp_path / "1.png")
    rows = [{"image": "1.png", "audio": str(path)} for path in sorted(folder.iterdir())]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    make("table", "--root", tmp_path / "t.jsonl", "--out", tmp_path / "out", "--jobs", 1)
    made = load(tmp_path / "out")
    assert len(made.duration) == len(rows)
    assert made.duration.min() >= 0.09
