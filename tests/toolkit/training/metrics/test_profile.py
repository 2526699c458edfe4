"""The profile of a step: its spans, and its FLOPs against torch's count."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shards.errors import UserError
from shards.reading.dataset import Batch
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.model.small_trunks import RANDOM, with_random
from tests.toolkit.training import test_trainer
from tests.toolkit.training.micro_batches import even_draws
from toolkit import train
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.training.learner import Learner
from toolkit.training.metrics import flops, peak, profile, spans
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue

ROWS, SAMPLES, PATCHES = 4, 9000, 16


def small_config(train: str, head_layers: int, **training: Any) -> config.Config:
    model = tiny_model()
    model.speech.train = model.image.train = train
    model.speech.head_layers, model.image.head_layers = head_layers, 1 - head_layers
    objectives = config.Objectives(denoising=config.Denoising(side="both", layers=2))
    objectives.contrastive.queue = 12
    return config.Config(model=model, objectives=objectives, training=config.Training(batch_size=ROWS, **training))


def build_learner(settings: config.Config) -> tuple[Learner, flops.FlopCounter]:
    torch.manual_seed(0)
    learner = Learner(build_model(settings.model, settings.objectives.contrastive), settings.objectives, 0, 1)
    return learner, flops.FlopCounter(learner, settings, 1)


def batch(*lengths: int) -> Batch:
    pictures = torch.randint(0, 256, (len(lengths), 3, 32, 32), dtype=torch.uint8)
    waves = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length)
    return Batch(pictures, waves, torch.tensor(lengths), torch.arange(len(lengths)), lengths)


def count_flops(function: Any) -> tuple[Any, int]:
    """The result, and the floating-point operations that torch counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return function(), counter.get_total_flops()


def test_flops_of_a_stem_are_those_that_torch_counts() -> None:
    settings = small_config("all", 0)
    settings.model.image.stem = "convolutions"
    image = build_learner(settings)[0].model.image
    pictures = batch(SAMPLES).images
    assert flops.image_flops(image, PATCHES) == (0, count_flops(lambda: image(image.frozen_features(pictures)))[1])


@pytest.mark.parametrize("train", ["none", "1", "all"])
@pytest.mark.parametrize("head_layers", [0, 1])
def test_flops_of_the_parts_are_those_that_torch_counts(train: str, head_layers: int) -> None:
    learner, count = build_learner(small_config(train, head_layers))
    model, one = learner.model, batch(*[SAMPLES] * ROWS)
    frozen_speech, a = count_flops(lambda: model.speech.frozen_features(one.waveforms, one.lengths))
    speech, b = count_flops(lambda: model.speech(frozen_speech))
    frozen_image, c = count_flops(lambda: model.image.frozen_features(one.images))
    image, d = count_flops(lambda: model.image(frozen_image))
    assert flops.speech_flops(model.speech, np.full(ROWS, SAMPLES)) == (
        a,
        pytest.approx(b, abs=1e4),
    )  # means over frames
    assert flops.image_flops(model.image, PATCHES) == (c / ROWS, d / ROWS)
    parts = count.count(one).flops
    assert parts.get("frozen trunks", 0) == a + c
    assert parts["encoders"] == pytest.approx(3 * (b + d), rel=0.01)
    assert parts["teacher"] == pytest.approx(b + d, rel=0.01)
    _, matching = count_flops(lambda: model.match(speech, image))
    assert parts["SIM"] == pytest.approx(9 * matching, rel=0.01)
    rebuilt = 0
    for side, (own, other) in {"speech": (speech, image), "image": (image, speech)}.items():
        denoise = learner.denoisers[side]
        tokens = (own.tokens.detach(), own.mask)
        rebuilt += count_flops(lambda: denoise(*tokens, other.tokens, other.mask))[1]  # noqa: B023
    assert parts["CMD"] == 3 * rebuilt


