"""Validation: combinations of values, and warnings about micro-batches that are too small for an objective."""

import re
from dataclasses import fields

import pytest
import torch
from transformers import Blip2VisionConfig, CLIPVisionConfig

from shards.errors import UserError
from toolkit.config.load import load_config
from toolkit.config.schema import Config
from toolkit.config.validate import batch_warnings, check_config, stem_supports
from toolkit.model.image import ConvolutionalStem
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import add_noise


def config(batch, accumulation=1, swap_group=8, **objectives):
    made = Config()
    made.training.batch_size, made.training.accumulation = batch, accumulation
    made.objectives.denoising.swap_group = swap_group
    for name, value in objectives.items():
        section, key = name.split("_")
        setattr(getattr(made.objectives, section), key, value)
    return made


@pytest.mark.parametrize(
    ("batch", "accumulation", "ranks", "swap_group", "objectives", "messages"),
    [
        (256, 1, 8, 8, {}, []),
        (256, 2, 4, 16, {}, []),
        (1, 1, 1, 2, {}, ["SIM", "CMD has no other row"]),
        (4, 4, 1, 2, {}, ["SIM", "CMD has no other row"]),
        (4, 1, 4, 2, {}, ["CMD has no other row"]),
        (4, 1, 4, 2, {"matching_negatives": "local"}, ["SIM.*, or set --objectives.matching.negatives global$", "CMD"]),
        (4, 1, 4, 2, {"denoising_noise": "gaussian"}, []),
        (4, 1, 4, 2, {"denoising_noise": "mask"}, []),
        (4, 1, 4, 2, {"denoising_weight": 0.0}, []),
        (1, 1, 1, 2, {"denoising_weight": 0.0, "matching_weight": 0.0}, []),
        (48, 1, 8, 8, {}, ["swap_group 8 does not divide.* set it to 6$"]),
        (40, 4, 1, 8, {}, ["swap_group 8 does not divide.* set it to 10$"]),
        (28, 1, 4, 4, {}, ["swap_group 4 does not divide.* set it to 7$"]),
        (4, 1, 2, 8, {}, ["2 pairs per rank.* set it to 2$"]),
        (28, 1, 4, 4, {"denoising_noise": "mask"}, []),
        (10, 1, 1, 8, {}, []),
    ],
)
def test_a_small_micro_batch_is_a_warning(batch, accumulation, ranks, swap_group, objectives, messages):
    warnings = batch_warnings(config(batch, accumulation, swap_group, **objectives), ranks)
    assert len(warnings) == len(messages)
    for line, pattern in zip(warnings, messages, strict=True):
        assert re.search(pattern, line)
        assert "\n" not in line


def noised(batch, ranks, swap_group):
    """Noised tokens of a global batch, computed in the parts of its ranks."""
    tokens = torch.arange(batch * 6.0).reshape(batch, 6, 1).repeat(1, 1, 2)
    ids, rows = torch.arange(batch), torch.arange(batch)
    parts = []
    for part in rows.chunk(ranks):
        mask, random = torch.ones(len(part), 6, dtype=torch.bool), CounterRNG(3, part)
        parts.append(add_noise(tokens[part], mask, ids[part], "swap", 0.5, 1, 0.0, random, swap_group).tokens)
    return torch.cat(parts)


