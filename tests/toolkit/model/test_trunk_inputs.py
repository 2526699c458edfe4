"""Preprocessing of pretrained trunks: as in the folder of their weights, and kept for the run."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    BlipImageProcessor,
    CLIPImageProcessor,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from shards.errors import UserError
from tests.distributed import run_ranks
from tests.tiny import HUBERT, PARTITIONED, tiny_model
from tests.toolkit.model.test_trunk import TRUNKS, build, clip_folder, pictures, write_trunk
from tests.toolkit.training.test_trainer import losses, train
from tests.toolkit.training.test_trainer import settings as run_settings
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel

CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def write_inputs(folder: Path, values: dict, nested: bool = False) -> None:
    """Write the preprocessor configuration, or its section in the newer file."""
    section = "feature_extractor" if "do_normalize" in values and "size" not in values else "image_processor"
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({section: values} if nested else values))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        None,
        CLIPImageProcessor().to_dict(),
        BlipImageProcessor().to_dict(),
        BlipImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.1]).to_dict(),
        CLIPImageProcessor(do_normalize=False).to_dict(),
        CLIPImageProcessor(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3).to_dict(),
    ],
)
def test_pixels_are_normalized_as_in_the_folder(tmp_path, values, nested):
    write_trunk("clip-vision", tmp_path / "clip")
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    if values is not None:
        plain = json.loads(json.dumps(values, default=str))
        write_inputs(tmp_path / "clip", plain, nested)
        chosen = {key: plain[key] for key in ("image_mean", "image_std", "do_normalize", "rescale_factor")}
        processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, **chosen)
    model = build(image=tmp_path / "clip").eval()
    pixels = processor(list(pictures()), return_tensors="pt").pixel_values
    torch.testing.assert_close(model.image.frozen_features(pictures()).hidden, pixels, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "model")
    again = SpeechImageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.image.frozen_features(pictures()).hidden, model.image.frozen_features(pictures()).hidden)


SQUASHED, CROPPED = BlipImageProcessor().to_dict(), CLIPImageProcessor().to_dict()
OLD = {"crop_size": 224, "do_center_crop": True, "do_resize": True, "size": 224}  # as in openai/clip-vit-large-patch14


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "values", "resize"),
    [
        ("clip", None, "crop"),
        ("clip", CROPPED, "crop"),
        ("clip", OLD, "crop"),
        ("clip", CROPPED | {"size": {"height": 224, "width": 224}}, "squash"),
        ("blip2", None, "squash"),
        ("blip2", SQUASHED, "squash"),
        ("blip2-retrieval", SQUASHED, "squash"),
        ("blip2", CROPPED, "crop"),
    ],
)
def test_another_resize_than_the_trunks_is_refused(tmp_path, name, values, resize, nested):
    write_trunk(name, tmp_path)
    if values is not None:
        write_inputs(tmp_path, json.loads(json.dumps(values, default=str)), nested)
    model = tiny_model()
    model.image.architecture, model.image.trunk = name.split("-")[0], str(tmp_path)
    build_model(model, resize=resize)
    other = {"crop": "squash", "squash": "crop"}[resize]
    with pytest.raises(UserError, match=rf"model\.image\.trunk: .* set --data\.resize {resize}$") as raised:
        build_model(model, resize=other)
    assert "\n" not in str(raised.value)
    build_model(tiny_model(), resize=other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("loudness", [1.0, 0.01])
def test_waveforms_are_normalized_as_in_the_trunks_training(tmp_path, normalize, nested, loudness):
    write_trunk("hubert-large", tmp_path)
    if normalize is not None:
        write_inputs(tmp_path, Wav2Vec2FeatureExtractor(do_normalize=normalize).to_dict(), nested)
    wave = loudness * torch.randn(1, 8000, generator=torch.Generator().manual_seed(3)) + 0.1 * loudness
    (features,) = build(speech=tmp_path).speech.frozen_features(F.pad(wave, (0, 500)), torch.tensor([8000]))
    wanted = wave if normalize is False else F.layer_norm(wave, wave.shape[-1:], eps=1e-5)  # as fairseq
    torch.testing.assert_close(features.hidden[:, :8000], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("side", "name", "content", "message"),
    [
        ("image", "clip", "{", r"preprocessor_config\.json cannot be read"),
        ("image", "clip", "[1]", r"preprocessor_config\.json cannot be read"),
        ("image", "clip", '{"image_mean": [0.5, 0.5]}', "expected three numbers"),
        ("image", "clip", '{"image_std": [0.5, 0.5, 0]}', "more than 0"),
        ("image", "clip", '{"image_mean": ["a", "b", "c"]}', "cannot be used"),
        ("image", "clip", '{"rescale_factor": "x"}', "cannot be used"),
        ("speech", "hubert-large", "{", r"preprocessor_config\.json cannot be read"),
        ("speech", "hubert-large", '{"sampling_rate": 8000}', "8000 Hz .*16000 Hz"),
        ("speech", "hubert-base", '{"sampling_rate": 8000}', "8000 Hz .*16000 Hz"),
    ],
)
def test_invalid_preprocessing_is_an_error_of_one_line(tmp_path, side, name, content, message):
    TRUNKS[name]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"model\.{side}\.trunk: .*{message}") as raised:
        build(**{side: tmp_path})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_a_large_trunks_last_state_is_mixed_without_its_final_norm(tmp_path, train):
    """As in SpeechCLIP; the norm that all states get would undo only the scale of the final norm, not its shift."""
    torch.manual_seed(5)
    trunk = HubertModel(HubertConfig(**HUBERT, mask_time_prob=0.0)).eval()
    torch.nn.init.normal_(trunk.encoder.layer_norm.bias)
    trunk.save_pretrained(tmp_path)
    settings = tiny_model()
    settings.speech.trunk, settings.speech.train = str(tmp_path), train
    encoder = build_model(settings).speech.eval()
    seen = []
    encoder.mix.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0]))
    last = []
    encoder.trunk.encoder.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    encoder(encoder.frozen_features(torch.randn(1, 8000), torch.tensor([8000])))
    state = last[0][0] if isinstance(last[0], tuple) else last[0]
    torch.testing.assert_close(seen[-1], F.layer_norm(state, state.shape[-1:]))
    assert len(seen) == 3
    assert not encoder.trunk.encoder.layer_norm.weight.requires_grad, "the final norm is not used"


def test_a_model_of_an_earlier_version_computes_the_same(tmp_path):
    """Its configuration has neither epsilon nor final norm, and its inputs have CLIP's mean and standard deviation."""
    model = build()
    assert not {"waveform_epsilon", "final_norm"} & model.config.speech.keys()
    assert model.speech.epsilon == 1e-7
    assert model.speech.final_norm
    write_trunk("hubert-large", tmp_path / "trunk")
    model = build(speech=tmp_path / "trunk")
    model.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (stored["speech"].pop("waveform_epsilon"), stored["speech"].pop("final_norm")) == (1e-5, False)
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    old = SpeechImageModel.from_pretrained(tmp_path / "model")
    assert (old.speech.epsilon, old.speech.final_norm) == (1e-7, True)
    assert (tuple(old.image.mean), tuple(old.image.std)) == CLIP_NORM


