"""The trainer under DeepSpeed and gloo: the same numbers at every ZeRO stage, world size and after a restart."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from shards.files import read_records
from shards.manifest import load
from tests.distributed import device_of, run_ranks
from tests.shards.media.noise import spoil
from tests.tiny import tiny_model
from toolkit.config import schema as config


def settings(shards: Path, run: Path, **training: Any) -> config.Config:
    model = tiny_model()
    training = {
        "steps": 4,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "precision": "fp32",
        "zero_stage": 0,
        "log_every": 1,
    } | training
    if training["precision"] == "fp32":  # in bf16 a CPU refuses a stem
        model.image.stem = "convolutions"
    return config.Config(
        run=str(run),
        data=config.Data(shards=str(shards), image_size=32, max_seconds=0.8, workers=0, shuffle_shards=2),
        model=model,
        objectives=config.Objectives(
            contrastive=config.Contrastive(queue=12, alpha_ramp=2),
            matching=config.Matching(negatives="global", queue=16),
            denoising=config.Denoising(layers=1, side="both"),
            momentum=config.Momentum(decay=0.9),
        ),
        training=config.Training(**training),
        evaluation=config.Evaluation(every=0, batch_size=4),
        wandb=config.Wandb(mode="disabled"),
    )


def make_trainer(rank: int, world_size: int, run: config.Config) -> Any:
    """Prepare the run folder, and make this rank's trainer."""
    from toolkit.rank_sync import run_on_rank_zero
    from toolkit.run_folder import prepare_run
    from toolkit.training.trainer import Trainer

    run_on_rank_zero(partial(prepare_run, run), rank)
    return Trainer(run, Path(run.run), rank, world_size, device_of(rank))


def train(rank: int, world_size: int, *runs: config.Config) -> None:
    """Train several runs one after the other on this rank."""
    for each in runs:
        trainer = make_trainer(rank, world_size, each)
        trainer.train()
        trainer.close()


def losses(run: Path) -> list[dict[str, float]]:
    names = ("step", "loss", "contrastive", "matching", "denoising", "denoising_control", "temperature", "lr")
    return [{name: r[name] for name in names if name in r} for r in read_records(run / "log.jsonl") if "loss" in r]


def losses_by_step(run: Path, steps: int) -> dict[int, dict[str, float]]:
    """Losses of steps 1 to `steps`; a step that was taken twice must have given the same numbers."""
    result: dict[int, dict[str, float]] = {}
    for one in losses(run):
        assert result.setdefault(int(one["step"]), one) == one, "a step that was taken twice gave other numbers"
    assert list(result) == list(range(1, steps + 1))
    return result