@pytest.mark.parametrize("batch", [4, 6, 8, 12, 16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("swap_group", [2, 3, 4, 8])
def test_noise_does_not_depend_on_the_world_size_without_a_warning(batch, ranks, swap_group):
    if batch % ranks == 0:
        same = torch.equal(noised(batch, ranks, swap_group), noised(batch, 1, swap_group))
        assert same or batch_warnings(config(batch, swap_group=swap_group), ranks)
        for line in batch_warnings(config(batch, swap_group=swap_group), ranks):
            if mend := re.search(r"set it to (\d+)$", line):
                assert torch.equal(noised(batch, ranks, int(mend[1])), noised(batch, 1, int(mend[1])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.image.trunk", "openai/clip-vit-base-patch32"], "model.image.trunk was trained"),
        (["--model.image.train", "2"], "would leave the stem's random weights"),
    ],
)
def test_a_stem_needs_a_trunk_that_is_trained_from_random_weights(arguments, message):
    with pytest.raises(UserError, match=message):
        load_config(["--config", "quickstart", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.speech.mel_bins", "4"], "expected 8 to 128"),
        (["--model.speech.trunk", "facebook/hubert-large-ll60k"], "model.speech.trunk was trained with"),
        (["--model.speech.train", "1"], "would leave random convolutions untrained"),
        (["--model.speech.architecture", "whisper"], "Whisper has a spectrogram of its own"),
        (["--model.speech.filterbank", "true"], "set one of them"),
        (["--model.speech.config.feat_extract_norm", "group"], "feat_extract_norm: layer"),
    ],
)
def test_a_spectrogram_needs_a_waveform_trunk_that_is_trained_from_random_weights(arguments, message):
    spectrogram = ["--config", "quickstart", "--model.speech.filterbank", "false", "--model.speech.mel_bins", "40"]
    load_config(spectrogram)
    with pytest.raises(UserError, match=message):
        load_config([*spectrogram, *arguments])


@pytest.mark.parametrize(
    ("patch_size", "hidden_size", "fits"),
    [(2, 4, True), (16, 128, True), (32, 768, True), (1, 128, False), (12, 128, False), (0, 128, False), (-2, 4, False),
     (8, 18, False), (8, 0, False), ("8", 128, False), (8.0, 128, False)],
)  # fmt: skip
def test_the_patches_of_a_stem_are_checked_without_a_model(patch_size, hidden_size, fits):
    made = load_config(["--config", "quickstart"])
    made.model.image.config |= {"patch_size": patch_size, "hidden_size": hidden_size}
    assert stem_supports(patch_size, hidden_size) == fits
    if fits:
        check_config(made)
        ConvolutionalStem(hidden_size, patch_size)
    else:
        with pytest.raises(UserError, match=f"power of 2, .* they are {patch_size} and {hidden_size}$"):
            check_config(made)
    made.model.image.stem = "patches"
    check_config(made)


@pytest.mark.parametrize(("architecture", "config"), [("clip", CLIPVisionConfig), ("blip2", Blip2VisionConfig)])
def test_the_patches_of_a_stem_default_to_transformers_values(architecture, config):
    fits = stem_supports(config().patch_size, config().hidden_size)
    made = load_config(["--config", "quickstart"])
    made.model.image.architecture, made.model.image.config = architecture, {}
    if fits:
        check_config(made)
    else:
        with pytest.raises(UserError, match=f"they are {config().patch_size} and {config().hidden_size}$"):
            check_config(made)


def test_a_run_of_coarse_steps_only_is_a_warning():
    made = load_config(["--config", "quickstart", "--training.steps", "60"])
    assert any("--objectives.coarse_steps 950: all of 60 steps" in line for line in batch_warnings(made, 2))
    assert not batch_warnings(load_config(["--config", "quickstart"]), 2)


def test_ranges_of_the_augmentation() -> None:
    """Each list of `data.augment` is checked: two numbers in order, within limits that contain the defaults."""
    for section in ("speech", "image"):
        for field in fields(getattr(Config().data.augment, section)):
            current = getattr(getattr(Config().data.augment, section), field.name)
            wrong = {list: [[], [1.0], [0.9, 0.8], [1e6, 1e6], [-1e6, 0.0]], float: [-0.1, 1.1], int: [0]}[
                type(current)
            ]
            for value in wrong:
                changed = Config()
                setattr(getattr(changed.data.augment, section), field.name, value)
                with pytest.raises(UserError, match=rf"--data\.augment\.{section}\.{field.name} is .*; expected "):
                    check_config(changed)


def test_cutoffs_of_the_band_limit_may_not_cross() -> None:
    made = Config()
    made.data.augment.speech.band_low = [50.0, 3200.0]
    with pytest.raises(UserError, match=r"band_low is \[50\.0, 3200\.0\]; expected cutoffs below .*band_high, \[3000"):
        check_config(made)
