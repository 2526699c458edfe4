"""transformers' Auto classes load exported models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

import toolkit.hub.auto  # noqa: F401 (it registers)
from shards.errors import UserError
from tests.tiny import tiny_model
from tests.toolkit.indexing_files import EXPORT, save_audio, save_image
from toolkit.model.build import build_model
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageConfig, SpeechImageModel

ROOT = Path(__file__).parents[3]


@pytest.fixture
def export(tmp_path):
    """A model and its processor, as this version writes them."""
    build_model(tiny_model()).save_pretrained(tmp_path / "export")
    SpeechImageProcessor(image_size=32, max_seconds=1.0).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def embeddings(model, processor, folder):
    inputs = processor(
        images=[save_image(folder / f"{n}.png", n) for n in range(3)],
        speech=[save_audio(folder / f"{n}.wav", n) for n in range(2)],
    )
    with torch.no_grad():
        images = model.get_image_features(inputs["images"])
        return images, model.get_audio_features(inputs["waveforms"], inputs["lengths"])


@pytest.mark.parametrize("old", [False, True], ids=["new export", "export of 0.1"])
def test_auto_classes_give_the_same_embeddings(export, tmp_path, old):
    folder = EXPORT if old else export
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is SpeechImageModel
    assert type(processor) is SpeechImageProcessor
    assert type(AutoConfig.from_pretrained(folder)) is SpeechImageConfig
    assert not model.training
    ours = embeddings(
        SpeechImageModel.from_pretrained(folder), SpeechImageProcessor.from_pretrained(folder), tmp_path / "files"
    )
    for auto, own in zip(embeddings(model, processor, tmp_path / "files"), ours, strict=True):
        assert auto.shape[1] == model.config.embed_dim
        assert (auto - own).abs().max() <= 1e-6
        assert torch.allclose(auto.norm(dim=1), torch.ones(len(auto)), atol=1e-5)


def test_the_processor_names_its_class(export):
    path = export / "preprocessor_config.json"
    assert json.loads(path.read_text())["processor_class"] == "SpeechImageProcessor"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "CLIPProcessor"}))
    with pytest.raises(Exception, match="CLIPProcessor"):
        SpeechImageProcessor.from_pretrained(export)


def test_no_code_of_the_folder_runs(export, tmp_path):
    """Not even where its files name code of their own."""
    evil = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
    for name, keys in {
        "config.json": ("AutoConfig", "AutoModel"),
        "preprocessor_config.json": ("AutoProcessor",),
    }.items():
        values = json.loads((export / name).read_text())
        values["auto_map"] = dict.fromkeys(keys, "evil.Evil")
        (export / name).write_text(json.dumps(values))
    (export / "evil.py").write_text(evil)
    for trust in (False, True):
        assert type(AutoModel.from_pretrained(export, trust_remote_code=trust)) is SpeechImageModel
        with pytest.raises(UserError, match="not a processor of this toolkit"):
            AutoProcessor.from_pretrained(export, trust_remote_code=trust)
    assert not (export / "ran").exists()


def test_a_hub_id_that_does_not_exist_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and not on the hub") as raised:
        SpeechImageProcessor.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(raised.value)


def test_importing_the_toolkit_stays_light():
    code = (
        "import toolkit, toolkit.hub, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