@pytest.mark.timeout(240)
def test_a_frozen_projection_equals_clips_at_every_zero_stage(shards, tmp_path):
    """The teacher shares it: under ZeRO-3 it must be complete there, too, and in bf16 have the right precision."""
    clip = clip_folder(tmp_path / "clip")
    runs = []
    for zero, precision in ((0, "fp32"), (3, "bf16")):
        run = run_settings(shards, tmp_path / str(zero), zero_stage=zero, precision=precision, steps=2, warmup_steps=0)
        run.model.image = config.Image(trunk=str(tmp_path / "clip"), train="1", freeze_projection=True, dropout=0.0)
        if zero == 3:
            run.deepspeed = PARTITIONED
        runs.append(run)
    run_ranks(train, 2, *runs, timeout=200)
    for run in runs:
        written = load_file(Path(run.run) / "export" / "last" / "model.safetensors")
        projection = written["image.head.project.weight"]
        torch.testing.assert_close(projection.float(), clip.visual_projection.weight, atol=1e-3, rtol=4e-3)
        assert not written["image.head.project.bias"].any()
        assert all(math.isfinite(each["loss"]) for each in losses(Path(run.run)))


def inputs_of(rank, world_size, *runs):
    arguments = []
    for run in runs:
        train(rank, world_size, run)
        stored = json.loads((Path(run.run) / "export" / "last" / "config.json").read_text())
        arguments.append([stored["speech"].get("waveform_epsilon"), stored["speech"].get("final_norm")])
    return arguments


@pytest.mark.timeout(120)
def test_a_resumed_run_keeps_the_preprocessing_of_its_trunks(shards, tmp_path):
    """Also a run of an earlier version, whose export lacks these values, and whose pictures were cropped for BLIP-2."""
    write_trunk("hubert-large", tmp_path / "hubert")
    write_trunk("blip2-vision", tmp_path / "blip2")
    run = run_settings(shards, tmp_path / "run", steps=2, stop_after=1)
    run.model.speech.trunk, run.model.speech.train = str(tmp_path / "hubert"), "none"
    assert run_ranks(inputs_of, 1, run) == [[[1e-5, False]]]
    path = tmp_path / "run" / "export" / "last" / "config.json"
    stored = json.loads(path.read_text())
    del stored["speech"]["waveform_epsilon"], stored["speech"]["final_norm"]
    path.write_text(json.dumps(stored))
    run.model.image.architecture, run.model.image.trunk = "blip2", str(tmp_path / "blip2")
    model = build_model(run.model, resize="crop", exported=stored)
    assert (model.speech.epsilon, model.speech.final_norm) == (1e-7, True)
    run.model.image.architecture, run.model.image.trunk = "clip", None
    assert run_ranks(inputs_of, 1, run) == [[[None, None]]], "the run would continue with other preprocessing"
