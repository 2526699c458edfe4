import json
import os
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
    assert len(contents(tmp_path / "1")) == 6
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert load(tmp_path / "1").duration.tolist() == pytest.approx([0.25] * 6, abs=0.1)


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
    with pytest.raises(UserError, match="holds shards made with quality 90, now 80: give another --out"):
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
        (["table", "--root", "x", "--out", "y", "--codec", "mp3"], "--codec: invalid choice: 'mp3'"),
        (
            ["table", "--root", "x", "--out", "y", "--short-sid", "9"],
            "--short-side: expected a whole number of at least 16",
        ),
        (["table", "--root", "/no/where", "--out", "y"], "/no/where: no such folder"),
    ],
)
def test_mistakes_on_the_command_line(arguments, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)


def spoiled(root, what):
    tiny.flickr8k(root, {"train": 4, "dev": 2, "test": 2})
    wav, jpg = root / "flickr_audio/wavs/1005_ab1_1.wav", root / "Flicker8k_Dataset/1005_ab1.jpg"
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


@pytest.mark.parametrize(
    ("what", "jobs"),
    [
        ("no root", 1),
        ("missing audio", 1),
        ("empty audio", 1),
        ("empty audio", 2),
        ("long audio", 1),
        ("text for a picture", 2),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(tmp_path, what, jobs):
    root, named = spoiled(tmp_path / "corpus", what)
    out = tmp_path / "out"
    job = start("flickr8k", "--root", root, "--out", out, "--jobs", str(jobs), "--samples-per-shard", "1")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2
    assert errors.startswith("error: ")
    assert named in errors
    assert errors.count("\n") == 1, errors
    assert not out.exists()


@pytest.mark.parametrize("what", ["missing audio", "empty audio", "long audio", "text for a picture"])
def test_bad_input_skipped(tmp_path, capsys, what):
    root, named = spoiled(tmp_path / "corpus", what)
    make("flickr8k", "--root", root, "--out", tmp_path / "out", "--jobs", 1, "--skip-bad")
    output = capsys.readouterr().out
    picture = what == "text for a picture"
    assert ("dropped: 1 pictures, 2 captions" if picture else "dropped: 0 pictures, 1 captions") in output
    assert named in output
    assert counts(tmp_path / "out") == {"train": 4, "dev": 1 if picture else 2, "test": 2}


@pytest.fixture
def slow_corpus(tmp_path):
    """Pictures that take a while to read, as links to one file."""
    root = tmp_path / "corpus"
    tiny.photo(root / "large.png", (2000, 1000))
    rows = []
    for n in range(80):
        os.link(root / "large.png", root / f"{n}.png")
        rows.append({"image": f"{n}.png", "audio": "1.wav"})
    return tiny.table(root, rows)


def start_slow(root, out):
    """Start two workers on the slow corpus and wait until the first shards are there."""
    job = start(
        "table", "--root", root, "--out", out, "--jobs", "2", "--samples-per-shard", "4", start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "no shard after a minute"
        time.sleep(0.02)
    return job


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_stopping_leaves_nothing(slow_corpus, tmp_path, number, code, line):
    job = start_slow(slow_corpus, tmp_path / "out")
    os.killpg(job.pid, number)  # as a terminal or a scheduler does: all processes
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (code, line)
    assert not (tmp_path / "out").exists()


def test_killed_worker_is_named(slow_corpus, tmp_path):
    job = start_slow(slow_corpus, tmp_path / "out")
    workers = [pid for pid in children(job.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert f"(pid {workers[1]}) was killed by SIGKILL while making train-0000" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rerun_after_a_kill_ends_with_the_same_bytes(slow_corpus, tmp_path):
    out = tmp_path / "out"
    job = start_slow(slow_corpus, out)
    job.kill()
    job.communicate(timeout=60)
    assert not (out / "manifest.json").exists()
    arguments = ("table", "--root", slow_corpus, "--jobs", 2, "--samples-per-shard", 4)
    make(*arguments, "--out", out)
    make(*arguments, "--out", tmp_path / "undisturbed")
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
