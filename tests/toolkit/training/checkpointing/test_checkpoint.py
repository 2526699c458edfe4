"""Checkpoints: damage, failed saves, and no unpickling."""

import json
import math
import os
import pickle
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shards.errors import UserError
from shards.files import file_sha256
from tests.distributed import run_ranks
from tests.toolkit.training.log_lines import collect_lines
from tests.toolkit.training.zero import test_state
from toolkit.config import schema as config


def marker(folder: Path, **changed: Any) -> Path:
    """A marker with some values changed."""
    values = {"format": 2, "step": 3, "applied_steps": 3, "config": "", "data": [], "best": -1.0}
    listed = [{"name": "shared.safetensors", "bytes": 1, "sha256": ""}]
    (folder / "progress.json").write_text(json.dumps(values | {"files": listed} | changed))
    return folder


@pytest.mark.parametrize("name", ["step", "applied_steps", "best", "best_step", "seconds", "restarts"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -2])
def test_a_marker_with_impossible_numbers_is_damaged(tmp_path: Path, name: str, value: float) -> None:
    from toolkit.training.checkpointing.progress import Marker, read_marker

    assert isinstance(read_marker(marker(tmp_path)), Marker)
    actual = read_marker(marker(tmp_path, **{name: value}))
    if (name, value) not in (("best", -2), ("seconds", -2)):
        assert actual == "progress.json is damaged"


def engine_and_queue(world_size: int, zero: int = 1) -> tuple[Any, Any]:
    from toolkit.training.queue import EmbeddingQueue
    from toolkit.training.zero.engine import make_engine

    made = test_state.settings(world_size, zero, "fp32", "none")
    return make_engine(test_state.Small(), made, world_size, torch.device("cpu")), EmbeddingQueue(6, 2)


def checkpoints(run: Path, rank: int, world_size: int, keep: int = 9, data: str = "data", **options: Any) -> Any:
    from toolkit.training.checkpointing.checkpoint import Checkpoints

    settings = config.Config(training=config.Training(keep_checkpoints=keep))
    return Checkpoints(run, settings, [data], rank, world_size, **options)


def truncated(folder: Path) -> None:
    os.truncate(folder / "fragments-00001.safetensors", 500)


def missing(folder: Path) -> None:
    (folder / "fragments-00001.safetensors").unlink()


def flipped(folder: Path) -> None:
    path = folder / "fragments-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def unmarked(folder: Path) -> None:
    (folder / "progress.json").unlink()


def cut_marker(folder: Path) -> None:
    os.truncate(folder / "progress.json", 100)


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["EVIL"]),)


def pickled(folder: Path) -> None:
    """A pickle in place of a file, with a marker that agrees, and others under the names that DeepSpeed uses."""
    for name in ("fragments-00000.safetensors", "shared.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
        listed(folder, name, name)
    for name in ("latest", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "progress.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil()))


def outside(folder: Path) -> None:
    """A marker that names a file elsewhere."""
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "shared.safetensors").read_bytes())
    listed(folder, "shared.safetensors", "../elsewhere.safetensors")


