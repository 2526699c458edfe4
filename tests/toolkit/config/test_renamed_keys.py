"""Keys of earlier versions are still read, with one warning that names the new key; a saved run needs none."""

import json
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from launch.sweep import expand
from shards.errors import UserError
from toolkit.config.load import load_config
from toolkit.config.schema import RENAMED_KEYS, Config
from toolkit.run_folder import fingerprint, load_run, to_yaml

COMPATIBILITY = Path(__file__).parents[2] / "compatibility"


def new_name(old):
    return f"{old.rpartition('.')[0]}.{RENAMED_KEYS[old]}"


def other_value(key):
    """A valid value that is not the default."""
    default = attrgetter(key)(Config())
    return not default if isinstance(default, bool) else default + 1


def nested(key, value):
    """The YAML text of one key in its sections."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


@pytest.fixture(params=sorted(RENAMED_KEYS))
def renamed(request):
    """Old key, new key, a value."""
    new = new_name(request.param)
    return request.param, new, other_value(new)


def test_new_keys_exist_and_old_ones_do_not():
    for old in RENAMED_KEYS:
        attrgetter(new_name(old))(Config())
        with pytest.raises(AttributeError):
            attrgetter(old)(Config())


@pytest.mark.parametrize("dotted", [False, True])
def test_in_a_file(renamed, dotted, tmp_path, capsys):
    old, new, value = renamed
    file = tmp_path / "mine.yaml"
    file.write_text(f"{old}: {json.dumps(value)}" if dotted else nested(old, value))
    assert attrgetter(new)(load_config(["--config", str(file)])) == value
    assert capsys.readouterr().err == f"warning: {file}: {old} is now {new}\n"


def test_in_a_base_file(renamed, tmp_path, capsys):
    old, new, value = renamed
    (tmp_path / "parent.yaml").write_text(nested(old, value))
    file = tmp_path / "mine.yaml"
    file.write_text("base: parent.yaml\nseed: 3")
    config = load_config(["--config", str(file)])
    assert (attrgetter(new)(config), config.seed) == (value, 3)
    assert capsys.readouterr().err == f"warning: {tmp_path / 'parent.yaml'}: {old} is now {new}\n"


@pytest.mark.parametrize("joined", [False, True])
def test_on_the_command_line(renamed, joined, capsys):
    old, new, value = renamed
    text = json.dumps(value)
    assert attrgetter(new)(load_config([f"--{old}={text}"] if joined else [f"--{old}", text])) == value
    assert capsys.readouterr().err == f"warning: --{old} is now {new}\n"


def test_the_new_key_needs_no_warning(renamed, capsys):
    _, new, value = renamed
    assert attrgetter(new)(load_config([f"--{new}", json.dumps(value)])) == value
    assert capsys.readouterr().err == ""


def test_in_a_sweep(renamed, tmp_path, caplog):
    old, new, value = renamed
    file = tmp_path / "grid.yaml"
    for section in ("grid", "list", "base"):
        caplog.clear()
        sections = {"grid": {"seed": [0, 1]}}
        if section == "grid":
            sections["grid"][old] = [value]
        else:
            sections[section] = [{old: value}] if section == "list" else {old: value}
        file.write_text(yaml.safe_dump(sections))
        members = expand(file)
        assert [member.overrides[new] for member in members] == [value, value]
        assert caplog.messages == [f"{file}: {section}: {old} is now {new}"]
    caplog.clear()
    (member,) = expand({}, [f"{old}={json.dumps(value)}"])
    assert member.overrides == {new: value}
    assert caplog.messages == [f"--sweep {old} is now {new}"]


def test_in_a_saved_run(renamed, tmp_path, capsys):
    old, new, value = renamed
    (tmp_path / "config.yaml").write_text(nested(old, value))
    assert attrgetter(new)(load_run(tmp_path)) == value
    assert attrgetter(new)(load_config(["--run", str(tmp_path)])) == value
    assert capsys.readouterr().err == ""


def test_all_keys_of_a_file_are_one_warning(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {window: 3, lanes: 2}\ntraining: {clip: 2}")
    load_config(["--config", str(file)])
    assert capsys.readouterr().err == (
        f"warning: {file}: data.window is now data.shuffle_shards; data.lanes is now data.shard_groups; "
        "training.clip is now training.grad_clip\n"
    )


def test_wrong_values_of_old_keys_are_reported_under_the_new_ones():
    with pytest.raises(UserError, match=r"^--training.zero_stage is 9 \(int\); expected one of 0, 1, 2, 3$"):
        load_config(["--training.zero", "9"])


def test_fingerprints_do_not_change_by_the_renaming(tmp_path):
    """Checkpoints of earlier versions, which store the fingerprint, still belong to their configuration."""
    versions = sorted(COMPATIBILITY.glob("*/run/config.yaml"))
    assert versions
    for saved in versions:
        (marker,) = saved.parent.glob("checkpoints/step-*/progress.json")
        assert fingerprint(load_run(saved.parent)) == json.loads(marker.read_text())["config"]
        resaved = tmp_path / "config.yaml"
        resaved.write_text(to_yaml(load_run(saved.parent)))
        assert fingerprint(load_run(tmp_path)) == fingerprint(load_run(saved.parent))
