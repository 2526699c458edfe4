"""The index: what it adds, updates and drops, killed updates, other models, hostile files and damaged indexes."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.writing.writer import Format, write_shards
from tests.toolkit.indexing_files import (
    EXPORT,
    HOSTILE,
    hostile_files,
    other_model,
    save_audio,
    save_image,
    save_images,
)
from toolkit import index as command
from toolkit.indexing import writer
from toolkit.indexing.encoder import Encoder, model_checksum
from toolkit.indexing.items import FileSource, ShardSource
from toolkit.indexing.items import Item as Indexed
from toolkit.indexing.store import Index
from toolkit.indexing.update import compare, update

ROOT = Path(__file__).resolve().parents[2]


def make(out, pictures, **options):
    return update(out, FileSource(str(pictures), "image"), EXPORT, batch_size=2, workers=2, device="cpu", **options)


def assert_same(one, other):
    one, other = Index.open(one), Index.open(other)
    assert one.items() == other.items()
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-3)


@pytest.fixture
def pictures(tmp_path):
    return save_images(tmp_path / "pictures")


def test_adds_updates_and_drops_only_what_changed(pictures, tmp_path, monkeypatch):
    out = tmp_path / "index"
    assert make(out, pictures).rows == 7
    before = Index.open(out)
    assert [item.name for item in before.items()] == [
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "sub/1.png",
        "sub/3.png",
        "sub/5.png",
    ]
    assert before.embeddings.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(before.embeddings.astype(float), axis=1), 1, atol=2e-3)

    save_image(pictures / "2.png", 70)
    os.utime(pictures / "2.png", ns=(1, 1))
    save_image(pictures / "new" / "8.png", 8)
    (pictures / "sub" / "1.png").unlink()
    encoded = []
    embed = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, *rest: encoded.append(len(rest[1])) or embed(self, *rest))
    changes = make(out, pictures).changes
    assert (changes.added, changes.changed, changes.dropped, len(changes.to_keep), sum(encoded)) == (1, 1, 1, 5, 2)
    make(tmp_path / "new", pictures)
    assert_same(out, tmp_path / "new")
    # A reader that opened the index before the update still has its own generation.
    assert len(before.items()) == len(before.embeddings) == 7


def test_an_index_that_is_up_to_date_needs_no_model_and_is_not_written(pictures, tmp_path, monkeypatch):
    make(tmp_path / "index", pictures)
    monkeypatch.setattr(Encoder, "load", None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert not make(tmp_path / "index", pictures).changes.to_encode
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == before


def test_kill_9_in_the_middle_then_continue_equals_never_killed(pictures, tmp_path, caplog):
    program = f"""
import os, signal
from pathlib import Path
from toolkit.indexing.encoder import Encoder
from toolkit.indexing.items import FileSource
from toolkit.indexing.update import update
embed, calls = Encoder.embed, []
def kill_at_the_third(self, *rest):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, *rest)
Encoder.embed = kill_at_the_third
update(Path({str(tmp_path / "index")!r}), FileSource({str(pictures)!r}, "image"), Path({str(EXPORT)!r}), batch_size=2)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert len(Index.open(tmp_path / "index")) == 0
    with open(tmp_path / "index/pending.bin", "ab") as file:  # a batch that was being written
        file.write(b"part of a row")
    with open(tmp_path / "index/pending.jsonl", "ab") as file:
        file.write(b'{"name": "6.png", "si')
    caplog.set_level(logging.INFO)
    make(tmp_path / "index", pictures)
    assert "continuing: 4 were encoded before" in caplog.text
    make(tmp_path / "new", pictures)
    assert_same(tmp_path / "index", tmp_path / "new")
    assert not list((tmp_path / "index").glob("pending*"))