def listed(folder: Path, name: str, instead: str) -> None:
    marker = json.loads((folder / "progress.json").read_text())
    path = folder / instead
    entry = {"name": instead, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    marker["files"] = [entry if info["name"] == name else info for info in marker["files"]]
    (folder / "progress.json").write_text(json.dumps(marker))


DAMAGES = {
    truncated: "fragments-00001.safetensors has 500 bytes instead of",
    missing: "fragments-00001.safetensors is missing",
    flipped: "fragments-00000.safetensors has another checksum than when it was written",
    unmarked: "progress.json is missing",
    cut_marker: "progress.json is damaged",
    pickled: "is not a safetensors file",
    outside: "'../elsewhere.safetensors' is no file of a checkpoint",
}


def resume_damaged(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save steps 1 and 2, damage the second in every way, resume each time; then damage both."""
    import torch.distributed as dist

    from toolkit.training.checkpointing.progress import Progress

    complete = folder / "complete"
    engine, queue = engine_and_queue(world_size)
    saving = checkpoints(complete, rank, world_size)
    for step in (1, 2):
        queue.push(torch.full((1, 2), float(step)), torch.zeros(1, 2), torch.tensor([step]))
        saving.save(engine, None, queue, Progress(step=step))
    saving.wait()
    seen: dict[str, Any] = {}
    for damage in [None, *DAMAGES]:
        run = folder / (damage.__name__ if damage else "none")
        if rank == 0:
            shutil.copytree(complete, run)
            if damage:
                damage(run / "checkpoints" / "step-00000002")
        dist.barrier()
        engine, queue = engine_and_queue(world_size)
        resuming = checkpoints(run, rank, world_size)
        lines = collect_lines()
        progress = resuming.maybe_load_latest(engine, None, queue)
        seen[run.name] = (progress.step, progress.restarts, queue.ids.max().item(), list(lines))
    seen["other data"] = caught(
        lambda: checkpoints(complete, rank, world_size, data="x").maybe_load_latest(engine, None, queue)
    )
    if rank == 0:
        truncated(folder / "missing" / "checkpoints" / "step-00000001")
    dist.barrier()
    seen["all"] = caught(
        lambda: checkpoints(folder / "missing", rank, world_size).maybe_load_latest(engine, None, queue)
    )
    return seen


def caught(work: Callable[[], Any]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.timeout(120)
def test_a_damaged_checkpoint_is_skipped_and_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    pickle.loads(pickle.dumps(Evil()))
    (tmp_path / "evil").unlink()  # it works
    first, second = run_ranks(resume_damaged, 2, tmp_path, timeout=100)
    assert not (tmp_path / "evil").exists()
    assert first["none"] == (2, 1, 2, [])
    for damage, line in DAMAGES.items():
        step, restarts, newest_key, lines = first[damage.__name__]
        assert (step, restarts, newest_key) == (1, 1, 1), damage.__name__
        assert len(lines) == 1
        assert lines[0].startswith(f"checkpoint {tmp_path}/{damage.__name__}/checkpoints/step-00000002 is skipped: ")
        assert line in lines[0]
        assert second[damage.__name__][:3] == (1, 1, 1)
    assert "was trained on other data" in first["other data"]
    assert "was trained on other data" in second["other data"]
    assert first["all"].startswith("no checkpoint in ")
    assert first["all"] == second["all"]


def save_badly(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save while the disk takes nothing more on rank 1, while a rank is slow, and then as usual."""
    import torch.distributed as dist

    from toolkit.training.checkpointing import checkpoint
    from toolkit.training.checkpointing.files import named_tensors
    from toolkit.training.checkpointing.progress import Progress
    from toolkit.training.zero.state import fragments

    engine, queue = engine_and_queue(world_size)
    saving = checkpoints(folder, rank, world_size, keep=2)
    lines = collect_lines()
    seen: dict[str, Any] = {}

    def save(step: int) -> None:
        saving.save(engine, None, queue, Progress(step=step, best_step=min(step, 2)))

    def there() -> list[str]:
        dist.barrier()
        return sorted(path.name for path in (folder / "checkpoints").iterdir())

    save(1)
    saving.wait()
    seen["first"] = there()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    save(2)
    saving.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    seen["full"], seen["line"] = there(), list(lines)

    write, go_on = checkpoint.write_tensors, threading.Event()
    if rank == 1:
        checkpoint.write_tensors = lambda *args: (go_on.wait(), write(*args))[1]
    local_fragments = fragments(engine)
    before = {name: tensor.clone() for each in local_fragments for name, tensor in named_tensors(each).items()}
    save(2)  # returns although rank 1 writes nothing yet
    for each in local_fragments:
        each.master.add_(1.0)  # training goes on
    if rank == 0:
        saving._pending.written.result()
        time.sleep(3 * checkpoint._POLL_INTERVAL)
        seen["slow, marked"] = saving._pending.completed.done()
    seen["slow"] = [name for name in there() if not name.startswith(".")]
    go_on.set()
    for step in (3, 4, 5):
        save(step)
    saving.wait()
    seen["last"], seen["lines"] = there(), lines
    saved = load_file(folder / "checkpoints" / "step-00000002" / f"fragments-{rank:05d}.safetensors")
    seen["kept"] = all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    return seen


@pytest.mark.timeout(120)
def test_a_save_that_fails_or_lags_is_never_marked_and_the_next_one_is(tmp_path: Path) -> None:
    first, second = run_ranks(save_badly, 2, tmp_path, timeout=100)
    assert first["first"] == ["step-00000001"]
    assert first["full"] == ["step-00000001"], "an incomplete file was left behind"
    assert first["line"] == [
        "no checkpoint of step 2: rank 1 could not write (File too large); training goes on, "
        "the newest checkpoint is step-00000001"
    ]
    assert not first["slow, marked"]
    assert first["slow"] == ["step-00000001"]
    assert first["last"] == ["step-00000002", "step-00000004", "step-00000005"], "the newest 2 and the best"
    assert first["lines"] == first["line"]
    assert second["lines"] == []
    assert first["kept"], "what was saved is not what was there when save was called"
    assert second["kept"]


def save_without_the_lease(rank: int, world_size: int, folder: Path) -> str:
    from toolkit.training.checkpointing.progress import Progress

    def lost() -> None:
        raise UserError("taken over")

    engine, queue = engine_and_queue(world_size)
    saving = checkpoints(folder, rank, world_size, before_complete=lost)
    saving.save(engine, None, queue, Progress(step=1))
    return caught(saving.wait)


@pytest.mark.timeout(120)
def test_all_ranks_learn_that_a_save_was_not_completed_since_the_folder_is_lost(tmp_path: Path) -> None:
    assert run_ranks(save_without_the_lease, 2, tmp_path, timeout=100) == 2 * ["taken over"]
    assert not list((tmp_path / "checkpoints").glob("step-*"))
