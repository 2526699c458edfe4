import json

import numpy as np
import pytest

from shards import manifest
from shards.errors import UserError
from shards.manifest import ShardInfo, atomic, load, save


def columns():
    """Three samples with 2, 1 and 2 captions; the last is the twin of the first."""
    return {
        "key": [b"a", b"bcd", b"e"],
        "image_id": ["ä".encode(), b"bcd", b"e"],
        "shard": [0, 0, 1],
        "split": [0, 0, 1],
        "meta_offset": [512, 4096, 512],
        "meta_bytes": [10, 11, 12],
        "image_offset": [1536, 5120, 1536],
        "image_bytes": [100, 101, 2**40],
        "twin": [-1, -1, 0],
        "first_caption": [0, 2, 3, 5],
        "audio_offset": [1, 2, 3, 4, 5],
        "audio_bytes": [6, 7, 8, 9, 10],
        "duration": [0.5, 1.0, 1.5, 2.0, 2.5],
    }


SHARDS = [ShardInfo("train-000000.tar", 10240, "ab", 2), ShardInfo("test-000000.tar", 10240, "cd", 1)]


def write(folder):
    return save(folder, "table", SHARDS, ["train", "test"], columns(), {"root": "/data", "quality": 90})


def test_what_was_saved_is_loaded(tmp_path):
    write(tmp_path)
    loaded = load(tmp_path)
    assert loaded.shards == tuple(SHARDS)
    assert (loaded.corpus, loaded.splits, loaded.folder) == ("table", ("train", "test"), tmp_path)
    assert loaded.arguments == {"root": "/data", "quality": 90}
    for name, values in columns().items():
        assert getattr(loaded, name).tolist() == values, name
    assert {name: getattr(loaded, name).dtype.kind for name in ("key", "image_id")} == {"key": "S", "image_id": "S"}
    assert loaded.duration.dtype == np.float32
    assert loaded.shard.dtype == np.int32
    assert loaded.split.dtype == np.int8


def test_rows_and_captions(tmp_path):
    made = write(tmp_path)
    assert made.rows("train").tolist() == [0, 1]
    assert made.rows("test").tolist() == [2]
    assert [list(made.captions(n)) for n in range(3)] == [[0, 1], [2], [3, 4]]
    with pytest.raises(UserError, match=r"no split 'dev' .* it has train, test"):
        made.rows("dev")


def test_same_content_same_bytes_and_hash(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert write(tmp_path / "a").hash == write(tmp_path / "b").hash == load(tmp_path / "a").hash
    for name in (manifest.MANIFEST, manifest.INDEX):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("change", ["checksum", "duration"])
def test_other_content_other_hash(tmp_path, change):
    before = write(tmp_path).hash
    shards, values = list(SHARDS), columns()
    if change == "checksum":
        shards[1] = ShardInfo("test-000000.tar", 10240, "ce", 1)
    else:
        values["duration"][3] = 2.25
    assert save(tmp_path, "table", shards, ["train", "test"], values, {}).hash != before


def test_no_manifest_is_named_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"no shards in .*nothing \(no manifest.json\): make them with python toolkit"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifest(tmp_path, damage):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(tmp_path)


def test_index_of_another_manifest_is_refused(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "index.npz").read_bytes())
    data[300] ^= 1
    (tmp_path / "index.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"index\.npz is not the index"):
        load(tmp_path)
    (tmp_path / "index.npz").unlink()
    with pytest.raises(UserError, match=r"index\.npz is missing"):
        load(tmp_path)


def test_manifest_is_readable_json(tmp_path):
    write(tmp_path)
    head = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["name"] for shard in head["shards"]] == ["train-000000.tar", "test-000000.tar"]


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