@pytest.mark.parametrize("train", ["none", "1", "all"])
@pytest.mark.parametrize("architecture", RANDOM)
def test_flops_of_every_trunk_are_those_that_torch_counts(architecture: str, train: str) -> None:
    settings = small_config("all", 0)
    settings.model = with_random(architecture, train)
    settings.model.speech.head_layers = 0
    model, one = build_learner(settings)[0].model, batch(*[SAMPLES] * ROWS)
    if architecture in ("siglip", "dinov2"):
        features, a = count_flops(lambda: model.image.frozen_features(one.images))
        _, b = count_flops(lambda: model.image(features))
        assert flops.image_flops(model.image, PATCHES) == (a / ROWS, b / ROWS)
        return
    features, a = count_flops(lambda: model.speech.frozen_features(one.waveforms, one.lengths))
    _, b = count_flops(lambda: model.speech(features))
    spectrogram = 2 * 201 * 32 * 100 * ROWS if architecture == "whisper" else 0  # not the model's
    result = flops.speech_flops(model.speech, np.full(ROWS, SAMPLES))
    assert result == (a - spectrogram, pytest.approx(b, abs=1e4))  # means over frames


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_of_a_step_are_nearly_those_that_torch_counts(rank: int) -> None:
    settings = small_config("none" if rank else "all", 1)
    settings.model.speech.lora_rank = settings.model.image.lora_rank = rank
    learner, count = build_learner(settings)
    teacher, queue = MomentumEncoder(learner.model, 0.9), EmbeddingQueue(12, 16)
    one = batch(*[SAMPLES] * ROWS)
    _, done = count_flops(lambda: learner(one, teacher, queue, 0.4, even_draws(ROWS))[0]["loss"].backward())
    assert count.count(one).total_flops == pytest.approx(done, rel=0.05)


def test_padding_counts_nothing() -> None:
    settings = small_config("1", 1)
    settings.model.speech.groups = 1
    _, count = build_learner(settings)
    together = count.count(batch(SAMPLES, 4000, 2500, 6000))
    each = flops.BatchStats()
    for length in (SAMPLES, 4000, 2500, 6000):
        each.add(count.count(batch(length)))
    assert replace(together, padded_seconds=each.padded_seconds) == each
    assert together.padded_seconds == pytest.approx(ROWS * SAMPLES / 16000), "of one group"
    assert together.seconds == pytest.approx((SAMPLES + 4000 + 2500 + 6000) / 16000)
    assert together.tokens == together.frames + ROWS * PATCHES


def test_frames_are_those_of_the_encoder() -> None:
    learner, count = build_learner(small_config("none", 0))
    lengths = (SAMPLES, 10, 2500, 6001)
    one = batch(*lengths)
    mask = learner.model.encode_speech(one.waveforms, one.lengths).mask
    assert count.count(one).frames == int(mask.sum())
    assert flops.count_frames(learner.model.speech, np.array(lengths)).tolist() == mask.sum(1).tolist()


def test_cached_steps_compare_with_the_keys_of_the_complete_step() -> None:
    plain, cached = (
        build_learner(small_config("none", 0, accumulation=2, grad_cache=cached))[1] for cached in (False, True)
    )
    assert (plain.num_keys, cached.num_keys) == (2 + 12, 4 + 12)


def test_time_belongs_to_the_innermost_span_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(spans.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    @spans.span("outer")
    def outer() -> None:
        spend(1)
        with spans.span("inner"):
            spend(2)
        spend(4)

    with spans.Recorder(torch.device("cpu")) as recorder:
        spend(8)
        outer()
        recorder.end_step()
        with contextlib.suppress(ValueError), spans.span("inner"):
            spend(16)
            raise ValueError
        spend(32)
        recorder.end_step()
    outer()
    assert recorder.seconds() == [{"rest": 8, "outer": 5, "inner": 2}, {"rest": 32, "inner": 16}]


def test_spans_record_nothing_without_a_profile() -> None:
    with torch.profiler.profile() as tracer, spans.span("not there"):
        torch.ones(1) + 1
    assert not [event for event in tracer.events() or () if event.name == "not there"]


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16", False, 756.0),
        ("NVIDIA H200", "bf16", False, 989.4),
        ("NVIDIA L40S", "bf16", False, 362.0),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("Tesla V100-SXM2-32GB", "bf16", False, None),
        ("Tesla V100-SXM2-32GB", "fp32", False, 15.7),
        ("NVIDIA B200", "bf16", False, None),
    ],
)
def test_peaks_of_known_gpus(name: str, precision: str, tf32: bool, expected: float | None) -> None:
    assert peak.table_peak(name, precision, tf32) == expected