@pytest.mark.parametrize("moment", ["write_head", "remove_leftovers", "format_item"])
def test_a_process_killed_in_the_commit_loses_nothing(pictures, tmp_path, monkeypatch, moment):
    out = tmp_path / "index"
    make(out, pictures)
    save_image(pictures / "9.png", 9)
    (pictures / "0.png").unlink()

    def kill(*_):
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(writer, moment, kill)
        with pytest.raises(SystemError):
            make(out, pictures)
    assert len(Index.open(out)) == 7
    make(out, pictures)
    make(tmp_path / "new", pictures)
    assert_same(out, tmp_path / "new")
    assert sorted(path.suffix for path in out.iterdir()) == ["", ".json", ".jsonl", ".npy"]


def test_another_model_or_source_or_process_is_refused(pictures, tmp_path):
    out = tmp_path / "index"
    make(out, pictures)
    other = other_model(tmp_path / "other")
    for rest in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="another model"):
            command.main(["--model", str(other), "--pictures", str(pictures), "--out", str(out), *rest])
    save_images(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"not of images .*elsewhere"):
        make(out, tmp_path / "elsewhere")
    with writer.locked(out), pytest.raises(UserError, match="another process updates"):
        make(out, pictures)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        make(tmp_path / "full", pictures)
    shutil.rmtree(pictures)
    pictures.mkdir()
    with pytest.raises(UserError, match="no images in"):
        make(out, pictures)


def test_the_fitted_weight_does_not_make_another_model(tmp_path):
    shutil.copytree(EXPORT, tmp_path / "fitted")
    path = tmp_path / "fitted/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"match_weight": 0.5}))
    assert model_checksum(tmp_path / "fitted") == model_checksum(EXPORT)


def test_hostile_files_are_named_in_one_line_each_and_left_out(pictures, tmp_path, caplog):
    hostile_files(pictures / "hostile")
    result = make(tmp_path / "index", pictures)
    assert result.rows == 7
    assert not any("hostile" in item.name for item in Index.open(tmp_path / "index").items())
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    for name in HOSTILE:
        assert sum(f"hostile/{name}:" in line for line in lines) == 1, name
    assert len(lines) == len(HOSTILE)
    assert not any("\n" in line for line in lines)


def test_hostile_audio_is_named_and_left_out(tmp_path, caplog):
    folder = tmp_path / "audio"
    good = save_audio(folder / "good.wav", 1)
    (folder / "cut.wav").write_bytes(good.read_bytes()[:400])
    (folder / "text.mp3").write_text("no audio")
    (folder / "empty.flac").touch()
    result = update(tmp_path / "index", FileSource(str(folder), "audio"), EXPORT, device="cpu")
    assert (result.rows, sorted(result.unreadable)) == (1, ["cut.wav", "empty.flac", "text.mp3"])
    assert len([record for record in caplog.records if "left out" in record.getMessage()]) == 3


def test_files_of_a_folder_that_cannot_be_listed_are_kept():
    a, b, c = (Indexed(name, 1, "1") for name in ("a.png", "sub/b.png", "gone/c.png"))
    changes = compare([a, b, c], [a], ["sub/"])
    assert changes.to_keep == [a, b]
    assert changes.dropped == 1


class Malicious:
    def __reduce__(self):
        return os.system, ("touch unpickled",)


def swap(name, data):
    return lambda folder: next(folder.glob(name)).write_bytes(data)


def save(array):
    def damage(folder):
        with open(next(folder.glob("embeddings-*")), "wb") as file:
            np.save(file, array, allow_pickle=True)

    return damage


