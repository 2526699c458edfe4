"""An exported model in sentence-transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from shards.errors import UserError
from tests.toolkit.indexing_files import EXPORT, save_audio, save_image
from toolkit.hub.card import write_modules
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer


@pytest.fixture
def export(tmp_path):
    shutil.copytree(EXPORT, tmp_path / "export")
    write_modules(tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def files(tmp_path):
    return [
        save_audio(tmp_path / "long.wav", 3),
        save_image(tmp_path / "a.jpg", 0),
        save_audio(tmp_path / "b.flac", 1),
        save_image(tmp_path / "c.png", 2),
    ]


def ours(files):
    """Each file alone, with the toolkit's own classes."""
    model, processor = SpeechImageModel.from_pretrained(EXPORT), SpeechImageProcessor.from_pretrained(EXPORT)
    with torch.no_grad():
        return torch.cat(
            [
                model.get_image_features(**processor(images=[file]))
                if file.suffix in (".jpg", ".png")
                else model.get_audio_features(**processor(speech=[file]))
                for file in files
            ]
        ).numpy()


def test_a_mixed_list_gives_our_embeddings_in_its_order(export, files):
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    names = [str(file) for file in files]
    for batch_size in (32, 1):
        assert np.abs(model.encode(names, batch_size=batch_size) - ours(files)).max() <= 1e-6
    assert np.abs(model.encode(files) - ours(files)).max() <= 1e-6, "paths"
    assert np.abs(model.encode(names[0]) - ours(files)[0]).max() <= 1e-6, "one input"
    assert model.get_embedding_dimension() == ours(files).shape[1]
    expected = ours(files)[[0, 2]] @ ours(files)[[1, 3]].T
    result = model.similarity(model.encode([names[0], names[2]]), model.encode([names[1], names[3]])).numpy()
    assert np.abs(result - expected).max() <= 1e-6


def test_arrays_images_and_dictionaries(export, files):
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    wave, _ = soundfile.read(files[0], dtype="float32")
    image = Image.open(files[3])
    inputs = [wave, image, torch.from_numpy(wave), np.asarray(image), {"array": wave, "sampling_rate": 16000}]
    inputs += [{"image": image}, {"audio": wave}]
    expected = ours([files[0], files[3], files[0], files[3], files[0], files[3], files[0]])
    assert np.abs(model.encode(inputs) - expected).max() <= 1e-6


def test_another_sampling_rate_is_resampled(export, tmp_path):
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    wave = (0.5 * np.sin(np.arange(4000) * (2 * np.pi * 300 / 8000))).astype(np.float32)
    soundfile.write(tmp_path / "slow.wav", wave, 8000, subtype="FLOAT")
    assert np.abs(model.encode({"array": wave, "sampling_rate": 8000}) - ours([tmp_path / "slow.wav"])[0]).max() <= 1e-6


def test_saving_and_loading_again(export, files, tmp_path):
    SentenceTransformer(str(export), trust_remote_code=True, device="cpu").save_pretrained(str(tmp_path / "saved"))
    modules = json.loads((tmp_path / "saved/modules.json").read_text())
    assert modules == json.loads((export / "modules.json").read_text())
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert np.abs(again.encode(files) - ours(files)).max() <= 1e-6


def test_no_code_of_the_folder_runs(export, files):
    """A file under the name of the module lies unread; without modules.json no trust is needed."""
    for name in ("sentence_transformer.py", "toolkit/hub/sentence_transformer.py"):
        path = export / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    assert type(model[0]).__module__ == "toolkit.hub.sentence_transformer"
    module = type(model[0]).load(export)
    assert np.abs(SentenceTransformer(modules=[module], device="cpu").encode(files) - ours(files)).max() <= 1e-6
    assert not list(export.rglob("ran"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Path("notes.txt"), r"notes\.txt: expected a file"),
        (Path("gone.wav"), r"gone\.wav"),
        (np.zeros((2, 100), np.float32), r"an array \[2, 100\] of float32"),
        (np.zeros(100, np.int16), "expected a float array"),
        ({"image": np.zeros(100, np.float32)}, "under 'image' is of the modality 'audio'"),
        ({"role": "user", "content": "hello"}, "expected a path, an array or an image"),
    ],
)
def test_other_inputs_are_refused_in_one_line(export, given, message):
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    with pytest.raises(UserError, match=message) as raised:
        model.encode([given])
    assert "\n" not in str(raised.value)


def test_text_and_other_backends_are_refused(export):
    model = SentenceTransformer(str(export), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match="not supported"):
        model.encode(["a red circle"])
    with pytest.raises(UserError, match="backend 'onnx'"):
        SentenceTransformer(str(export), trust_remote_code=True, backend="onnx")
