import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from shards.errors import UserError
from tests.distributed import run_ranks
from tests.tiny import HUBERT, VIT, tiny_model
from tests.toolkit.model.test_retrieval import results
from tests.toolkit.training.test_trainer import losses, shards, train  # noqa: F401  the fixture
from tests.toolkit.training.test_trainer import settings as run_settings
from toolkit.config import schema as config
from toolkit.config.validate import check_config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel, build_teacher

BASE = {**HUBERT, "feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "ffn_dim": 32}
OPT |= {"vocab_size": 50, "num_attention_heads": 2}

TRUNKS = {
    "hubert-base": lambda: HubertModel(HubertConfig(**BASE)),
    "hubert-large": lambda: HubertModel(HubertConfig(**HUBERT)),
    "hubert-ctc": lambda: HubertForCTC(HubertConfig(**HUBERT, vocab_size=12)),
    "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT)),
    "blip2-vision": lambda: Blip2VisionModel(Blip2VisionConfig(**VIT)),
    "blip2": lambda: Blip2Model(
        Blip2Config(vision_config=VIT, qformer_config={**TEXT, "encoder_hidden_size": 32}, text_config=OPT)
    ),
    "blip2-retrieval": lambda: Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config=VIT,
            qformer_config={**TEXT, "encoder_hidden_size": 32, "use_qformer_text_input": True},
            text_config=OPT,
        )
    ),
}
WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 8}
WHISPER |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
OTHERS = {
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**HUBERT)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**HUBERT)),
    "bert": lambda: BertModel(BertConfig(**TEXT)),
    "whisper": lambda: WhisperModel(WhisperConfig(**WHISPER)),
}


