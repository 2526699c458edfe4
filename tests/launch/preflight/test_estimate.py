"""The counted parameters are those of the model that is built."""

import json

import numpy as np
import pytest
import torch

from launch.preflight.estimate import SPEECH, VISION, count, estimate
from tests.tiny import tiny_model
from tests.toolkit.model.small_trunks import BASE, IMAGE, RANDOM, with_random, with_trunk, write_trunk
from tests.toolkit.model.small_trunks import SPEECH as SPEECH_TRUNKS
from tests.toolkit.model.test_spectrogram import settings as spectrogram_settings
from toolkit.config.schema import Config, Image, Speech
from toolkit.model import architectures
from toolkit.model.build import build_model
from toolkit.training.learner import Learner
from toolkit.training.metrics.flops import count_frames, count_patches
from toolkit.training.queue import TokenQueue


def built(config):
    with torch.device("meta"):
        learner = Learner(build_model(config.model, config.objectives.contrastive), config.objectives, 0, 1)
    names = dict(learner.named_parameters())
    trained = {name: p.numel() for name, p in names.items() if p.requires_grad}
    encoders = sum(size for name, size in trained.items() if name.startswith(("model.speech.", "model.image.")))
    return sum(p.numel() for p in names.values()), sum(trained.values()), encoders


def variants():
    base = Config(model=tiny_model())
    yield "all trained", base
    for train in ("none", "1", "2"):
        config = Config(model=tiny_model())
        config.model.speech.train = config.model.image.train = train
        yield f"train {train}", config
    config = Config(model=tiny_model())
    config.model.speech.config |= {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
    config.model.speech.train, config.model.speech.head_layers, config.model.speech.pool = "1", 0, "thirds"
    config.model.image.pool = "grid"
    config.objectives.denoising.side = "both"
    config.objectives.contrastive.learn_temperature = False
    yield "other choices", config
    config = Config(model=tiny_model())
    config.model.image.architecture, config.model.image.head_layers = "blip2", 2
    config.objectives.denoising.weight = 0
    yield "blip2", config
    for architecture in ("clip", "blip2"):
        config = Config(model=tiny_model())
        config.model.image.architecture, config.model.image.stem = architecture, "convolutions"
        yield f"stem, {architecture}", config
    config = Config(model=tiny_model())
    config.model.image.stem, config.model.image.config["patch_size"] = "convolutions", 16
    yield "stem, patch 16", config
    for architecture in RANDOM:
        for train in ("none", "1", "2", "all"):
            yield f"{architecture}, train {train}", Config(model=with_random(architecture, train))
    for architecture in ("wav2vec2", "wavlm"):
        config = Config(model=with_random(architecture, "1"))
        config.model.speech.config = dict(BASE)
        yield f"{architecture}, group norm", config
    for architecture in (*RANDOM, "hubert", "clip", "blip2"):
        model = with_random(architecture, "none") if architecture in RANDOM else tiny_model()
        model.speech.train = model.image.train = "none"
        model.image.architecture = architecture if architecture == "blip2" else model.image.architecture
        model.speech.lora_rank, model.image.lora_rank = 3, 2
        yield f"LoRA, {architecture}", Config(model=model)
    model = tiny_model()
    model.speech.train = model.image.train = "none"
    model.speech.lora_rank, model.speech.lora_targets = 2, ["out_proj", "intermediate_dense", "output_dense"]
    model.image.lora_rank, model.image.lora_targets = 2, ["fc1", "fc2"]
    yield "LoRA, other targets", Config(model=model)
    yield "spectrogram", Config(model=spectrogram_settings())
    config = Config(model=with_random("siglip"))
    config.model.image.pool = "mean"
    yield "siglip, mean of the patches", config
    config = Config(model=with_random("dinov2"))
    config.model.image.config |= {"use_swiglu_ffn": True, "qkv_bias": False}
    yield "dinov2, SwiGLU", config


@pytest.mark.parametrize(
    ("name", "config"), list(variants()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_parameters_are_counted_exactly(name, config):
    counts = count(config)
    assert (counts.total, counts.trained, counts.encoders) == built(config)


def test_published_sizes():
    config = Config()
    config.model.speech = Speech(trunk="facebook/hubert-large-ll60k")
    config.model.image = Image(trunk="openai/clip-vit-large-patch14")
    config.model.speech.train = config.model.image.train = "none"
    counts = count(config)
    # Of HuBERT all but the vector of SpecAugment's mask.
    assert counts.total - counts.trained == 315_438_720 - 1024 + 303_179_776


def test_defaults_are_those_of_transformers():
    ours, theirs = SPEECH | VISION, architectures.SPEECH | architectures.IMAGE
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        default = theirs[name].config()
        for key, value in values.items():
            there = getattr(default, key)
            assert (list(there) if isinstance(there, tuple) else there) == value, (name, key)


@pytest.mark.parametrize("name", [*SPEECH_TRUNKS, *IMAGE])
@pytest.mark.parametrize("train", ["none", "1"])
def test_parameters_of_a_folder_are_counted_exactly(tmp_path, name, train):
    write_trunk(name, tmp_path)
    config = Config(model=with_trunk(name, tmp_path, train))
    learner = Learner(build_model(config.model), config.objectives, 0, 1)
    counts = count(config)
    assert counts.total == sum(p.numel() for p in learner.parameters())
    assert counts.trained == sum(p.numel() for p in learner.parameters() if p.requires_grad)


def test_a_trunk_in_a_folder_or_in_the_cache_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = Config(model=tiny_model())
    config.model.speech.trunk = "someone/hubert"
    assert count(config) is None
    folder = tmp_path / "models--someone--hubert" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model.speech.config))
    random, found = count(Config(model=tiny_model())), count(config)
    assert found.total == random.total
    assert found.trained == random.trained - 2 * 32, "a pretrained large trunk's final norm is not used"
    config.model.speech.trunk = str(folder)
    config.model.image.trunk = str(tmp_path / "clip")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"vision_config": config.model.image.config}))
    assert count(config) == found


