"""Trunks of every architecture: the features are those of transformers' own model, from a folder that it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from shards.errors import UserError
from tests.tiny import VIT, tiny_model
from tests.toolkit.model.small_trunks import IMAGE, RANDOM, SPEECH, TEXT, side_of, with_random, with_trunk, write_trunk
from tests.toolkit.model.test_retrieval import results
from tests.toolkit.model.test_speech import check_batch_independence, make_waves
from tests.toolkit.model.test_trunk import pictures
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel

LENGTHS = (16000, 9000, 5001)
WAVEFORM = [name for name in SPEECH if not name.startswith("whisper")]


def states_of(name: str, written: PreTrainedModel, waves: torch.Tensor, length: int) -> tuple[list[torch.Tensor], int]:
    """Hidden states of one utterance and its number of frames, computed by transformers alone."""
    with torch.no_grad():
        if name.startswith("whisper"):
            config = written.config
            extractor = WhisperFeatureExtractor(config.num_mel_bins, chunk_length=config.max_source_positions // 50)
            inputs = extractor(waves[:length].numpy(), sampling_rate=16000, return_tensors="pt").input_features
            encoder = written.get_encoder()
            output = encoder(inputs, output_hidden_states=True)
            frames = -(-length // 320)  # a frame is the middle of two windows of a spectrogram, 320 samples
            states = [*output.hidden_states[:-1], output.last_hidden_state]
            return [F.layer_norm(state[:, :frames], (32,)) for state in states], frames
        model = getattr(written, "wav2vec2", written)
        large = model.config.feat_extract_norm == "layer"
        wave = waves[None, :length]
        if large or name.startswith("wav2vec2"):
            wave = F.layer_norm(wave, wave.shape[-1:], eps=1e-5)  # as fairseq
        output = model(wave, output_hidden_states=True)
        states = list(output.hidden_states)
        if large:  # before the final norm
            last: list[torch.Tensor] = []
            hook = model.encoder.layers[-1].register_forward_hook(lambda module, inputs, out: last.append(out))
            model(wave)
            hook.remove()
            states[-1] = last[0][0] if isinstance(last[0], tuple) else last[0]
            states = [F.layer_norm(state, state.shape[-1:]) for state in states]
        else:
            states[-1] = output.last_hidden_state
        return states, states[0].shape[1]


@pytest.mark.parametrize("train", ["none", "1", "all"])
@pytest.mark.parametrize("name", SPEECH)
def test_a_padded_utterances_states_are_those_of_transformers_without_padding(tmp_path, name, train):
    written = write_trunk(name, tmp_path)
    encoder = build_model(with_trunk(name, tmp_path, train)).speech.eval()
    assert type(encoder.calls).__name__.lower().startswith(SPEECH[name][0][:4].replace("wav2", "wave"))
    waves, lengths = make_waves(*LENGTHS)
    mixed: list[tuple[torch.Tensor, ...]] = []
    encoder.mix.register_forward_hook(lambda module, inputs, output: mixed.append(inputs[0]))
    with torch.no_grad():
        encoded = encoder(encoder.frozen_features(F.pad(waves, (0, 3000)), lengths))
    for row, length in enumerate(LENGTHS):
        wanted, frames = states_of(name, written, waves[row], length)
        assert int(encoded.mask[row].sum()) == frames
        assert len(mixed[0]) == len(wanted) == 3
        for depth, (state, expected) in enumerate(zip(mixed[0], wanted, strict=True)):
            torch.testing.assert_close(
                state[row, :frames], expected[0, :frames], atol=2e-5, rtol=0, msg=lambda m, d=depth: f"state {d}: {m}"
            )


@pytest.mark.parametrize("train", ["none", "all"])
@pytest.mark.parametrize("name", SPEECH)
def test_the_encoding_of_an_utterance_does_not_depend_on_its_batch(tmp_path, name, train):
    write_trunk(name, tmp_path)
    encoder = build_model(with_trunk(name, tmp_path, train)).speech.eval()
    waves, lengths = make_waves(40000, 7000, 900, 9001, 40)
    check_batch_independence(encoder, waves, lengths)


def test_whisper_encodes_a_longer_utterance_window_by_window(tmp_path):
    write_trunk("whisper", tmp_path)
    encoder = build_model(with_trunk("whisper", tmp_path)).speech.eval()
    waves, lengths = make_waves(40000)
    (features,) = encoder.frozen_features(waves, lengths)
    assert features.mask.shape == (1, 125)
    for first, last in ((0, 16000), (16000, 32000), (32000, 40000)):
        (alone,) = encoder.frozen_features(waves[:, first:last], torch.tensor([last - first]))
        for whole, part in zip(features.states, alone.states, strict=True):
            torch.testing.assert_close(whole[:, first // 320 : last // 320], part, atol=1e-5, rtol=0)


def test_whisper_attends_to_the_silence_that_fills_its_window(tmp_path):
    """As in its training; a mask would give other features than those that its weights were made for."""
    write_trunk("whisper", tmp_path)
    encoder = build_model(with_trunk("whisper", tmp_path)).speech.eval()
    waves, lengths = make_waves(8000)
    (features,) = encoder.frozen_features(waves, lengths)
    assert features.hidden.shape == (1, 50, 32)
    assert features.states[-1].shape == (1, 25, 32)


def preprocessed(name: str) -> torch.Tensor:
    cls = SiglipImageProcessor if name.startswith("siglip") else BitImageProcessor
    return cls(do_resize=False, do_center_crop=False, do_convert_rgb=False, **NORM[IMAGE[name][0]])(
        list(pictures()), return_tensors="pt"
    ).pixel_values


NORM: dict[str, Any] = {
    "siglip": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "dinov2": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}


@pytest.mark.parametrize("train", ["none", "1", "all"])
@pytest.mark.parametrize("name", IMAGE)
def test_patches_and_pooled_output_are_those_of_transformers(tmp_path, name, train):
    written = write_trunk(name, tmp_path)
    encoder = build_model(with_trunk(name, tmp_path, train)).image.eval()
    model = getattr(written, "vision_model", getattr(written, "dinov2", written))
    with torch.no_grad():
        output = model(preprocessed(name))
        patches = output.last_hidden_state[:, 0 if name.startswith("siglip") else 1 :]
        embedding = F.normalize(encoder.head.project(output.pooler_output), dim=-1)
        encoded = encoder(encoder.frozen_features(pictures()))
    torch.testing.assert_close(encoded.tokens, patches, atol=2e-5, rtol=0)
    torch.testing.assert_close(encoded.embedding, embedding, atol=1e-5, rtol=0)
    assert encoded.mask.all()


@pytest.mark.parametrize("pool", ["class", "mean", "grid"])
@pytest.mark.parametrize("name", ["siglip", "dinov2"])
def test_pictures_of_another_size_have_interpolated_positions(tmp_path, name, pool):
    written = write_trunk(name, tmp_path)
    settings = with_trunk(name, tmp_path)
    settings.image.pool = pool
    encoder = build_model(settings).image.eval()
    larger = F.interpolate(pictures().float(), scale_factor=2).byte()
    model = getattr(written, "vision_model", written)
    more = {"interpolate_pos_encoding": True} if name == "siglip" else {}
    with torch.no_grad():
        hidden = encoder.frozen_features(larger).hidden
        mean, std = (torch.tensor(values)[:, None, None] for values in NORM[name].values())
        wanted = model((larger / 255 - mean) / std, **more).last_hidden_state
        torch.testing.assert_close(hidden, wanted, atol=5e-5, rtol=0)
        assert encoder(encoder.frozen_features(larger)).embedding.isfinite().all()


@pytest.mark.parametrize("architecture", RANDOM)
@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_gradients_reach_exactly_what_is_trained(architecture, train):
    model = build_model(with_random(architecture, train)).train()
    side = model.image if architecture in ("siglip", "dinov2") else model.speech
    features = (
        side.frozen_features(pictures()) if side is model.image else side.frozen_features(*make_waves(6000, 5000))
    )
    encoded = side(features)
    (encoded.embedding[:, 0].sum() + encoded.tokens.square().sum()).backward()
    for name, parameter in side.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name.split("layer")[0] for name, p in side.trunk.named_parameters() if p.requires_grad}
    assert bool(trained) == (train != "none")
    layers = side.layers if side is model.image else side.parts.layers
    counted = sum(all(p.requires_grad for p in layer.parameters()) for layer in layers)
    assert counted == {"none": 0, "1": 1, "all": 2}[train]


@pytest.mark.parametrize("name", [*SPEECH, *IMAGE])
def test_an_export_without_the_folder_computes_the_same(tmp_path, name):
    write_trunk(name, tmp_path / "trunk")
    model = build_model(with_trunk(name, tmp_path / "trunk"))
    before = results(model)
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "trunk").iterdir():
        path.unlink()
    for got, wanted in zip(results(SpeechImageModel.from_pretrained(tmp_path / "model")), before, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("architecture", RANDOM)
def test_random_weights_are_exported(tmp_path, architecture):
    model = build_model(with_random(architecture))
    before = results(model)
    model.save_pretrained(tmp_path)
    for got, wanted in zip(results(SpeechImageModel.from_pretrained(tmp_path)), before, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["wav2vec2-large", "wavlm-large", "whisper", "siglip-vision", "dinov2"])
def test_a_trunk_is_never_partly_random(tmp_path, name):
    write_trunk(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = sorted(key for key in weights if ".1." in key and "decoder" not in key)[0]
    save_file({k: v for k, v in weights.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.{side_of(name)}\.trunk: .* lacks weights of ") as raised:
        build_model(with_trunk(name, tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["speech", "image"])
def test_another_kind_is_refused_by_its_name_with_the_valid_ones(tmp_path, side):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    settings = tiny_model()
    getattr(settings, side).trunk = str(tmp_path)
    with pytest.raises(UserError) as raised:
        build_model(settings)
    expected = {
        "speech": "HuBERT (hubert), wav2vec 2.0 (wav2vec2), WavLM (wavlm), Whisper (whisper)",
        "image": "CLIP (clip_vision_model or clip), BLIP-2 (blip_2_vision_model or blip-2), "
        "SigLIP (siglip_vision_model or siglip), DINOv2 (dinov2)",
    }[side]
    assert str(raised.value) == (
        f"model.{side}.trunk: {tmp_path} holds a model of type 'bert' (config.json); expected one of {expected}"
    )


def write_inputs(folder: Path, values: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values, default=str))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("wav2vec2-base", {"sampling_rate": 8000}, "takes speech at 8000 Hz"),
        ("wavlm-large", {"sampling_rate": 8000}, "takes speech at 8000 Hz"),
        ("whisper", {"sampling_rate": 8000}, "takes speech at 8000 Hz"),
        ("whisper", {"hop_length": 200}, r"hop_length is 200 .* only 160 is supported"),
        ("whisper", {"feature_size": 80}, r"feature_size is 80 .* only 32 is supported"),
        ("whisper", {"chunk_length": 30}, r"chunk_length is 30 .* only 1 is supported"),
        ("siglip", {"image_std": [0.5, 0.5, 0]}, "more than 0"),
    ],
)
def test_other_inputs_than_supported_are_refused(tmp_path, name, values, message):
    write_trunk(name, tmp_path)
    write_inputs(tmp_path, values)
    with pytest.raises(UserError, match=rf"model\.{side_of(name)}\.trunk: .*{message}") as raised:
        build_model(with_trunk(name, tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "default"),
    [("wav2vec2-base", True), ("wav2vec2-large", True), ("wavlm-base", False), ("wavlm-large", True)],
)
def test_waveforms_are_normalized_if_the_folder_says_it(tmp_path, name, default):
    write_trunk(name, tmp_path)
    wave = 0.01 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(3)) + 0.1
    for said in (None, True, False):
        if said is not None:
            write_inputs(tmp_path, Wav2Vec2FeatureExtractor(do_normalize=said).to_dict())
        settings = with_trunk(name, tmp_path, "all")
        (features,) = build_model(settings).speech.frozen_features(F.pad(wave, (0, 500)), torch.tensor([8000]))
        normalized = default if said is None else said
        wanted = F.layer_norm(wave, wave.shape[-1:], eps=1e-5) if normalized else wave
        torch.testing.assert_close(features.hidden[:, :8000], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "resize"), [("siglip", "squash"), ("dinov2", "crop")])
def test_pictures_are_resized_as_the_folder_says(tmp_path, name, resize):
    write_trunk(name, tmp_path)
    other = {"squash": "crop", "crop": "squash"}[resize]
    cls = SiglipImageProcessor if name == "siglip" else BitImageProcessor
    for values in (None, cls(image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3).to_dict()):
        if values:
            write_inputs(tmp_path, values)
        model = build_model(with_trunk(name, tmp_path), resize=resize)
        mean = values["image_mean"] if values else NORM[name]["image_mean"]
        assert model.image.mean == pytest.approx(mean)
        with pytest.raises(UserError, match=rf"set --data\.resize {resize}$"):
            build_model(with_trunk(name, tmp_path), resize=other)


def test_siglip_without_attention_pooling_is_refused_or_averaged(tmp_path):
    SiglipVisionModel(SiglipVisionConfig(**VIT, vision_use_head=False)).save_pretrained(tmp_path)
    settings = with_trunk("siglip", tmp_path)
    with pytest.raises(UserError, match=r"has no attention pooling: set --model\.image\.pool mean"):
        build_model(settings)
    settings.image.pool = "mean"
    model = build_model(settings)
    assert not hasattr(model.image.trunk, "head")


def test_an_export_of_an_unknown_architecture_is_an_error_of_one_line(tmp_path):
    build_model(tiny_model()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["image"]["architecture"] = "vit"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"image\.architecture: unknown architecture 'vit'; known are clip, blip2, "):
        SpeechImageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["wavlm-base", "whisper", "siglip", "dinov2"])
def test_no_code_of_a_folder_is_run(tmp_path, name):
    write_trunk(name, tmp_path)
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    write_inputs(tmp_path, {"auto_map": {"AutoImageProcessor": "trap.Trap", "AutoFeatureExtractor": "trap.Trap"}})
    build_model(with_trunk(name, tmp_path))
    assert not (tmp_path / "sprung").exists()
