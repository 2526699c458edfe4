"""Checkpoints: exact resumption at any world size and stage, damage, failed saves, and no unpickling."""

import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shards.errors import UserError
from shards.files import file_sha256, read_records
from tests.distributed import RankError, run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.log_lines import collect_lines
from tests.toolkit.training.zero import test_state
from toolkit.config import schema as config

STEPS = 4


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


class Gone(Exception):
    """Ends a training in place of a killed process."""


def settings(shards: Path, run: Path, **training: Any) -> config.Config:
    made = test_trainer.settings(shards, run, **({"save_every": 1, "steps": STEPS} | training))
    made.model.fusion.dropout = 0.1
    return made


def train(rank: int, world_size: int, runs: list[tuple[config.Config, int | None, str]]) -> None:
    """Train several runs one after the other, each to its end or as far as the step at which it is ended."""
    for each, last, how in runs:
        trainer = test_trainer.make_trainer(rank, world_size, each)
        take = trainer.train_step

        def step(number: int, batches: Any, take: Any = take, last: int | None = last, how: str = how) -> Any:
            if number == last and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == last:
                raise Gone
            return take(number, batches)

        trainer.train_step = step
        try:
            trainer.train()
        except Gone:
            trainer.checkpoints._wait_at_exit()
        trainer.close()


def losses(run: Path) -> dict[int, dict[str, float]]:
    return test_trainer.losses_by_step(run, STEPS)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "last" / "model.safetensors")


def assert_equal(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert losses(run)[1]["loss"] != losses(run)[STEPS]["loss"]
    one, two = exported(run), exported(other)
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(shards: Path, tmp_path: Path, precision: str) -> None:
    runs = []
    for zero in range(4):
        options = {"zero_stage": zero, "precision": precision, "accumulation": 2 if zero == 1 else 1}
        runs.append((settings(shards, tmp_path / f"unbroken{zero}", **options), None, ""))
        broken = settings(shards, tmp_path / f"broken{zero}", **options)
        broken.deepspeed = runs[-1][0].deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 300}}
        runs += [(broken, 1 + zero % 3, "raise"), (broken, None, "")]
    run_ranks(train, 2, runs, timeout=350)
    for zero in range(4):
        assert_equal(tmp_path / f"broken{zero}", tmp_path / f"unbroken{zero}")


@pytest.mark.timeout(240)
def test_killed_while_saving_equals_unbroken(shards: Path, tmp_path: Path) -> None:
    broken, unbroken = (
        settings(shards, tmp_path / name, zero_stage=2, keep_checkpoints=1) for name in ("broken", "unbroken")
    )
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(train, 2, [(broken, 3, "kill")], timeout=100)
    assert not (tmp_path / "broken" / "checkpoints" / "step-00000004").exists()
    run_ranks(train, 2, [(broken, None, ""), (unbroken, None, "")], timeout=100)
    assert_equal(tmp_path / "broken", tmp_path / "unbroken")
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.timeout(300)
def test_continued_on_other_ranks_at_other_stages(shards: Path, tmp_path: Path) -> None:
    def run(name: str, zero: int) -> config.Config:
        made = settings(shards, tmp_path / name, zero_stage=zero)
        made.model.fusion.dropout = made.objectives.denoising.weight = 0.0  # these depend on the rank
        return made

    changing = tmp_path / "changing"
    run_ranks(train, 2, [(run("unbroken", 1), None, ""), (run("changing", 2), 1, "raise")], timeout=100)
    run_ranks(train, 4, [(run("changing", 3), 2, "raise")], timeout=100)
    run_ranks(train, 1, [(run("changing", 0), 3, "raise"), (run("changing", 1), None, "")], timeout=100)
    markers = [json.loads((changing / f"checkpoints/step-0000000{n}/progress.json").read_text()) for n in (2, 3, 4)]
    assert [(marker["world_size"], marker["zero"]) for marker in markers] == [(4, 3), (1, 0), (1, 1)]
    unbroken = losses(tmp_path / "unbroken")
    for step, actual in losses(changing).items():
        assert actual == pytest.approx(unbroken[step], rel=1e-5, abs=1e-5)