def test_memory_by_stage():
    config = Config(model=tiny_model())
    counts = count(config)
    taken = {}
    for stage in (0, 1, 2, 3):
        config.training.zero_stage = stage
        taken[stage] = estimate(config, counts, 4)
    assert taken[0].optimizer == 12 * counts.trained
    assert taken[1].optimizer == 3 * counts.trained
    assert taken[1].gradients == 4 * taken[2].gradients
    assert taken[2].weights == 4 * taken[3].weights
    assert taken[0].rank > taken[1].rank > taken[2].rank > taken[3].rank
    config.training.precision, config.training.zero_stage = "fp32", 0
    assert estimate(config, counts, 4).optimizer == 8 * counts.trained


@pytest.mark.parametrize("make_model", [tiny_model, spectrogram_settings])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bytes_of_the_token_queue(precision, make_model):
    config = Config(model=make_model())
    config.data.image_size, config.data.max_seconds, config.training.precision = 32, 0.8, precision
    config.training.batch_size, config.objectives.matching.queue = 8, 20  # two micro-batches of 8
    counts, ranks = count(config), 2
    without = Config(model=config.model, training=config.training, data=config.data)
    there, not_there = estimate(config, counts, ranks), estimate(without, counts, ranks)
    model = build_model(config.model)
    shapes = [(int(count_frames(model.speech, np.array([12800]))[0]), 32), (count_patches(model.image, 32), 32)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    queue = TokenQueue(20, 4, ranks, config.model.embed_dim, *shapes, dtype)
    keys = sum(getattr(queue.keys, name).nbytes for name in ("speech", "image", "ids"))
    tokens = queue.speech.nbytes + queue.speech_mask.nbytes + queue.image.nbytes
    assert there.queue - not_there.queue == keys + tokens
    assert there.checkpoint - not_there.checkpoint == keys + ranks * tokens
    config.objectives.matching.queue_on = "host"
    assert estimate(config, counts, ranks).queue - not_there.queue == keys
