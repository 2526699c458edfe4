"""The cache: shared by processes, always bounded, and consistent after kills and full disks."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest

from shards.errors import UserError
from shards.manifest import ShardInfo
from shards.reading import cache as module
from shards.reading.cache import Cache
from shards.remote import Remote

SIZE = 200_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    """Remote shards of 200 kB each."""
    (tmp_path / "remote").mkdir()
    infos = []
    for number in range(8):
        content = content_of(number)
        (tmp_path / "remote" / f"train-{number:06d}.tar").write_bytes(content)
        infos.append(ShardInfo(f"train-{number:06d}.tar", SIZE, hashlib.sha256(content).hexdigest(), 1))
    return infos


def content_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def far(tmp_path: Path) -> Remote:
    return Remote(f"file://{tmp_path}/remote")


def cached_bytes(folder: Path) -> int:
    """Bytes that a cache takes."""
    total = 0
    for path in list(folder.iterdir()):
        with suppress(FileNotFoundError):  # given up
            total += path.stat().st_size
    return total


def within_bound(cache: Cache) -> bool:
    with cache._locked():  # no file changes its name meanwhile
        return cached_bytes(cache.folder) <= cache.bound


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def read_at_random(tmp_path: Path, shards: list[ShardInfo], seed: int, turns: int) -> None:
    cache, chance = Cache(tmp_path / "cache", 3.5 * SIZE / 1e9), np.random.default_rng(seed)
    open_ones: list[int] = []
    for _ in range(turns):
        number = int(chance.integers(len(shards)))
        descriptor = cache.open(far(tmp_path), shards[number])
        if descriptor is None:
            continue
        assert within_bound(cache), "the bound was passed"
        assert os.pread(descriptor, SIZE + 1, 0) == content_of(number)
        open_ones.append(descriptor)
        while len(open_ones) > 1:
            os.close(open_ones.pop(0))


def test_processes_share_a_bounded_cache(tmp_path: Path, shards: list[ShardInfo]) -> None:
    readers = [FORK.Process(target=read_at_random, args=(tmp_path, shards, seed, 150)) for seed in range(4)]
    for reader in readers:
        reader.start()
    cache = Cache(tmp_path / "cache", 3.5 * SIZE / 1e9)
    while any(reader.is_alive() for reader in readers):
        assert within_bound(cache), "the bound was passed"
        time.sleep(0.01)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert len(names(tmp_path / "cache")) == 3, "it does not use what it may"
    assert all(name.endswith(".tar") for name in names(tmp_path / "cache"))


def slow_open(tmp_path: Path, info: ShardInfo, begun: Event, seconds: float) -> None:
    """Download a shard in four pieces with pauses, and signal when the first is written."""

    def blocks(self: Remote, name: str):
        with (tmp_path / "fetches").open("a") as log:
            log.write(f"{os.getpid()}\n")
        content = (tmp_path / "remote" / name).read_bytes()
        for start in range(0, SIZE, SIZE // 4):
            yield content[start : start + SIZE // 4]
            begun.set()
            time.sleep(seconds / 4)

    Remote.blocks = blocks  # type: ignore[method-assign]
    descriptor = Cache(tmp_path / "cache").open(far(tmp_path), info)
    assert os.pread(descriptor, SIZE + 1, 0) == (tmp_path / "remote" / info.name).read_bytes()
    time.sleep(seconds)  # with the shard open, for which other processes must not wait


def test_one_process_fetches_while_the_others_wait(tmp_path: Path, shards: list[ShardInfo]) -> None:
    begun = FORK.Event()
    processes = [FORK.Process(target=slow_open, args=(tmp_path, shards[0], begun, 0.4)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 5
    assert len((tmp_path / "fetches").read_text().split()) == 1
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.tar"}


def test_waiting_processes_do_not_wait_until_the_shard_is_closed(tmp_path: Path, shards: list[ShardInfo]) -> None:
    begun = FORK.Event()
    first = FORK.Process(target=slow_open, args=(tmp_path, shards[0], begun, 2.0))
    first.start()
    assert begun.wait(10)
    (tmp_path / "fetches").unlink()
    start, busy = time.monotonic(), time.process_time()
    descriptor = Cache(tmp_path / "cache").open(far(tmp_path), shards[0])  # 2 s of fetching, then 2 s held open
    assert time.monotonic() - start < 3
    assert time.process_time() - busy < 0.5, "it waited by asking again and again"
    assert os.pread(descriptor, SIZE, 0) == content_of(0)
    assert first.is_alive()
    assert not (tmp_path / "fetches").exists(), "fetched again"
    first.kill()
    first.join()
    os.close(descriptor)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_killed_download_blocks_no_process_and_leaves_nothing(
    tmp_path: Path, shards: list[ShardInfo], waiting: bool
) -> None:
    begun, unused = FORK.Event(), FORK.Event()
    victim = FORK.Process(target=slow_open, args=(tmp_path, shards[0], begun, 60.0))
    victim.start()
    assert begun.wait(10)
    heir = FORK.Process(target=slow_open, args=(tmp_path, shards[0], unused, 0.1))
    if waiting:
        heir.start()
        time.sleep(0.3)
        assert not unused.is_set(), "two download the same shard at once"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.part"} or waiting
    if not waiting:
        heir.start()
    heir.join(10)
    assert heir.exitcode == 0
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.tar"}


def test_the_part_of_a_killed_download_is_removed(tmp_path: Path, shards: list[ShardInfo]) -> None:
    cache = Cache(tmp_path / "cache", 2.5 * SIZE / 1e9)
    for info in shards[:2]:
        (tmp_path / "cache" / f"{info.sha256}.part").write_bytes(b"half" * 40_000)
    (tmp_path / "cache" / "a note of the user.part").write_text("is not ours")
    os.close(cache.open(far(tmp_path), shards[2]))
    assert names(tmp_path / "cache") == {f"{shards[2].sha256}.tar", "a note of the user.part"}


def test_the_least_recently_opened_shard_is_evicted_first(tmp_path: Path, shards: list[ShardInfo]) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE / 1e9)
    for number in (0, 1, 2, 0, 3):
        os.close(cache.open(far(tmp_path), shards[number]))
        time.sleep(0.02)
    assert names(tmp_path / "cache") == {f"{shards[number].sha256}.tar" for number in (2, 0, 3)}


def test_open_shards_stay_and_a_shard_without_room_is_warned_of_once(tmp_path: Path, shards: list[ShardInfo]) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE / 1e9)
    first, second = (cache.open(far(tmp_path), shards[number]) for number in (0, 1))
    assert cache.open(far(tmp_path), shards[2]) is None
    assert cache.open(far(tmp_path), shards[3]) is None
    assert len(cache.warnings) == 1
    assert "read over the network" in cache.warnings[0]
    assert os.pread(first, SIZE, 0) == content_of(0)
    os.close(first)
    os.close(cache.open(far(tmp_path), shards[2]))
    assert os.pread(second, SIZE, 0) == content_of(1)
    assert names(tmp_path / "cache") == {f"{shards[number].sha256}.tar" for number in (1, 2)}


def test_a_shard_that_came_just_before_it_was_claimed_is_not_fetched_again(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = Cache(tmp_path / "cache"), module._open_complete
    os.close(cache.open(far(tmp_path), shards[0]))
    (tmp_path / "remote" / shards[0].name).unlink()
    answers = iter([lambda path: None])  # it is not there yet when it is looked for first
    monkeypatch.setattr(module, "_open_complete", lambda path: next(answers, real)(path))
    os.close(cache.open(far(tmp_path), shards[0]))
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.tar"}


def test_a_shard_that_goes_just_before_it_is_locked_is_fetched_again(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = Cache(tmp_path / "cache"), fcntl.flock
    os.close(cache.open(far(tmp_path), shards[0]))
    complete = tmp_path / "cache" / f"{shards[0].sha256}.tar"

    def flock(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_SH:
            complete.unlink()
            monkeypatch.setattr(fcntl, "flock", real)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = cache.open(far(tmp_path), shards[0])
    assert os.fstat(descriptor).st_nlink == 1, "it holds a file that is not in the cache and is not counted"
    os.close(descriptor)


def test_what_a_killed_download_left_is_not_counted_beside_the_next_one(
    tmp_path: Path, shards: list[ShardInfo]
) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE / 1e9)
    os.close(cache.open(far(tmp_path), shards[0]))
    (tmp_path / "cache" / f"{shards[1].sha256}.part").write_bytes(bytes(SIZE))
    os.close(cache.open(far(tmp_path), shards[1]))
    assert names(tmp_path / "cache") == {f"{info.sha256}.tar" for info in shards[:2]}


def test_a_shard_larger_than_the_cache_evicts_none(tmp_path: Path, shards: list[ShardInfo]) -> None:
    cache = Cache(tmp_path / "cache", 1.5 * SIZE / 1e9)
    os.close(cache.open(far(tmp_path), shards[0]))
    giant = ShardInfo("train-000001.tar", 2 * SIZE, "ab" * 32, 1)
    assert cache.open(far(tmp_path), giant) is None
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.tar"}


class SmallDisk:
    """A disk of so many bytes, of which the cache has all."""

    def __init__(self, folder: Path, size: int, code: int = errno.ENOSPC) -> None:
        self.folder, self.size, self.code, self.real = folder, size, code, os.posix_fallocate

    def __call__(self, descriptor: int, offset: int, length: int) -> None:
        if cached_bytes(self.folder) + length > self.size:
            os.ftruncate(descriptor, length // 2)  # as file systems leave it
            raise OSError(self.code, os.strerror(self.code))
        self.real(descriptor, offset, length)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_evicts_old_shards_and_then_disables_the_cache(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(os, "posix_fallocate", SmallDisk(tmp_path / "cache", 2 * SIZE, code))
    for number in range(3):
        os.close(cache.open(far(tmp_path), shards[number]))
        time.sleep(0.02)
    assert names(tmp_path / "cache") == {f"{shards[number].sha256}.tar" for number in (1, 2)}
    assert not cache.warnings
    kept = [cache.open(far(tmp_path), shards[number]) for number in (1, 2)]
    assert cache.open(far(tmp_path), shards[3]) is None
    assert len(cache.warnings) == 1
    assert names(tmp_path / "cache") == {f"{shards[number].sha256}.tar" for number in (1, 2)}
    for descriptor in kept:
        os.close(descriptor)


def test_a_disk_that_is_full_in_the_middle_of_a_download(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.EOPNOTSUPP, "not supported")))
    os.close(cache.open(far(tmp_path), shards[0]))
    monkeypatch.setattr(module.os, "write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    start = time.monotonic()
    assert cache.open(far(tmp_path), shards[1]) is None
    assert time.monotonic() - start < 0.5, "the network was asked again though the disk failed"
    assert len(cache.warnings) == 1
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.tar"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (content_of(0)[:-1], "199,999 bytes, not the 200,000 of its manifest"),
        (content_of(0) + b"x", "more than the 200,000 bytes"),
        (content_of(1), "not the checksum"),
        (None, "is missing"),
    ],
)
def test_a_remote_shard_that_is_not_the_one_of_the_manifest(
    tmp_path: Path, shards: list[ShardInfo], content: bytes | None, reason: str
) -> None:
    path = tmp_path / "remote" / shards[0].name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    cache = Cache(tmp_path / "cache")
    for fetch in (cache.open, cache.prefetch):
        with pytest.raises(UserError, match=reason) as caught:
            fetch(far(tmp_path), shards[0])
        assert f"file://{path}" in str(caught.value)
        assert names(tmp_path / "cache") == set()


def test_prefetch_does_not_wait_for_another_process(tmp_path: Path, shards: list[ShardInfo]) -> None:
    begun = FORK.Event()
    other = FORK.Process(target=slow_open, args=(tmp_path, shards[0], begun, 60.0))
    other.start()
    assert begun.wait(10)
    cache, start = Cache(tmp_path / "cache"), time.monotonic()
    cache.prefetch(far(tmp_path), shards[0])
    cache.prefetch(far(tmp_path), shards[1])
    assert time.monotonic() - start < 5
    assert names(tmp_path / "cache") == {f"{shards[0].sha256}.part", f"{shards[1].sha256}.tar"}
    other.kill()
    other.join()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_for_another_name_is_warned_of_once(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache, real = Cache(tmp_path / "cache"), os.open

    def without_room(path: Path, flags: int, *mode: int) -> int:
        if str(path).endswith(".part"):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", without_room)
    cache.prefetch(far(tmp_path), shards[0])
    assert cache.open(far(tmp_path), shards[0]) is None
    assert cache.open(far(tmp_path), shards[1]) is None
    assert len(cache.warnings) == 1
    assert "read over the network" in cache.warnings[0]


def test_a_cache_that_was_removed_meanwhile_is_named(tmp_path: Path, shards: list[ShardInfo]) -> None:
    cache = Cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    for fetch in (cache.open, cache.prefetch):
        with pytest.raises(UserError, match=r"--data\.cache .*cache cannot be used: No such file"):
            fetch(far(tmp_path), shards[0])


@pytest.mark.parametrize(("module", "name"), [(os, "utime"), (fcntl, "flock"), (os, "open"), (os, "ftruncate")])
def test_errors_of_the_folder_are_one_line(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(module, name, Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=r"--data\.cache .*cache cannot be used: Permission denied"):
        cache.open(far(tmp_path), shards[0])


def test_a_part_that_cannot_be_removed_blocks_no_process(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    with monkeypatch.context() as broken:
        for owner, name in ((Path, "unlink"), (os, "rename")):
            broken.setattr(owner, name, Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(UserError, match="Read-only file system"):
            cache.prefetch(far(tmp_path), shards[0])
    os.close(cache.open(far(tmp_path), shards[0]))


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data\.cache .*file/cache cannot be used: Not a directory"):
        Cache(tmp_path / "file" / "cache")