def assert_same(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    assert len(one) == len(other) == 4
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.timeout(240)
def test_every_zero_stage_trains_with_the_same_losses(shards: Path, tmp_path: Path) -> None:
    runs = [settings(shards, tmp_path / str(zero), zero_stage=zero) for zero in range(4)]
    for each in runs:
        each.objectives.coarse_steps = 1
    run_ranks(train, 2, *runs, timeout=200)
    reference = losses(tmp_path / "0")
    assert reference[0]["loss"] != pytest.approx(reference[3]["loss"], rel=1e-3), "nothing was learned"
    for zero in (1, 2, 3):
        assert_same(losses(tmp_path / str(zero)), reference, 1e-5)


@pytest.mark.timeout(300)
def test_ranks_leave_twenty_steps_losses_and_weights_alone(shards: Path, tmp_path: Path) -> None:
    def run(ranks: int) -> config.Config:
        made = settings(shards, tmp_path / str(ranks), steps=20)
        made.objectives.coarse_steps = 2
        made.objectives.denoising.swap_group = 2  # rows of a rank where there are four
        return made

    for ranks in (1, 2, 4):
        run_ranks(train, ranks, run(ranks), timeout=120)
    reference, weights = losses(tmp_path / "1"), load_file(tmp_path / "1/export/last/model.safetensors")
    assert [record["step"] for record in reference] == list(range(1, 21))
    for ranks in (2, 4):
        for found, expected in zip(losses(tmp_path / str(ranks)), reference, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), f"step {expected['step']} on {ranks} ranks"
        exported = load_file(tmp_path / str(ranks) / "export/last/model.safetensors")
        for name, value in weights.items():
            # Attention does not feel a bias of its keys: that gradient is only rounding, and Adam steps all the same.
            if not name.endswith(("k_proj.bias", "key_value.bias")):
                torch.testing.assert_close(exported[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def coarse_run(rank: int, world_size: int, run: config.Config) -> dict[str, Any]:
    """Train, and give how far the teacher is from the student, and which weights have moved."""
    trainer = make_trainer(rank, world_size, run)
    before = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    trainer.train()
    assert trainer.teacher
    trainer.teacher.wait_pending()
    pairs = zip(trainer.teacher.working_copy, trainer.teacher.student, strict=True)
    distance = max(float((working - student.detach()).abs().max()) for working, student in pairs)
    moved = {n.split(".")[1] for n, p in trainer.learner.named_parameters() if not torch.equal(p.detach(), before[n])}
    found = {"distance": distance, "moved": moved, "keys": int((trainer.queue.ids >= 0).sum())}
    trainer.close()
    return found


@pytest.mark.timeout(120)
def test_coarse_steps_train_sic_alone_and_leave_the_teacher_at_the_student(shards: Path, tmp_path: Path) -> None:
    alone = settings(shards, tmp_path / "alone", steps=3, weight_decay=0.0)
    alone.objectives.coarse_steps = 3
    found = run_ranks(coarse_run, 1, alone, timeout=50)[0]
    assert found == {"distance": 0.0, "moved": {"speech", "image", "temperature"}, "keys": 0}
    assert not any("matching" in record or "denoising" in record for record in losses(tmp_path / "alone"))
    mixed = settings(shards, tmp_path / "mixed", steps=3)
    mixed.objectives.coarse_steps = 2
    found = run_ranks(coarse_run, 1, mixed, timeout=50)[0]
    assert found["distance"] > 0
    assert {"fusion", "match_head", "image", "speech"} <= found["moved"]
    assert found["keys"] == 8
    assert ["matching" in record for record in losses(tmp_path / "mixed")] == [False, False, True]


@pytest.mark.timeout(120)
def test_coarse_steps_decay_unused_weights_alike_at_every_zero_stage(shards: Path, tmp_path: Path) -> None:
    from toolkit.model.build import build_model
    from toolkit.training.schedules import learning_rate

    runs = [settings(shards, tmp_path / str(zero), zero_stage=zero, lr=0.1, weight_decay=0.5) for zero in range(4)]
    for each in runs:
        each.objectives.coarse_steps = 4
    run_ranks(train, 1, *runs, timeout=100)
    heads = [load_file(tmp_path / f"{zero}/export/last/model.safetensors")["match_head.weight"] for zero in range(4)]
    torch.manual_seed(runs[0].seed)
    begun = build_model(runs[0].model, runs[0].objectives.contrastive).match_head.weight
    rates = [learning_rate(runs[0].training, step) for step in range(4)]
    for head in heads:
        torch.testing.assert_close(head, begun.detach() * math.prod(1 - 0.5 * rate for rate in rates))


def complete_run(rank: int, world_size: int, run: config.Config) -> dict[str, Any] | None:
    """Train with evaluation and wandb, then read the exported model back."""
    from toolkit.model.retrieval import SpeechImageModel

    train(rank, world_size, run)
    if rank:
        return None
    model = SpeechImageModel.from_pretrained(Path(run.run) / "export" / "best")
    with torch.no_grad():
        embedding = model.encode_speech(torch.randn(1, 16000), torch.tensor([16000])).embedding
    return {"norm": float(embedding.norm()), "denoisers": [n for n, _ in model.named_parameters() if "denois" in n]}


@pytest.mark.timeout(240)
def test_a_run_leaves_checkpoints_exports_and_logs(shards: Path, tmp_path: Path) -> None:
    run = settings(shards, tmp_path / "run", zero_stage=3, save_every=1, keep_checkpoints=2)
    run.evaluation.every = 2
    run.wandb.mode = "offline"
    exported = run_ranks(complete_run, 2, run, timeout=200)[0]
    assert exported["norm"] == pytest.approx(1.0, abs=1e-5)
    assert exported["denoisers"] == []
    folder = tmp_path / "run"
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    best = json.loads((folder / "export" / "best" / "progress.json").read_text())["step"]
    assert kept == sorted({f"step-{step:08d}" for step in (best, 3, 4)})
    recalls = [r for r in read_records(folder / "log.jsonl") if "dev" in r]
    assert [r["step"] for r in recalls] == [2, 4]
    assert recalls[0]["dev"]["pictures"] == 6
    assert list((folder / "wandb").glob("offline-run-*")), "no wandb record"
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2


def test_learning_rate_and_alpha_follow_their_schedules() -> None:
    from toolkit.training.schedules import learning_rate, soft_target_weight

    whole = config.Config(training=config.Training(steps=110, warmup_steps=10, lr=1.0, min_lr=0.1))
    whole.objectives.contrastive = config.Contrastive(alpha=0.4, alpha_ramp=20)
    rates = [learning_rate(whole.training, step) for step in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1])
    assert [soft_target_weight(whole.objectives, step) for step in (0, 10, 20, 90)] == pytest.approx(
        [0.0, 0.2, 0.4, 0.4]
    )
    whole.objectives.coarse_steps = 20  # there is no teacher yet
    assert [soft_target_weight(whole.objectives, step) for step in (10, 19, 20, 90)] == pytest.approx(
        [0.0, 0.0, 0.4, 0.4]
    )


def test_the_queue_takes_keys_from_the_configured_step_on() -> None:
    from toolkit.training.learner import QueueEntries
    from toolkit.training.queue import ContrastiveKeys, EmbeddingQueue
    from toolkit.training.trainer import Trainer

    whole = config.Config()
    whole.objectives.contrastive.queue_from = 3
    trainer = SimpleNamespace(config=whole, teacher=None, queue=EmbeddingQueue(8, 2), token_queue=None)
    for step in range(5):
        keys = ContrastiveKeys(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([step]))
        Trainer.update_teacher_and_queues(trainer, step, [QueueEntries(keys)])
    assert sorted(trainer.queue.ids[trainer.queue.ids >= 0].tolist()) == [3, 4]


def test_best_is_the_best_on_dev_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.training import trainer as module
    from toolkit.training.checkpointing.progress import Progress

    scores = iter([10.0, 5.0, 20.0, 20.0, 30.0, 25.0])

    def retrieved(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(report={"coarse": {"mean_R@1": next(scores)}, "reranked": None})

    monkeypatch.setattr(module, "retrieve", retrieved)
    monkeypatch.setattr(module, "run_on_rank_zero", lambda work, rank: work())
    exported: list[int] = []
    on_disk = [(-1.0, 0)]
    progress = Progress()
    trainer = MagicMock(config=config.Config(), progress=progress)

    def export(name: str) -> None:
        exported.append(progress.step)
        if progress.step != 5:  # when the disk is full
            on_disk.append((progress.best, progress.best_step))

    trainer.export.side_effect = export
    trainer.exports.best.side_effect = lambda: on_disk[-1]
    trainer._refresh_best = partial(module.Trainer._refresh_best, trainer)
    bests = []
    for step in (1, 2, 3, 4, 5, 6):
        progress.step = step
        module.Trainer.evaluate(trainer)
        bests.append((progress.best, progress.best_step))
    assert exported == [1, 3, 5, 6]
    assert bests == [(10.0, 1), (10.0, 1), (20.0, 3), (20.0, 3), (30.0, 5), (25.0, 6)]


@pytest.mark.timeout(240)
def test_a_bad_sample_is_replaced_and_logged_and_a_missing_shard_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    manifest = load(folder)
    spoil(manifest, int(manifest.rows("train")[0]))
    run_ranks(train, 2, settings(folder, tmp_path / "run", steps=5), timeout=100)  # all 40 pictures
    assert sum(record.get("bad_samples", 0) for record in read_records(tmp_path / "run/log.jsonl")) == 1
    (folder / manifest.shards[int(manifest.shard[manifest.rows("train")[0]])].name).unlink()
    with pytest.raises(AssertionError, match=r"UserError: .*cannot open shard .*No such file"):
        run_ranks(train, 2, settings(folder, tmp_path / "other", steps=5), timeout=60)


@pytest.mark.timeout(240)
def test_a_mixture_in_lanes_trains_with_the_same_losses_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    def mixed(name: str) -> config.Config:
        run = settings(shards, tmp_path / name)
        shutil.copytree(shards, tmp_path / f"{name} shards")
        run.data.mixture = {str(shards): 1, f"file://{tmp_path}/{name} shards": 3.0}
        run.data.shard_groups, run.data.cache = 2, str(tmp_path / "cache")
        run.objectives.denoising.weight = 0.0  # its noise comes from the rank's own batch
        return run

    run_ranks(train, 1, mixed("one"), timeout=100)
    run_ranks(train, 2, mixed("two"), timeout=100)
    assert_same(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)
    assert list((tmp_path / "cache").glob("*.tar")), "the remote half was not read through the cache"