def refused(rank: int, world_size: int, run: config.Config) -> str:
    with pytest.raises(UserError) as caught:
        train(rank, world_size, [(run, None, "")])
    return str(caught.value)


@pytest.mark.timeout(240)
def test_a_run_begins_from_anothers_checkpoint_or_never_from_one(shards: Path, tmp_path: Path) -> None:
    first = settings(shards, tmp_path / "first", keep_checkpoints=9)
    run_ranks(train, 2, [(first, None, "")], timeout=100)
    marked = tmp_path / "first" / "checkpoints" / "step-00000002"
    branch, again = (settings(shards, tmp_path / "branch", resume=str(each)) for each in (marked, tmp_path / "first"))
    # The second begins where the branch is, not at the end of the first, which it names.
    run_ranks(train, 2, [(branch, 3, "raise"), (again, None, "")], timeout=100)
    records = list(read_records(tmp_path / "branch" / "log.jsonl"))
    actual = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert actual == {step: losses(tmp_path / "first")[step]["loss"] for step in (3, 4)}
    assert [record["at"] for record in records if record.get("event") == "began"] == [2, 3]

    never = settings(shards, tmp_path / "first", resume="never")
    assert "holds checkpoints" in run_ranks(refused, 1, never, timeout=60)[0]
    nowhere = settings(shards, tmp_path / "nowhere", resume=str(tmp_path / "nothing"))
    assert "no checkpoint there" in run_ranks(refused, 1, nowhere, timeout=60)[0]
    run_ranks(train, 1, [(settings(shards, tmp_path / "new", resume="never", steps=1), None, "")], timeout=60)
    done = settings(shards, tmp_path / "done", resume=str(tmp_path / "first"))
    assert "has 4 steps, and --training.steps 4 leaves none to train" in run_ranks(refused, 1, done, timeout=60)[0]


@pytest.mark.timeout(240)
def test_a_run_on_other_data_begins_at_step_0_with_what_another_has_learned(shards: Path, tmp_path: Path) -> None:
    from shards.manifest import load
    from tests.shards.media.noise import noise

    other = tmp_path / "shards"
    noise(other, captions=2)
    assert load(other).hash != load(shards).hash
    first, tuned = (
        settings(shards, tmp_path / "first"),
        settings(other, tmp_path / "tuned", steps=2, keep_checkpoints=9),
    )
    tuned.training.resume = str(tmp_path / "first")
    run_ranks(train, 1, [(first, None, ""), (tuned, 0, "raise")], timeout=100)
    run_ranks(train, 1, [(tuned, None, "")], timeout=100)
    assert [record["step"] for record in test_trainer.losses(tmp_path / "tuned")] == [1, 2]
    old, new = (
        load_file(tmp_path / name / "checkpoints" / step / "fragments-00000.safetensors")
        for name, step in (("first", "step-00000004"), ("tuned", "step-00000001"))
    )
    name = "master:0:model.match_head.weight"
    assert 0 < (old[name] - new[name]).abs().max() < 3e-3, "a step of warm-up away"
    ids = load_file(tmp_path / "tuned/checkpoints/step-00000001/shared.safetensors")["queue:ids"]
    assert (ids >= 0).sum() == 8, "keys of the other data were kept"
    mine = settings(shards, tmp_path / "tuned", steps=2)
    assert "was trained on other data than is there now" in run_ranks(refused, 1, mine, timeout=60)[0]
    moved = settings(other.rename(tmp_path / "moved"), tmp_path / "tuned", steps=2)
    run_ranks(train, 1, [(moved, None, "")], timeout=60)


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


