import json
import pickle
import re
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
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    HubertConfig,
    HubertForCTC,
    HubertModel,
)

from shards.errors import UserError
from tests.tiny import HUBERT, VIT, tiny_model
from tests.toolkit.model.small_trunks import BASE, TEXT, side_of
from tests.toolkit.model.test_retrieval import results
from toolkit.config import schema as config
from toolkit.config.validate import check_config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel, build_teacher

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
OTHERS = {"bert": lambda: BertModel(BertConfig(**TEXT))}


def write_trunk(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model with transformers; return its weights by their names in the trunk."""
    torch.manual_seed(5)
    model = TRUNKS[name]()
    model.save_pretrained(folder)
    state = model.state_dict().items()
    return {key.removeprefix("hubert.").removeprefix("vision_model."): tensor for key, tensor in state}


def build(**trunks) -> SpeechImageModel:
    """A tiny model; trunks: speech or image = folder."""
    torch.manual_seed(0)
    model = tiny_model()
    for side, folder in trunks.items():
        getattr(model, side).trunk = str(folder)
    return build_model(model)


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_are_loaded_from_folders_of_transformers(tmp_path, name):
    weights = write_trunk(name, tmp_path / "trunk")
    model = build(**{side_of(name): tmp_path / "trunk"})
    trunk = getattr(model, side_of(name)).trunk.state_dict()
    assert len(trunk) > 20
    for key, tensor in trunk.items():
        assert torch.equal(tensor, weights[key]), f"{key} differs from the folder's"
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
    """Creates a file if it is unpickled unsafely."""

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
    assert (tmp_path / "sprung").exists(), "the test itself is broken: unpickling does not create the file"


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
def test_a_trunk_is_never_partly_random(tmp_path, name, edit, problem):
    write_trunk(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.{side_of(name)}\.trunk: .*({problem})") as raised:
        build(**{side_of(name): tmp_path})
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_an_error_of_one_line():
    with pytest.raises(UserError, match=r"model\.image\.trunk: no folder \./nothing/here"):
        build(image="./nothing/here")


def test_a_hub_id_without_network_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.speech\.trunk: cannot read nobody/nothing: ") as raised:
        build(speech="nobody/nothing")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["speech", "image"])
@pytest.mark.parametrize("name", [*OTHERS, "clip", "hubert-ctc", "blip2-retrieval"])
def test_another_kind_of_model_is_refused_by_its_type(tmp_path, name, side):
    if (side, name) in (("speech", "hubert-ctc"), ("image", "clip"), ("image", "blip2-retrieval")):
        return
    (OTHERS | TRUNKS)[name]().save_pretrained(tmp_path)
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    start = f"model.{side}.trunk: {tmp_path} holds a model of type {model_type!r} (config.json); expected one of "
    with pytest.raises(UserError, match=re.escape(start)):
        build(**{side: tmp_path})


@pytest.mark.parametrize("name", ["clip", "blip2", "blip2-retrieval"])
def test_weights_outside_the_trunk_are_ignored_whatever_their_names(tmp_path, name):
    weights = write_trunk(name, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    strange = ["embeddings.position_embeddings.weight", "encoder.layers.7.mlp.fc1.bias", "post_layernorm.scale"]
    save_file(stored | {key: torch.ones(3) for key in strange}, tmp_path / "model.safetensors", {"format": "pt"})
    for key, tensor in build(image=tmp_path).image.trunk.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def clip_folder(folder: Path, dim: int = 16, cls: type = CLIPModel) -> torch.nn.Module:
    """Save a CLIP with projection dimension `dim`."""
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
def test_image_embeddings_are_initialized_as_clips(tmp_path, cls, freeze):
    clip = clip_folder(tmp_path / "clip", cls=cls)
    settings = tiny_model()
    image = settings.image
    image.trunk, image.train, image.freeze_projection = str(tmp_path / "clip"), "none", freeze
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
def test_a_projection_of_another_size_is_random_or_refused(tmp_path, edit, folder):
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
