"""LoRA: only its weights are trained, and an export has them merged."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPModel, HubertConfig, HubertModel

from shards.errors import UserError
from tests.tiny import HUBERT, VIT, tiny_model
from tests.toolkit.model.small_trunks import BASE, IMAGE, SPEECH, side_of, with_trunk, write_trunk
from tests.toolkit.model.test_retrieval import results
from tests.toolkit.model.test_speech import make_waves
from tests.toolkit.model.test_trunk import clip_folder, pictures
from toolkit.config import schema as config
from toolkit.config.validate import check_config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel, build_teacher

OLDER: dict[str, Any] = {
    "hubert-base": lambda folder: HubertModel(HubertConfig(**BASE)).save_pretrained(folder),
    "hubert-large": lambda folder: HubertModel(HubertConfig(**HUBERT)).save_pretrained(folder),
    "clip": lambda folder: clip_folder(folder, cls=CLIPModel),
    "blip2": lambda folder: Blip2VisionModel(Blip2VisionConfig(**VIT, initializer_range=0.1)).save_pretrained(folder),
}
NAMES = [*OLDER, *SPEECH, *IMAGE]


def adapted(name: str, folder: Path, rank: int = 3, **more: Any) -> config.Model:
    """A tiny model with LoRA on one trunk, from a folder; the other trunk is frozen."""
    torch.manual_seed(4)
    if name in OLDER:
        OLDER[name](folder)
    else:
        write_trunk(name, folder)
    settings = with_trunk(name, folder)
    side = getattr(settings, side_of(name))
    settings.speech.train = settings.image.train = "none"
    side.lora_rank = rank
    for key, value in more.items():
        setattr(side, key, value)
    return settings


def train_adapters(model: SpeechImageModel) -> None:
    """Make the adapters change something, as training does."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_them_merged(tmp_path: Path, name: str) -> None:
    settings = adapted(name, tmp_path / "trunk")
    torch.manual_seed(1)
    model = build_model(settings)
    side = side_of(name)
    getattr(settings, side).lora_rank = 0
    torch.manual_seed(1)
    plain = build_model(settings)
    for part in ("head", "mix"):
        if hasattr(getattr(model, side), part):
            getattr(getattr(model, side), part).load_state_dict(getattr(getattr(plain, side), part).state_dict())
    index = {"speech": 0, "image": 2}[side]
    before, without = results(model), results(plain)
    torch.testing.assert_close(
        before[index], without[index], atol=1e-6, rtol=0, msg="untrained adapters change something"
    )
    train_adapters(model)
    trained = results(model)
    assert (trained[index] - before[index]).abs().max() > 1e-3, "the adapters change nothing"
    model.save_pretrained(tmp_path / "model")
    again = SpeechImageModel.from_pretrained(tmp_path / "model")
    for got, wanted in zip(results(again), trained, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert "lora" not in (tmp_path / "model/config.json").read_text()
    plain.save_pretrained(tmp_path / "plain")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("model", "plain")]
    assert names[0] == names[1]


def test_an_export_is_loaded_without_peft(tmp_path: Path) -> None:
    build_model(adapted("clip", tmp_path / "trunk")).save_pretrained(tmp_path / "model")
    code = (
        "import sys; sys.modules['peft'] = None; from toolkit.model.retrieval import SpeechImageModel;"
        f"SpeechImageModel.from_pretrained({str(tmp_path / 'model')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_adapters_and_heads_only(tmp_path: Path, name: str) -> None:
    model = build_model(adapted(name, tmp_path)).train()
    train_adapters(model)
    side = getattr(model, side_of(name))
    inputs = make_waves(6000, 5000) if side is model.speech else (pictures(),)
    encoded = side(side.frozen_features(*inputs))
    (encoded.embedding[:, 0].sum() + encoded.tokens.square().sum()).backward()
    for key, parameter in side.named_parameters():
        expected = not key.startswith("trunk.") or "lora_" in key or key.startswith("trunk.head.")
        assert parameter.requires_grad == expected == (parameter.grad is not None), key
    adapters = {key for key, p in side.trunk.named_parameters() if "lora_" in key}
    each = {"blip2": 1}.get(name, 2)
    assert len(adapters) == 2 * 2 * each, "A and B of two layers"
    with torch.no_grad():
        assert not side.frozen_features(*inputs)[0].hidden.requires_grad if side is model.speech else True


def test_an_adapted_layer_is_the_equation(tmp_path: Path) -> None:
    model = build_model(adapted("clip", tmp_path, rank=2, lora_alpha=6.0, lora_targets=["fc1"]))
    train_adapters(model)
    layer = model.image.layers[1].mlp.fc1
    x = torch.randn(5, 32)
    down, up = layer.lora_A.default.weight, layer.lora_B.default.weight
    wanted = x @ layer.base_layer.weight.T + layer.base_layer.bias + 3.0 * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), wanted)
    model.save_pretrained(tmp_path / "model")
    written = load_file(tmp_path / "model/model.safetensors")["image.trunk.encoder.layers.1.mlp.fc1.weight"]
    torch.testing.assert_close(written, layer.base_layer.weight + 3.0 * up @ down)


def test_an_export_in_bf16_differs_by_rounding(tmp_path: Path) -> None:
    model = build_model(adapted("hubert-large", tmp_path)).bfloat16()
    train_adapters(model)
    trained = results(model)
    model.save_pretrained(tmp_path / "model")
    again = SpeechImageModel.from_pretrained(tmp_path / "model", dtype="auto")
    assert {value.dtype for value in again.state_dict().values()} == {torch.bfloat16}
    torch.testing.assert_close(results(again)[0], trained[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_copies_adapters_and_shares_the_rest(tmp_path: Path, name: str) -> None:
    model = build_model(adapted(name, tmp_path))
    train_adapters(model)
    teacher = build_teacher(model)
    wanted = results(model)[:4]
    with torch.no_grad():
        speech = teacher.encode_speech(*make_waves(9000, 7000)), model.encode_speech(*make_waves(9000, 7000))
        image = teacher.encode_image(pictures()), model.encode_image(pictures())
    for own, other in (speech, image):
        torch.testing.assert_close(own.embedding, other.embedding, atol=1e-6, rtol=0)
    assert len(wanted) == 4
    theirs = dict(teacher.named_parameters())
    for key, parameter in model.named_parameters():
        if key.startswith(("speech.", "image.")):
            assert (theirs[key] is parameter) == (not parameter.requires_grad), key
    base = [key for key, module in model.named_modules() if key.endswith(".base_layer")]
    assert base
    for key in base:
        assert teacher.get_submodule(key) is model.get_submodule(key), "ZeRO-3 has its hooks on the student's module"


@pytest.mark.parametrize("target", ["fc3", "layers"])
def test_a_target_that_is_not_there_is_an_error_of_one_line(tmp_path: Path, target: str) -> None:
    with pytest.raises(UserError) as raised:
        build_model(adapted("clip", tmp_path, lora_targets=["q_proj", target]))
    assert str(raised.value) == (
        f"model.image.lora_targets: the trunk's layers have no linear layer {target!r}; they have "
        "fc1, fc2, k_proj, out_proj, q_proj, v_proj"
    )


def test_without_peft_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = adapted("clip", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'speech-image-toolkit\[lora\]'"):
        build_model(settings)


def test_a_trained_trunk_is_not_adapted() -> None:
    settings = tiny_model()
    settings.speech.lora_rank = 2
    with pytest.raises(UserError, match=r"model\.speech\.lora_rank 2 adapts a frozen trunk.* is all: set it to none"):
        check_config(config.Config(model=settings))