class Model:
    """A model with the interface that an export uses."""

    weight = torch.zeros(3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(state_dict, folder / "model.safetensors")


def test_an_export_holds_what_was_there_and_its_failure_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from toolkit.training.checkpointing.export import Exports
    from toolkit.training.checkpointing.progress import Progress

    exporting, model = Exports(tmp_path, config.Config(), {}), Model()
    (tmp_path / "export").touch()
    exporting.save(model, "last", Progress(step=1))
    exporting.wait()
    where = tmp_path / "export" / "last"
    assert caplog.messages[-1] == f"the model was not written to {where}: Not a directory; training goes on"
    (tmp_path / "export").unlink()
    for step in (2, 3):
        exporting.save(model, "last", progress := Progress(step=step))
        model.weight += 1  # training goes on
        progress.step = 9
    exporting.wait()
    assert load_file(where / "model.safetensors")["weight"].tolist() == [1.0] * 3
    assert json.loads((where / "progress.json").read_text())["step"] == 3
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["last"]

    def lost() -> None:
        raise UserError("taken over")

    exporting = Exports(tmp_path, config.Config(), {}, lost)
    exporting.save(model, "last", Progress(step=4))
    exporting.wait()
    assert caplog.messages[-1].endswith("UserError: taken over; training goes on")
    assert json.loads((where / "progress.json").read_text())["step"] == 3
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["last"]


def test_a_file_is_safetensors_with_its_checksum(tmp_path: Path) -> None:
    from toolkit.training.checkpointing.files import problem_of, write_tensors

    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "matrix": torch.randn(4, 5),
        "ids": torch.tensor([-1, 2**62]),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }
    info = write_tensors(tmp_path / "x.safetensors", tensors, {"a": "b"})
    assert (info.bytes, info.sha256) == ((tmp_path / info.name).stat().st_size, file_sha256(tmp_path / info.name))
    assert problem_of(tmp_path, info) is None
    actual = load_file(tmp_path / info.name)
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def fragments_of(size: int, bounds: set[int], tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    from toolkit.training.zero.state import OptimizerFragment

    edges = [0, *sorted(each for each in bounds if 0 < each < size), size]
    return [
        OptimizerFragment("a:b.c", start, stop, (size,), *(tensor[start:stop].clone() for tensor in tensors))
        for start, stop in itertools.pairwise(edges)
    ]


@examples(deadline=None)  # the first one imports DeepSpeed
@given(
    st.integers(1, 30),
    st.sets(st.integers(1, 29), max_size=5),
    st.sets(st.integers(1, 29), max_size=5),
    st.sets(st.integers(0, 5), max_size=1),
)
def test_fragments_of_any_partition_are_read_into_any_other(
    tmp_path_factory: pytest.TempPathFactory, size: int, there: set[int], here: set[int], lost: set[int]
) -> None:
    from toolkit.training.checkpointing.files import CheckpointReader, named_tensors, write_tensors

    folder = tmp_path_factory.mktemp("fragments")
    tensors = tuple(torch.randn(size) for _ in range(3))
    saved = [each for number, each in enumerate(fragments_of(size, there, tensors)) if number not in lost]
    for number, each in enumerate(saved):
        write_tensors(folder / f"{number}.safetensors", named_tensors(each), {each.name: json.dumps(each.shape)})
    reader = CheckpointReader(sorted(folder.iterdir(), reverse=True))
    wanted = fragments_of(size, here, tuple(torch.full((size,), torch.nan) for _ in range(3)))
    for each in wanted:
        if not all(any(one.start <= n < one.stop for one in saved) for n in range(each.start, each.stop)):
            with pytest.raises(UserError, match="does not hold elements"):
                reader.check(each)
            continue
        reader.check(each)
        reader.read_into(each)
        for tensor, actual in zip(tensors, (each.master, each.exp_avg, each.exp_avg_sq), strict=True):
            assert torch.equal(actual, tensor[each.start : each.stop])


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    from toolkit.training.checkpointing.files import CheckpointReader, named_tensors, write_tensors

    (saved,) = fragments_of(6, set(), tuple(torch.zeros(6) for _ in range(3)))
    write_tensors(tmp_path / "x", named_tensors(saved), {saved.name: "[2, 3]"})
    with pytest.raises(UserError, match=r"a:b\.c has shape \(2, 3\) in the checkpoint, \(6,\) in this model"):
        CheckpointReader([tmp_path / "x"]).check(saved)