def edit(old, new):
    def damage(folder):
        path = folder / "index.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        swap("index.json", b"{"),
        swap("index.json", b"[" * 100_000),
        swap("index.json", b"[]"),
        edit('"format": 1', '"format": 2'),
        edit('"rows": 7', '"rows": 8'),
        edit('"rows": 7', '"rows": -7'),
        edit('"dim": 8', '"dim": 4'),
        edit('"dim": 8', '"dim": true'),
        edit('"modality": "image"', '"modality": "video"'),
        edit('"kind": "folder"', '"kind": "pipe"'),
        edit('"rows"', '"rowz"'),
        save(np.array([Malicious()] * 7, dtype=object)),
        save(np.zeros((7, 8), np.float32)),
        save(np.zeros((8, 7), np.float16).T),
        swap("embeddings-*", b"\x93NUMPY\x01\x00"),
        lambda folder: os.truncate(next(folder.glob("embeddings-*")), 150),
        lambda folder: next(folder.glob("embeddings-*")).open("ab").write(b"more"),
        lambda folder: next(folder.glob("embeddings-*")).unlink(),
        swap("items-*", b""),
        swap("items-*", b"\n" * 6),
        swap("items-*", b"\n" * 7),
        swap("items-*", b'{"name": "../../secret.png", "size": 1, "version": "1"}\n' * 7),
        swap("items-*", b'{"name": "/secret.png", "size": 1, "version": "1"}\n' * 7),
        swap("items-*", b'{"name": 5, "size": 1, "version": "1"}\n' * 7),
    ],
)
def test_a_damaged_index_is_one_line(pictures, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "index", pictures)
    damage(tmp_path / "index")
    with pytest.raises(UserError) as caught:
        Index.open(tmp_path / "index").items()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_shards_and_folder_give_the_same_embeddings(pictures, tmp_path):
    audio = [save_audio(tmp_path / "audio" / f"{number}.wav", number) for number in range(4)]
    names = sorted(path.relative_to(pictures) for path in pictures.rglob("*.png"))
    items = [
        Item(f"image{number}", "test", pictures / name, (Caption(f"{number}", audio[number % 4]),))
        for number, name in enumerate(names)
    ]
    write_shards(items, tmp_path / "shards", "toy", Format(short_side=256, quality=90), {})
    for modality, folder in (("image", pictures), ("audio", tmp_path / "audio")):
        shards = ShardSource(str(tmp_path / "shards"), "test", modality)
        update(tmp_path / f"s-{modality}", shards, EXPORT, device="cpu")
        update(tmp_path / f"f-{modality}", FileSource(str(folder), modality), EXPORT, device="cpu")
        of_shards, of_files = (Index.open(tmp_path / f"{kind}-{modality}") for kind in "sf")
        count = len(of_files)
        np.testing.assert_allclose(of_shards.embeddings[:count], of_files.embeddings, atol=1e-3)
        assert [len(of_shards), count] == ([7, 7] if modality == "image" else [7, 4])


def test_command_prints_and_dry_run_writes_nothing(pictures, tmp_path, capsys):
    arguments = [
        "--model",
        str(EXPORT),
        "--pictures",
        str(pictures),
        "--out",
        str(tmp_path / "index"),
        "--device",
        "cpu",
    ]
    command.main([*arguments, "--dry-run"])
    assert "7 new, 0 changed, 0 gone, 0 unchanged; 7 to encode" in capsys.readouterr().out
    assert not (tmp_path / "index").exists()
    command.main(arguments)
    assert "index: 7 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "/nowhere"], "/nowhere is not a folder"),
        (["--shards", "/nowhere"], "--shards and --split go together"),
        (["--shards", "/nowhere", "--split", "test"], "no shards in /nowhere"),
        (["--pictures", "/nowhere", "--captions"], "--captions is for --shards"),
        (["--pictures", "/", "--model", "/nowhere"], "--model /nowhere: no such folder"),
        (["--pictures", "/", "--model", "."], "holds no exported model"),
        ([], "one of the arguments --pictures --audio --shards is required"),
        (["--pictures", "/", "--workers", "0"], "at least 1"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        command.main(["--model", str(EXPORT), "--out", str(tmp_path / "index"), *arguments])
    assert "\n" not in str(caught.value)


def test_another_device_is_one_line(pictures, tmp_path):
    with pytest.raises(UserError, match="--device quantum"):
        update(tmp_path / "index", FileSource(str(pictures), "image"), EXPORT, device="quantum")
