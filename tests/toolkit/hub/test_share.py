"""share.py, against a local stand-in of the hub that the real client talks to."""

import json
import os
import shutil
import stat

import pytest
from huggingface_hub import ModelCard, constants

from shards.errors import UserError
from tests.toolkit.hub.hub_server import TOKEN, serve
from tests.toolkit.indexing_files import EXPORT
from toolkit.hub.share import main

UPLOADED = {"config.json", "preprocessor_config.json", "model.safetensors", "modules.json", "README.md"}


@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's older protocol for large files
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def run(tmp_path):
    """A run with what must never be uploaded."""
    shutil.copytree(EXPORT.parents[1], tmp_path / "run")
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(EXPORT.parents[1] / name, tmp_path / "run") if (EXPORT.parents[1] / name).exists() else None
    export = tmp_path / "run/export/best"
    for name in (".env", "notes.txt", "query.wav", "optimizer.safetensors", "deep/secret.json"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("secret")
    return tmp_path / "run"


def test_push_uploads_the_model_its_processor_and_the_card_only(run, hub, capsys):
    main([str(run), "--push", "me/spoken", "--license", "mit"])
    files = hub.repos["me/spoken"]
    assert files.keys() == UPLOADED
    export = run / "export/best"
    for name in UPLOADED:
        assert files[name] == (export / name).read_bytes(), name
    assert ModelCard(files["README.md"].decode(), ignore_metadata_errors=False).data.license == "mit"
    assert hub.private == {"me/spoken": False}
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert f"{hub.url}/me/spoken" in capsys.readouterr().out
    assert not any(b"secret" in content for content in files.values())


def test_a_second_push_replaces_the_first(run, hub):
    main([str(run), "--push", "me/spoken"])
    main([str(run / "export/best"), "--push", "me/spoken", "--license", "mit"])
    assert hub.repos["me/spoken"].keys() == UPLOADED
    assert b"license: mit" in hub.repos["me/spoken"]["README.md"]


def test_private_stays_private(run, hub):
    main([str(run), "--push", "me/closed", "--private"])
    assert hub.private == {"me/closed": True}
    hub.repos["me/open"], hub.private["me/open"] = {}, False
    with pytest.raises(UserError, match="exists and is public: nothing was uploaded"):
        main([str(run), "--push", "me/open", "--private"])
    assert hub.repos["me/open"] == {}


def test_a_dry_run_lists_files_and_sizes_and_writes_nothing(run, hub, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    main([str(run), "--push", "me/spoken", "--dry-run"])
    shown = capsys.readouterr().out
    assert not hub.requests
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    size = (run / "export/best/model.safetensors").stat().st_size
    assert f"{size:,} model.safetensors" in shown
    assert all(name in shown for name in UPLOADED)
    assert not any(name in shown for name in ("notes.txt", ".env", "optimizer"))


def test_the_card_alone_has_the_mode_of_the_umask(run):
    old = os.umask(0o027)
    try:
        main([str(run)])
    finally:
        os.umask(old)
    for name in ("README.md", "modules.json"):
        assert stat.S_IMODE((run / "export/best" / name).stat().st_mode) == 0o640
    assert json.loads((run / "export/best/modules.json").read_text())[0]["type"].startswith("toolkit.hub.")


def test_weights_in_several_files(run, hub):
    export = run / "export/best"
    (export / "model.safetensors").rename(export / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "../../../model-00001-of-00001.safetensors"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    main([str(run), "--push", "me/parts"])
    names = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert hub.repos["me/parts"].keys() == UPLOADED - {"model.safetensors"} | names


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda export: (export / "model.safetensors").unlink(), r"no weights \(model\.safetensors\)"),
        (lambda export: (export / "model.safetensors").write_bytes(b""), r"no weights \(model\.safetensors\)"),
        (lambda export: (export / "preprocessor_config.json").unlink(), r"no preprocessor_config\.json"),
        (lambda export: (export / "config.json").write_text('{"model_type": "bert"}'), "of the type 'bert'"),
        (lambda export: (export / "config.json").write_text("{"), "damaged model"),
    ],
)
def test_a_folder_without_a_complete_model_is_refused(run, hub, damage, message):
    damage(run / "export/best")
    with pytest.raises(UserError, match=message) as raised:
        main([str(run), "--push", "me/spoken"])
    assert "\n" not in str(raised.value)
    assert not hub.requests
    assert not (run / "export/best/README.md").exists()


def test_refusals_of_the_hub_are_one_line(run, hub, monkeypatch):
    for name, message in {"a/b/c": "--push a/b/c", "me/no spaces": "--push me/no spaces"}.items():
        with pytest.raises(UserError, match=message) as raised:
            main([str(run), "--push", name])
        assert "\n" not in str(raised.value)
    path = run / "export/best/README.md"
    path.write_text("---\nlanguage: klingonese\n---\n")
    with pytest.raises(UserError, match='"language" is not valid'):
        main([str(run), "--push", "me/spoken"])
    assert hub.repos["me/spoken"] == {}
    path.unlink()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="log in with hf auth login"):
        main([str(run), "--push", "me/other"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--push me/spoken: "):
        main([str(run), "--push", "me/spoken"])


def test_mistakes_on_the_command_line():
    with pytest.raises(UserError, match="no such folder"):
        main(["nowhere"])
    with pytest.raises(UserError, match="--private goes with --push"):
        main([str(EXPORT), "--private"])