def test_collectives_are_known_by_name_and_their_overlap_counts_once() -> None:
    names = {
        "gloo:all_to_all": "all_to_all",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "AllReduce",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "AllGather",
        "ncclKernel_SendRecv(ncclWorkElem)": "SendRecv",
        "nccl:all_reduce": None,  # the host's part of the same
        "aten::mm": None,
    }
    result = {name: match and match[1] for name in names for match in [profile._COLLECTIVE.match(name)]}
    assert result == names
    assert profile._covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def profiled(rank: int, world_size: int, settings: config.Config) -> profile.Profile:
    """A profile of a run in which rank 1 waits 50 ms for each micro-batch and both 100 ms in the optimizer."""
    make, stream = profile.Trainer.__init__, profile.Trainer.batches

    def slow_step(self: Any, *args: Any) -> None:
        make(self, *args)
        step = self.engine.step
        self.engine.step = lambda: (time.sleep(0.1), step())

    def slow_stream(self: Any, steps: range) -> Iterator[Batch]:
        for each in stream(self, steps):
            time.sleep(0.05 * rank)
            yield each

    profile.Trainer.__init__, profile.Trainer.batches = slow_step, slow_stream  # type: ignore[method-assign]
    profile.WARM_UP = profile.TRACED = 1
    return profile.profile_training(settings, rank, world_size, torch.device("cpu"), 3)


@pytest.mark.timeout(240)
def test_a_profile_divides_the_time_of_steps_and_leaves_the_run_unchanged(shards: Path, tmp_path: Path) -> None:
    settings = test_trainer.settings(shards, tmp_path, accumulation=2, steps=1000)
    settings.model.speech.groups = 1
    settings.objectives.coarse_steps = 6  # more than are profiled: they are passed over
    result, same = run_ranks(profiled, 2, settings, timeout=200)
    assert result == same
    assert (result.ranks, result.steps) == (2, 3)
    assert sum(result.parts.values()) == pytest.approx(result.step)
    assert set(result.parts) == set(profile._PARTS)
    assert result.parts_slowest["data"] > 0.1 > result.parts["data"] > 0.05, "two micro-batches of 50 ms on one of two"
    assert result.parts_slowest["rank synchronization"] > 0.06, "the other rank waits for them"
    assert result.parts["optimizer"] > 0.2
    assert result.fastest <= result.step <= result.slowest
    assert result.pairs_per_second * result.step == pytest.approx(8)
    assert result.patches_per_second * result.step == pytest.approx(8 * PATCHES)
    assert 0.01 < result.padding < 0.5
    assert result.tflops == pytest.approx(sum(result.flops.values()) / result.step / 1e12)
    assert result.utilisation == pytest.approx(result.tflops / result.peak)
    assert result.peak > 1e-3
    assert result.peak_source.startswith("measured")
    assert {"all_reduce", "all_gather", "all_to_all"} <= set(result.collectives)
    text = result.text()
    for title in (
        "waiting for data",
        "SIM: negatives, fusion",
        "optimizer",
        "collectives, including waits",
        "utilization",
    ):
        assert title in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile"]
    assert json.loads((tmp_path / "profile/profile.json").read_text())["steps"] == 3
    for rank in (0, 1):
        events = json.loads((tmp_path / f"profile/trace-rank{rank}.json").read_text())["traceEvents"]
        labels = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert labels.count("backward") == 2
        assert {"data", "encoders", "teacher", "SIC", "SIM", "CMD", "optimizer"} <= set(labels)


def test_a_profile_takes_a_number_of_steps() -> None:
    with pytest.raises(UserError, match=r"--profile 0: expected 1 or more steps"):
        train.main(["--profile", "0"])


def test_flops_of_a_batch_without_lengths_on_the_host_are_those_of_its_width() -> None:
    _, count = build_learner(small_config("none", 0))
    one = batch(SAMPLES, SAMPLES)
    assert count.count(replace(one, host_lengths=None)) == count.count(one)
