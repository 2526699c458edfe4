"""Denoisers are read from the fragments of a checkpoint, wherever these were cut."""

import json
from dataclasses import asdict

import pytest
import torch

from shards.errors import UserError
from tests.tiny import tiny_model
from toolkit.config.schema import Config
from toolkit.model.build import build_model
from toolkit.training.checkpointing.denoisers import load_denoisers
from toolkit.training.checkpointing.files import write_tensors
from toolkit.training.learner import Learner


def configuration(weight=0.5):
    config = Config(model=tiny_model())
    config.objectives.denoising.weight, config.objectives.denoising.side = weight, "both"
    return config


@pytest.fixture
def saved(tmp_path):
    """A run with a checkpoint of step 7 by two ranks, each with half of every weight."""
    torch.manual_seed(1)
    learner = Learner(build_model(tiny_model()), configuration().objectives, 0, 1)
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    files = [write_tensors(folder / "shared.safetensors", {"buffer:x": torch.zeros(1)}, {})]
    for rank in range(2):
        tensors, shapes = {}, {}
        for name, parameter in learner.named_parameters():
            flat, half = parameter.detach().reshape(-1), parameter.numel() // 2
            start, stop = (0, half) if rank == 0 else (half, flat.numel())
            tensors[f"master:{start}:{name}"] = flat[start:stop].clone()
            shapes[name] = json.dumps(tuple(parameter.shape))
        files.append(write_tensors(folder / f"fragments-{rank:05d}.safetensors", tensors, shapes))
    marker = {
        "format": 2,
        "step": 7,
        "applied_steps": 7,
        "config": "x",
        "data": [],
        "files": [asdict(f) for f in files],
    }
    (folder / "progress.json").write_text(json.dumps(marker))
    return tmp_path, learner


def test_weights_are_those_of_the_learner(saved):
    run, learner = saved
    torch.manual_seed(2)
    denoisers = load_denoisers(run, configuration(), build_model(tiny_model()), 7)
    assert set(denoisers) == {"image", "speech"}
    for side, denoiser in denoisers.items():
        assert not denoiser.training
        expected = learner.denoisers[side].state_dict()
        for name, value in denoiser.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_reasons_are_one_line(saved):
    run, _ = saved
    model = build_model(tiny_model())
    with pytest.raises(UserError, match=r"trained no denoiser"):
        load_denoisers(run, configuration(0.0), model, 7)
    for step in (8, None):
        with pytest.raises(UserError, match=r"exports have no denoiser, and .* progress.json is missing"):
            load_denoisers(run, configuration(), model, step)
    path = run / "checkpoints" / "step-00000007" / "fragments-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"fragments-00001.safetensors has another checksum"):
        load_denoisers(run, configuration(), model, 7)
