import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2Model,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
)

from shards.errors import UserError
from tests.tiny import HUBERT, VIT, tiny_model
from tests.toolkit.test_retrieval import results
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel

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
    model.image.architecture = "blip2" if name == "blip2" else "clip"
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


def test_the_wrong_kind_of_trunk_is_refused(tmp_path):
    write_trunk("hubert-large", tmp_path)
    with pytest.raises(UserError, match=r"model\.image\.trunk"):
        build(image=tmp_path)
