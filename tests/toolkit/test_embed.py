"""Embeddings as files: inputs of all kinds, order, resuming, unreadable files."""

import csv
import json
import logging
import sys

import numpy as np
import pytest
import torch

from shards.errors import UserError
from shards.manifest import load
from tests.toolkit.indexing_files import EXPORT, hostile_files, save_audio, save_image, save_images
from toolkit import embed as command
from toolkit.indexing.encoder import Encoder
from toolkit.indexing.items import read_table


def embed(out, *arguments):
    """Run the command; returns names and embeddings."""
    command.main(
        [*map(str, arguments), "--model", str(EXPORT), "--out", str(out), "--device", "cpu", "--batch-size", "2"]
    )
    with out.with_suffix(".csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["name"]
    array = np.load(out, allow_pickle=False)
    assert array.dtype == np.float32
    assert not out.with_name(out.name + ".unfinished").exists()
    return [name for (name,) in rows], array


def features(images=None, speech=None):
    encoder = Encoder.load(EXPORT, "cpu")
    inputs = encoder.processor(images=images, speech=speech)
    with torch.no_grad():
        if images:
            return encoder.model.get_image_features(**inputs).numpy()
        return encoder.model.get_audio_features(**inputs).numpy()


def test_files_keep_their_order(tmp_path):
    files = [str(save_image(tmp_path / f"{number}.jpg", number)) for number in (3, 1, 2)]
    names, array = embed(tmp_path / "out.npy", *files, files[0])
    assert names == files
    np.testing.assert_allclose(array, features(images=files), atol=1e-5)


def test_a_folder_and_unreadable_files(tmp_path, capsys):
    pictures = save_images(tmp_path / "pictures")
    hostile_files(pictures)
    names, array = embed(tmp_path / "out.npy", pictures)
    assert names == ["0.png", "2.png", "4.png", "6.png", "sub/1.png", "sub/3.png", "sub/5.png"]
    np.testing.assert_allclose(array, features(images=[pictures / name for name in names]), atol=1e-5)
    assert "7 images, 5 left out" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_table_of_audio(tmp_path, ending):
    files = [save_audio(tmp_path / "audio" / f"{number}.wav", number) for number in range(5)]
    names = [f"audio/{number}.wav" for number in (4, 0, 2)]
    table = tmp_path / f"table.{ending}"
    if ending == "csv":
        table.write_text("image,audio\n" + "".join(f"x.jpg,{name}\n" for name in names))
    else:
        table.write_text("".join(json.dumps({"audio": name}) + "\n" for name in names))
    found, array = embed(tmp_path / "out.npy", table, "--modality", "audio")
    assert found == names
    np.testing.assert_allclose(array, features(speech=[files[4], files[0], files[2]]), atol=1e-5)


def test_shards(folder, tmp_path):
    names, array = embed(tmp_path / "out.npy", "--shards", folder, "--split", "test", "--modality", "audio")
    manifest = load(folder)
    assert len(names) == len(array) == sum(len(manifest.captions(sample)) for sample in manifest.rows("test"))
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)


def test_long_and_short_audio_do_not_depend_on_the_batch(tmp_path):
    files = [save_audio(tmp_path / f"{number}.wav", number) for number in range(6)]
    encoder = Encoder.load(EXPORT, "cpu")
    waves = [encoder.processor(speech=[file])["waveforms"][0] for file in files]
    waves[2] = waves[2].repeat(60)  # longer than a batch's budget
    singly = torch.cat([encoder.embed("audio", [wave]) for wave in waves])
    torch.testing.assert_close(encoder.embed("audio", waves), singly, atol=1e-5, rtol=0)


def test_a_killed_run_continues(tmp_path, monkeypatch, caplog):
    pictures = save_images(tmp_path / "pictures")
    calls = []
    original = Encoder.embed

    def fail(self, *rest):
        calls.append(len(rest[1]))
        if len(calls) == 3:
            raise SystemError("killed")
        return original(self, *rest)

    monkeypatch.setattr(Encoder, "embed", fail)
    with pytest.raises(SystemError):
        embed(tmp_path / "out.npy", pictures)
    assert not (tmp_path / "out.npy").exists()
    caplog.set_level(logging.INFO)
    names, array = embed(tmp_path / "out.npy", pictures)
    assert "continuing: 4 were encoded before" in caplog.text
    assert calls == [2, 2, 2, 2, 1]
    np.testing.assert_allclose(array, features(images=[pictures / name for name in names]), atol=1e-5)


def test_dry_run_writes_nothing(tmp_path, capsys):
    pictures = save_images(tmp_path / "pictures")
    command.main([str(pictures), "--model", str(EXPORT), "--out", str(tmp_path / "out.npy"), "--dry-run"])
    assert "7 of 7 images to encode" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow"):
        command.main([str(tmp_path), "--model", str(EXPORT), "--out", str(tmp_path / "out.parquet")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.jpg", "--out", "out.txt"], "has to end in"),
        (["x.jpg", "--out", "nowhere/out.npy"], "not a file in an existing folder"),
        (["--out", "out.npy"], "expected files, a folder or a table"),
        (["x.jpg", "--shards", "y", "--split", "test", "--out", "out.npy"], "expected files, a folder or a table"),
        ([".", "x.jpg", "--out", "out.npy"], "one folder or one table alone"),
        (["text.jpg", "--out", "out.npy"], "none of the images can be used"),
        (["missing.jpg", "--out", "out.npy"], "no images in"),
        (["bad.csv", "--out", "out.npy"], "row 1 has no image"),
        (["missing.csv", "--out", "out.npy"], "missing.csv cannot be read"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "bad.csv").write_text("audio\nx.wav\n")
    with pytest.raises(UserError, match=message) as caught:
        command.main([*arguments, "--model", str(EXPORT)])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "text.jpg"]


@pytest.mark.parametrize(
    "content",
    [b"image\n\xff\n", b'image\n"x\n', b"[" * 100_000, b"[1]\n", b"5\n", b"image\n\n", b""],
    ids=["not UTF-8", "quote", "deep", "list", "number", "empty row", "empty"],
)
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_damaged_tables_are_one_line(tmp_path, content, ending):
    table = tmp_path / f"table{ending}"
    table.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(table, "image")
    assert "\n" not in str(caught.value)