def write_trunk(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Let transformers save a model; its weights by their names within the trunk."""
    torch.manual_seed(5)
    model = TRUNKS[name]()
    model.save_pretrained(folder)
    prefixes = ("hubert.", "vision_model.")
    weights = {}
    for key, tensor in model.state_dict().items():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        weights[key] = tensor
    return weights


def build(**trunks) -> SpeechImageModel:
    """A tiny model; trunks: speech or image = folder."""
    torch.manual_seed(0)
    model = tiny_model()
    for side, folder in trunks.items():
        getattr(model, side).trunk = str(folder)
    return build_model(model)


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_are_read_from_what_transformers_wrote(tmp_path, name):
    weights = write_trunk(name, tmp_path / "trunk")
    side = "speech" if name.startswith("hubert") else "image"
    model_config = tiny_model()
    getattr(model_config, side).trunk = str(tmp_path / "trunk")
    model_config.image.architecture = "blip2" if name.startswith("blip2") else "clip"
    model = build_model(model_config)

    trunk = getattr(model, side).trunk.state_dict()
    assert len(trunk) > 20
    for key, tensor in trunk.items():
        assert torch.equal(tensor, weights[key]), f"{key} is not what the folder holds"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    before = results(model)
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "trunk").iterdir():
        path.unlink()
    for got, wanted in zip(results(SpeechImageModel.from_pretrained(tmp_path / "model")), before, strict=True):
        assert torch.equal(got, wanted)


def rename_weights(folder: Path, rename) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("style", ["old", "new"])
def test_either_naming_of_weight_norm_is_read(tmp_path, style):
    """torch renamed weight_g and weight_v; both are on the hub."""
    weights = write_trunk("hubert-large", tmp_path)
    pairs = [("conv.weight_g", "conv.parametrizations.weight.original0")]
    pairs += [("conv.weight_v", "conv.parametrizations.weight.original1")]

    def rename(key: str) -> str:
        for old, new in pairs:
            key = key.replace(new, old) if style == "old" else key.replace(old, new)
        return key

    rename_weights(tmp_path, rename)
    assert any(
        ("weight_g" if style == "old" else "original0") in key for key in load_file(tmp_path / "model.safetensors")
    )
    for key, tensor in build(speech=tmp_path).speech.trunk.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_half_precision_folder_is_trained_in_float32(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**VIT)).half().save_pretrained(tmp_path)
    assert {p.dtype for p in build(image=tmp_path).parameters()} == {torch.float32}


def to_pickle(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_bin_weights_are_read(tmp_path):
    weights = write_trunk("hubert-large", tmp_path)
    to_pickle(tmp_path, load_file(tmp_path / "model.safetensors"))
    for key, tensor in build(speech=tmp_path).speech.trunk.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


class Trap:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    write_trunk("hubert-large", tmp_path)
    to_pickle(tmp_path, {"weight": Trap(tmp_path / "sprung")})
    with pytest.raises(UserError, match=r"model\.speech\.trunk: cannot read"):
        build(speech=tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists(), "the trap itself does not work"


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        (
            "hubert-large",
            lambda w: w.pop("encoder.layers.1.final_layer_norm.bias"),
            "lacks .*layers.1.final_layer_norm",
        ),
        ("clip", lambda w: w.pop("vision_model.post_layernorm.bias"), "lacks .*post_layernorm.bias"),
        ("blip2", lambda w: w.pop("vision_model.encoder.layers.0.mlp.fc1.bias"), "lacks .*layers.0.mlp.fc1.bias"),
        *(
            (
                name,
                lambda w: w.update({"vision_model.encoder.layers.2.layer_norm1.bias": torch.zeros(32)}),
                "no room in its config.json .*layers.2.layer_norm1.bias",
            )
            for name in ("clip", "blip2", "blip2-retrieval")
        ),
        (
            "hubert-large",
            lambda w: w.update({"encoder.layers.2.layer_norm.bias": torch.zeros(32)}),
            "no room in its config.json .*layers.2.layer_norm.bias",
        ),
        (
            "hubert-large",
            lambda w: w.update({"encoder.layer_norm.bias": torch.zeros(31)}),
            "has other shapes of .*encoder.layer_norm.bias",
        ),
    ],
)
def test_a_trunk_is_never_random_in_part(tmp_path, name, edit, problem):
    write_trunk(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    side = "speech" if name.startswith("hubert") else "image"
    model = tiny_model()
    model.image.architecture = "blip2" if name.startswith("blip2") else "clip"
    getattr(model, side).trunk = str(tmp_path)
    with pytest.raises(UserError, match=rf"model\.{side}\.trunk: .*({problem})") as raised:
        build_model(model)
    assert "\n" not in str(raised.value)


def test_missing_folder_is_one_line():
    with pytest.raises(UserError, match=r"model\.image\.trunk: no folder \./nothing/here"):
        build(image="./nothing/here")


def test_hub_id_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.speech\.trunk: cannot read nobody/nothing: ") as raised:
        build(speech="nobody/nothing")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["speech", "image"])
@pytest.mark.parametrize("name", [*OTHERS, "clip", "hubert-ctc", "blip2-retrieval"])
def test_another_kind_of_model_is_named_by_its_type(tmp_path, name, side):
    if (side, name) in (("speech", "hubert-ctc"), ("image", "clip")):
        return
    (OTHERS | TRUNKS)[name]().save_pretrained(tmp_path)
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    supported = {"speech": "expected HuBERT: hubert", "image": "expected CLIP: clip_vision_model or clip"}[side]
    with pytest.raises(UserError) as raised:
        build(**{side: tmp_path})
    assert str(raised.value) == (
        f"model.{side}.trunk: {tmp_path} holds a model of type {model_type!r} (config.json); {supported}"
    )


@pytest.mark.parametrize("name", ["clip", "blip2", "blip2-retrieval"])
def test_weights_beside_the_tower_are_not_its_own_whatever_their_names(tmp_path, name):
    weights = write_trunk(name, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    strange = ["embeddings.position_embeddings.weight", "encoder.layers.7.mlp.fc1.bias", "post_layernorm.scale"]
    save_file(stored | {key: torch.ones(3) for key in strange}, tmp_path / "model.safetensors", {"format": "pt"})
    model = tiny_model()
    model.image.architecture, model.image.trunk = name.split("-")[0], str(tmp_path)
    for key, tensor in build_model(model).image.trunk.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def clip_folder(folder: Path, dim: int = 16, cls: type = CLIPModel) -> torch.nn.Module:
    """Let transformers save a CLIP that projects to `dim` values."""
    torch.manual_seed(6)
    if cls is CLIPModel:
        model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=dim))
    else:
        model = cls(CLIPVisionConfig(**VIT, projection_dim=dim))
    model.eval().save_pretrained(folder)
    return model


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("cls", [CLIPModel, CLIPVisionModelWithProjection])
def test_pictures_vectors_begin_as_clips_own(tmp_path, cls, freeze):
    clip = clip_folder(tmp_path / "clip", cls=cls)
    settings = tiny_model()
    settings.image.trunk, settings.image.train, settings.image.freeze_projection = (
        str(tmp_path / "clip"),
        "none",
        freeze,
    )
    model = build_model(settings).eval()
    pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(list(pictures()), return_tensors="pt")
    with torch.no_grad():
        hidden = clip.vision_model(**pixels).pooler_output
        wanted = F.normalize(clip.visual_projection(hidden), dim=-1)
        torch.testing.assert_close(model.encode_image(pictures()).embedding, wanted, atol=1e-6, rtol=0)

    trained = {name for name, p in model.image.named_parameters() if p.requires_grad}
    assert trained == (set() if freeze else {"head.project.weight", "head.project.bias"})
    model.save_pretrained(tmp_path / "model")
    again = SpeechImageModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.encode_image(pictures()).embedding, wanted, atol=1e-6, rtol=0)
    assert {name for name, p in again.image.named_parameters() if p.requires_grad} == trained
    teacher = build_teacher(model).bfloat16() if freeze else build_teacher(model)
    assert F.cosine_similarity(teacher.encode_image(pictures()).embedding, wanted).min() > 0.99


@pytest.mark.parametrize(
    ("edit", "folder"),
    [
        (lambda m: setattr(m, "embed_dim", 24), CLIPModel),
        (lambda m: None, CLIPVisionModel),
        (lambda m: setattr(m.image, "pool", "mean"), CLIPModel),
        (lambda m: setattr(m.image, "head_layers", 1), CLIPModel),
    ],
)
def test_where_the_projection_does_not_fit_it_begins_at_random_or_is_refused(tmp_path, edit, folder):
    clip_folder(tmp_path, cls=folder)
    settings = tiny_model()
    settings.image.trunk = str(tmp_path)
    edit(settings)
    weight = build_model(settings).image.head.project.weight
    assert weight.shape == (settings.embed_dim, 32)
    assert weight.requires_grad
    settings.image.freeze_projection = True
    build_checked = (lambda: check_config(config.Config(model=settings)), lambda: build_model(settings))
    with pytest.raises(UserError, match=r"model\.image\.freeze_projection") as raised:
        [step() for step in build_checked]
    assert "\n" not in str(raised.value)


CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def write_inputs(folder: Path, values: dict, nested: bool = False) -> None:
    """The file that says how inputs are prepared, or the section of the newer one."""
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
def test_pixels_are_normalised_as_the_folder_says(tmp_path, values, nested):
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
def test_pictures_become_squares_as_the_trunk_is_used_to_or_not_at_all(tmp_path, name, values, resize, nested):
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
@pytest.mark.parametrize("normalise", [None, True, False])
@pytest.mark.parametrize("loudness", [1.0, 0.01])
def test_waveforms_are_normalised_as_the_trunk_was_trained(tmp_path, normalise, nested, loudness):
    write_trunk("hubert-large", tmp_path)
    if normalise is not None:
        write_inputs(tmp_path, Wav2Vec2FeatureExtractor(do_normalize=normalise).to_dict(), nested)
    wave = loudness * torch.randn(1, 8000, generator=torch.Generator().manual_seed(3)) + 0.1 * loudness
    (features,) = build(speech=tmp_path).speech.frozen_features(F.pad(wave, (0, 500)), torch.tensor([8000]))
    wanted = wave if normalise is False else F.layer_norm(wave, wave.shape[-1:], eps=1e-5)  # as fairseq
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
def test_inputs_that_make_no_sense_are_one_line(tmp_path, side, name, content, message):
    TRUNKS[name]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"model\.{side}\.trunk: .*{message}") as raised:
        build(**{side: tmp_path})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_a_large_trunks_last_state_is_mixed_without_its_final_norm(tmp_path, train):
    """As SpeechCLIP's; the plain norm that all states get would only undo the scale and keep the shift."""
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
    assert not encoder.trunk.encoder.layer_norm.weight.requires_grad, "it is not used"


def test_a_model_of_before_computes_as_before(tmp_path):
    """Its configuration says neither epsilon nor final norm, and its inputs have CLIP's mean and deviation."""
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
def test_a_frozen_projection_stays_clips_own_at_every_stage(shards, tmp_path):  # noqa: F811
    """The teacher shares it: under ZeRO 3 it has to be whole there, too, and in bf16 of the right precision."""
    clip = clip_folder(tmp_path / "clip")
    runs = []
    for zero, precision in ((0, "fp32"), (3, "bf16")):
        run = run_settings(shards, tmp_path / str(zero), zero_stage=zero, precision=precision, steps=2, warmup_steps=0)
        run.model.image = config.Image(trunk=str(tmp_path / "clip"), train="1", freeze_projection=True, dropout=0.0)
        if zero == 3:  # else so small a weight is whole everywhere anyway
            run.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        runs.append(run)
    run_ranks(train, 2, *runs, timeout=200)
    for run in runs:
        written = load_file(Path(run.run) / "export" / "last" / "model.safetensors")
        projection = written["image.head.project.weight"]
        torch.testing.assert_close(projection.float(), clip.visual_projection.weight, atol=1e-3, rtol=4e-3)
        assert not written["image.head.project.bias"].any()
        assert all(math.isfinite(each["loss"]) for each in losses(Path(run.run)))


def inputs_of(rank, world_size, *runs):
    found = []
    for run in runs:
        train(rank, world_size, run)
        stored = json.loads((Path(run.run) / "export" / "last" / "config.json").read_text())
        found.append([stored["speech"].get("waveform_epsilon"), stored["speech"].get("final_norm")])
    return found


@pytest.mark.timeout(120)
def test_a_run_goes_on_with_its_trunks_used_as_they_were(shards, tmp_path):  # noqa: F811
    """One of before, too, whose export says nothing of it, and whose pictures were cropped for BLIP-2."""
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
    assert run_ranks(inputs_of, 1, run) == [[[None, None]]], "the rest of the run was trained otherwise"
