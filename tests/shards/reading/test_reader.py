"""Reading members: the bytes that were written, from a local or remote folder; errors name the shard."""

import errno
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest

from shards import remote
from shards.errors import TransientError, UserError
from shards.manifest import Manifest, load
from shards.reading import reader as module
from shards.reading.bad_samples import UnreadableSampleError
from shards.reading.cache import Cache
from shards.reading.reader import Reader
from tests.shards.media.noise import noise
from tests.shards.tars.stock_tars import members


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    noise(folder / "one", pictures=7, samples_per_shard=2)
    noise(folder / "two", pictures=4, captions=2, samples_per_shard=2, first=100)
    return folder


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


def everything(reader: Reader) -> dict[str, bytes]:
    """All pictures and captions, read by number, of all data sets; keys that two share get a number."""
    members_read = {}
    sample = row = 0
    for number, m in enumerate(reader.manifests):
        for local, key in enumerate(m.key):
            name = f"{number}/{key.decode()}"
            members_read[f"{name}.jpg"] = reader.picture(sample)
            for k in range(len(m.captions(local))):
                members_read[f"{name}.{k}.flac"] = reader.audio(row)
                row += 1
            sample += 1
    return members_read


def expected(*folders: Path) -> dict[str, bytes]:
    """The same, read by another library."""
    return {
        f"{number}/{name}": content
        for number, folder in enumerate(folders)
        for path in folder.glob("*.tar")
        for name, content in members(path).items()
        if not name.endswith("json")
    }


def test_members_of_two_data_sets_numbered_end_to_end(data: Path) -> None:
    reader = Reader(load(data / "one"), load(data / "two"))
    assert everything(reader) == expected(data / "one", data / "two")
    assert reader.meta(8)["captions"][1]["text"] == "text 1 1"
    assert reader.describe(8) == ("p1", str(data / "two" / "train-000000.tar"))
    for number in (-1, 11):
        with pytest.raises(IndexError):
            reader.picture(number)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "is truncated: .* bytes, .* in its manifest"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is changed: .* bytes, .* in its manifest"),
    ],
)
@pytest.mark.parametrize("far", [False, True])
def test_a_shard_that_is_not_the_one_of_the_manifest_is_named(data: Path, change, reason: str, far: bool) -> None:
    change(data / "one" / "train-000001.tar")
    reader = Reader(load(f"file://{data}/one" if far else data / "one"))
    assert len(reader.picture(0))
    with pytest.raises(UserError, match="is missing" if far and "No such" in reason else reason) as caught:
        reader.picture(2)
    assert "one/train-000001.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnreadableSampleError | TransientError)


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_does_not_respond_is_a_transient_error(
    data: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    reader = Reader(load(data / "one"))
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(TransientError, match=rf"one/train-000000\.tar: .*{os.strerror(code)}; check the disk"):
        reader.picture(0)


def test_a_shard_cut_while_it_is_open_is_named(data: Path) -> None:
    reader = Reader(load(data / "one"))
    reader.picture(0)
    os.truncate(data / "one" / "train-000000.tar", 600)
    with pytest.raises(UserError, match=r"train-000000\.tar is shorter"):
        reader.picture(1)


def test_a_giant_member_is_refused_before_it_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(load(data / "one"))
    monkeypatch.setattr(module, "MAX_MEMBER", int(reader.manifests[0].image_bytes[3]) - 1)
    monkeypatch.setattr(os, "pread", None)
    with pytest.raises(UnreadableSampleError, match="the limit is"):
        reader.picture(3)


def test_few_shards_are_open_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    reader = Reader(load(data / "one"))
    before = len(os.listdir("/proc/self/fd"))
    for sample in (0, 2, 4, 6, 0):
        reader.picture(sample)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_push_each_others_shards_out_read_the_right_bytes(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 1)
    reader = Reader(load(data / "one"))
    right = [Reader(load(data / "one")).picture(sample) for sample in range(7)]
    chance = np.random.default_rng(0).integers(0, 7, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for sample, picture in zip(chance, pool.map(reader.picture, chance), strict=True):
            assert picture == right[sample]


def test_a_forked_or_pickled_reader_opens_for_itself(data: Path) -> None:
    reader = Reader(load(data / "one"), cache=None)
    right = reader.picture(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._shards
    assert copy.picture(0) == right
    child = os.fork()
    if child == 0:
        same = reader.picture(0) == right and reader._process == os.getpid()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.picture(1), "the child closed what the parent has open"


def upload(folder: Path, name: str) -> str:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_remote_members_with_and_without_a_cache(data: Path, protocol: str, kept: bool) -> None:
    url = upload(data / "one", "set") if protocol == "memory" else f"file://{data}/one"
    reader = Reader(load(url), load(data / "two"), cache=Cache(data / "cache") if kept else None)
    assert everything(reader) == expected(data / "one", data / "two")
    assert len(list((data / "cache").glob("*.tar"))) == (4 if kept else 0)
    if kept:
        (data / "one" / "train-000000.tar").unlink()
        again = Reader(load(data / "one"), cache=Cache(data / "cache"))
        with pytest.raises(UserError, match="No such file"):
            again.picture(0)  # a local folder is not read through the cache
        assert Reader(reader.manifests[0], cache=Cache(data / "cache")).picture(0) == reader.picture(0)


class Shaky:
    """A file system that fails a number of times before it responds."""

    def __init__(self, failures: int, whole_files: bool = False) -> None:
        self.real, self.failures, self.whole_files = fsspec.filesystem("file"), failures, whole_files

    def size(self, path: str) -> int:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("connection\nreset by peer")
        return self.real.size(path)

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        return self.real.cat_file(path) if self.whole_files else self.real.cat_file(path, start, end)


def shaky(manifest: Manifest, system: Shaky) -> Reader:
    reader = Reader(manifest)
    reader._remotes[0]._filesystem = (system, str(manifest.url).removeprefix("file://"))
    reader._remotes[0]._process = os.getpid()
    return reader


def test_failed_requests_are_retried(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    manifest = load(f"file://{data}/one")
    right = Reader(load(data / "one")).picture(0)
    assert shaky(manifest, Shaky(4)).picture(0) == right
    assert slept == [1.0, 5.0, 20.0, 60.0]
    with pytest.raises(
        TransientError, match=r"train-000000\.tar cannot be read after 5 attempts: connection reset by peer"
    ):
        shaky(manifest, Shaky(5)).picture(0)


def test_a_server_that_sends_complete_files_is_named(data: Path) -> None:
    with pytest.raises(UserError, match=r"does not support range requests: set --data\.cache"):
        shaky(load(f"file://{data}/one"), Shaky(0, whole_files=True)).picture(0)


class Ranges(SimpleHTTPRequestHandler):
    """A file server that knows ranges, as object stores do."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().do_GET()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        content = path.read_bytes()
        piece = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)
        return None


@pytest.fixture
def server(data: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(data))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("kept", [False, True])
def test_shards_on_a_web_server(data: Path, server: str, kept: bool) -> None:
    pytest.importorskip("aiohttp")
    reader = Reader(load(f"{server}/one"), cache=Cache(data / "cache") if kept else None)
    assert everything(reader) == expected(data / "one")
    child = os.fork()  # where the parent's connections must not be used
    if child == 0:
        right = everything(Reader(load(data / "one")))
        os._exit(0 if everything(reader) == right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (data / "one" / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=rf"{server}/one/train-000000\.tar is missing"):
        Reader(load(f"{server}/one")).picture(0)
