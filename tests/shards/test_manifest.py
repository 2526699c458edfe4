import errno
import hashlib
import json
from unittest.mock import Mock

import numpy as np
import pytest

from shards import manifest
from shards.errors import UserError
from shards.files import atomic_write
from shards.manifest import ShardInfo, load, save


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
        "image_bytes": [100, 101, 2**40],  # more than 32 bits hold
        "twin": [-1, -1, 0],
        "first_caption": [0, 2, 3, 5],
        "audio_offset": [1, 2, 3, 4, 5],
        "audio_bytes": [6, 7, 8, 9, 10],
        "duration": [0.5, 1.0, 1.5, 2.0, 2.5],
    }


SHARDS = [ShardInfo("train-000000.tar", 10240, "ab" * 32, 2), ShardInfo("test-000000.tar", 2**41, "cd" * 32, 1)]


def write(folder, shards=SHARDS, **changed):
    return save(folder, "table", shards, ["train", "test"], columns() | changed, {"root": "/data", "quality": 90})


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
        shards[1] = ShardInfo("test-000000.tar", 2**41, "ce" * 32, 1)
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("splits", ["train", None]),
        ("splits", ["train", 7]),
        ("splits", ["train", "train"]),
        ("splits", ["train", "te\x1b[2Jst"]),
        ("splits", ["train", "a b"]),
        ("splits", ["train", "test\n"]),
        ("splits", None),
        ("arguments", []),
        ("corpus", 7),
        ("hash", None),
        ("shards", [7]),
        ("shards", {"a": 1}),
        ("format", "\x1b[2J\n"),
    ],
)
def test_invalid_values_of_the_manifest_are_refused(tmp_path, name, value):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        load(tmp_path)
    assert str(caught.value).isprintable()


def test_an_index_without_permission_is_named(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(manifest, "file_sha256", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=r"index\.npz cannot be read: Permission denied"):
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


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "a/b.tar", "..", ".a.tar", "a.tar\n", "a", "a\\b.tar", 7])
def test_a_shard_outside_of_the_folder_is_refused(tmp_path, name):
    write(tmp_path, [ShardInfo(name, 10240, "ab" * 32, 2), SHARDS[1]])
    with pytest.raises(UserError, match=r"names a shard|is damaged") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        ShardInfo("a.tar", 10240, "../../etc", 2),
        ShardInfo("a.tar", -1, "ab" * 32, 2),
        ShardInfo("a.tar", 2**70, "ab" * 32, 2),
        ShardInfo("a.tar", 1.5, "ab" * 32, 2),
        ShardInfo("test-000000.tar", 10240, "ab" * 32, 2),
        ShardInfo("a.tar", 10240, "ab" * 32, 3),
    ],
)
def test_an_invalid_shard_is_refused(tmp_path, shard):
    write(tmp_path, [shard, SHARDS[1]])
    with pytest.raises(UserError, match=r"shard a\.tar|a shard twice|do not match the shards"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("image_offset", [1536, 10140, 1536], r"\(image\) lies outside of shard train-000000\.tar"),
        ("image_offset", [-1, 5120, 1536], "lies outside"),
        ("image_offset", [1536, 5120, 2**62], "outside of shard test-000000"),
        ("image_bytes", [100, -1, 12], "lies outside"),
        ("meta_bytes", [10, 2**63 - 1, 12], "lies outside"),
        ("audio_offset", [1, 2, 10240, 4, 5], "lies outside"),
        ("audio_bytes", [6, 7, 10238, 9, 10], "lies outside"),
        ("shard", [0, 0, 2], "column shard"),
        ("shard", [-1, 0, 1], "column shard"),
        ("shard", [0, 1, 0], "do not match the shards"),
        ("split", [0, 0, 2], "column split"),
        ("split", [0, 1, 1], "are not contiguous"),
        ("twin", [-1, -1, 3], "column twin"),
        ("twin", [-2, -1, 0], "column twin"),
        ("first_caption", [0, 2, 3, 6], "first_caption"),
        ("first_caption", [1, 2, 3, 5], "first_caption"),
        ("first_caption", [0, 4, 3, 5], "first_caption"),
        ("first_caption", [0, 2, 5], "3 rows"),
        ("duration", [0.5, 1.0, float("nan"), 2.0, 2.5], "durations must be finite"),
        ("duration", [0.5, 1.0, -1.0, 2.0, 2.5], "durations must be finite"),
        ("audio_bytes", [6, 7, 8, 9], "4 rows"),
        ("key", [b"a", b"b"], r"rows|not those"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, column, values, reason):
    write(tmp_path, **{column: values})
    with pytest.raises(UserError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_split_in_two_pieces_is_refused(tmp_path):
    shards = [ShardInfo(f"{n}.tar", 2**41, "ab" * 32, 1) for n in range(3)]
    write(tmp_path, shards, shard=[0, 1, 2], split=[0, 1, 0])
    with pytest.raises(UserError, match="are not contiguous"):
        load(tmp_path)


def rehash(folder):
    """Make the manifest agree with an index that was changed."""
    head = json.loads((folder / "manifest.json").read_text())
    head["index"]["sha256"] = hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(head))


def arrays():
    return {name: np.asarray(values, dtype=manifest.COLUMNS[name]) for name, values in columns().items()}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: np.savez(path, **arrays() | {"key": np.array([{}, 1, 2], dtype=object)}),
        lambda path: np.savez_compressed(path, **arrays()),
        lambda path: np.savez(path, **arrays() | {"shard": np.asarray(columns()["shard"], dtype="f8")}),
        lambda path: path.write_bytes(b"no zip at all"),
    ],
    ids=["pickle", "compressed", "other types", "no zip"],
)
def test_a_malicious_index_is_refused(tmp_path, spoil):
    write(tmp_path)
    spoil(tmp_path / "index.npz")
    rehash(tmp_path)
    with pytest.raises(UserError, match=r"index\.npz"):
        load(tmp_path)


def test_remote_manifest(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    made = write(tmp_path)
    memory = fsspec.filesystem("memory")
    for name in (manifest.MANIFEST, manifest.INDEX):
        memory.pipe_file(f"/bucket/set/{name}", (tmp_path / name).read_bytes())
    loaded = load("memory://bucket/set/")
    assert (loaded.url, loaded.location, loaded.hash) == ("memory://bucket/set",) * 2 + (made.hash,)
    assert loaded.audio_bytes.tolist() == columns()["audio_bytes"]
    by_file = load(f"file://{tmp_path}")
    assert (by_file.url, by_file.hash) == (f"file://{tmp_path}", made.hash)
    with pytest.raises(UserError, match=r"no split 'dev' in memory://bucket/set"):
        loaded.rows("dev")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/nothing", r"memory://bucket/nothing/manifest\.json is missing"),
        ("nosuch://bucket/a", r"nosuch://bucket/a/manifest\.json cannot be read: .*nosuch"),
    ],
)
def test_remote_manifest_that_cannot_be_read_is_named(url, reason):
    with pytest.raises(UserError, match=reason):
        load(url)


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
