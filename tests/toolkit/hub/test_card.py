"""The model card: its contents, read back by the hub's own classes."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from shards.errors import UserError
from tests.toolkit.indexing_files import EXPORT
from toolkit.hub.card import MARK, current_card, model_card
from toolkit.model.retrieval import SpeechImageModel

COMPATIBILITY = EXPORT.parents[2]
RECALL = {
    "split": "test",
    "pictures": 4,
    "captions": 7,
    "coarse": {
        "speech_to_image": {"R@1": 28.571, "R@5": 100.0},
        "image_to_speech": {"R@1": 25.0, "R@5": 75.0},
        "mean_R@1": 26.786,
    },
    "checkpoint": "best",
}


@pytest.fixture
def run(tmp_path):
    """A run of 0.1 beside its shards, with results."""
    shutil.copytree(COMPATIBILITY / "run", tmp_path / "run")
    shards = tmp_path / "shards"
    shutil.copytree(COMPATIBILITY / "shards", shards)
    config = tmp_path / "run/config.yaml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(f"  shards: {shards}" if line.startswith("  shards:") else line for line in lines))
    step = json.loads((tmp_path / "run/export/best/progress.json").read_text())["step"]
    (tmp_path / "run/recall.json").write_text(json.dumps({**RECALL, "shards": str(shards), "step": step}))
    environment = {
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "host": "secret-host",
        "command": ["secret-cmd"],
    }
    (tmp_path / "run/environment.json").write_text(json.dumps({**environment, "world_size": 2, "gpus": []}))
    return tmp_path / "run"


def figures(card):
    return {each.metric_name: each.metric_value for each in card.data.eval_results or []}


def test_the_hubs_classes_read_the_card_back(run):
    card = ModelCard(str(model_card(run / "export/best", run, "me/spoken", "cc-by-4.0")), ignore_metadata_errors=False)
    assert (card.data.license, card.data.library_name, card.data.metrics) == (
        "cc-by-4.0",
        "speech-image-toolkit",
        ["recall"],
    )
    assert {"audio", "image"} <= set(card.data.tags)
    assert card.data.model_name == "me/spoken"
    expected = {f"{cut}, speech to image": value for cut, value in RECALL["coarse"]["speech_to_image"].items()}
    expected |= {f"{cut}, image to speech": value for cut, value in RECALL["coarse"]["image_to_speech"].items()}
    assert figures(card) == expected
    result = card.data.eval_results[0]
    manifest = json.loads((run.parent / "shards/manifest.json").read_text())
    assert (result.dataset_name, result.dataset_split, result.metric_type) == (manifest["corpus"], "test", "recall")


def test_the_text_says_what_the_folder_and_its_run_hold(run):
    text = str(model_card(run / "export/best", run, "me/spoken"))
    model = SpeechImageModel.from_pretrained(EXPORT)
    manifest = json.loads((run.parent / "shards/manifest.json").read_text())
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert "| speech to image | 28.571 | 100.0 |" in text
    assert "on 4 images and 7 spoken captions of the split test" in text
    assert f"| SHA-256 | {manifest['hash']} |" in text
    assert "python 3.11.7, torch 2.13.0" in text
    assert "license" not in text
    assert "secret" not in text
    assert str(run.parent) not in text, "no path of this machine"


def test_unknown_values_are_left_out(run, caplog):
    bare = str(model_card(run / "export/best", None, "alone"))
    assert not any(title in bare for title in ("## Results", "## Training data", "model-index", "metrics", "None"))
    (run / "environment.json").unlink()
    (run / "recall.json").write_text(json.dumps({**RECALL, "shards": "elsewhere/places", "step": 99}))
    shutil.rmtree(run.parent / "shards")
    text = str(model_card(run / "export/best", run, "me/spoken"))
    assert not any(title in text for title in ("## Results", "## Training data", "model-index", "versions", "None"))
    assert "recall.json is of another step" in caplog.text
    assert "no shards in" in caplog.text


def test_other_shards_than_those_of_the_training_are_left_out(run, caplog):
    for path in run.glob("checkpoints/*/progress.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": ["0" * 64]}))
    assert "## Training data" not in str(model_card(run / "export/best", run, "me/spoken"))
    assert "is not what" in caplog.text


def test_trunks_of_the_hub_are_base_models(run):
    config = run / "config.yaml"
    text = config.read_text().replace("trunk: null", "trunk: facebook/hubert-large-ll60k", 1)
    config.write_text(text.replace("trunk: null", "trunk: /models/clip", 1))
    assert model_card(run / "export/best", run, "x").data.base_model == ["facebook/hubert-large-ll60k"]


def test_a_card_that_the_user_edited_is_kept(run):
    path = run / "export/best/README.md"
    path.write_text(current_card(run / "export/best", run, "one", "mit"))
    assert "license: mit" in current_card(run / "export/best", run, "two"), "the license is kept"
    path.write_text(path.read_text().replace(MARK, "My words."))
    assert current_card(run / "export/best", run, "two") == path.read_text()
    with pytest.raises(UserError, match="set the license in its head"):
        current_card(run / "export/best", run, "two", "mit")
    path.write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match="not that of a model card"):
        current_card(run / "export/best", run, "two")


def test_a_damaged_configuration_is_one_line(run):
    for damage in ("{", "[]", "{}"):
        (run / "export/best/config.json").write_text(damage)
        with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
            model_card(run / "export/best", run, "x")
    values = {"embed_dim": 4, "speech": [], "image": {"trunk": 3}, "fusion": None}
    (run / "export/best/config.json").write_text(json.dumps(values))
    assert "one space of 4 dimensions" in str(model_card(run / "export/best", run, "x"))
