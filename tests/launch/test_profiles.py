"""Profiles: chosen, read, and applied below the user's own values."""

from dataclasses import replace

import pytest

from launch import profiles
from launch.profiles import FILLED, PROFILES, Profile, apply_profile, find_profile, read_profile
from shards.errors import UserError
from tests.launch.cluster import use_fake_slurm
from toolkit.config.schema import Config, Data, Launch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of profiles on the cluster `Testbed`."""
    monkeypatch.setattr(profiles, "PROFILES", tmp_path / "profiles")
    (tmp_path / "profiles").mkdir()
    use_fake_slurm(monkeypatch, tmp_path / "slurm", "Testbed")
    monkeypatch.setattr("socket.getfqdn", lambda: "login1.bigmachine.example.org")
    monkeypatch.setattr("socket.gethostname", lambda: "login1")
    return tmp_path / "profiles"


def test_shipped_profiles_are_read_and_the_example_has_every_key():
    for path in PROFILES.glob("*.yaml"):
        assert read_profile(path).match == [], "a profile that is shipped fits no cluster by itself"
    text = (PROFILES / "example.yaml").read_text()
    for key in ({*FILLED, *vars(Profile())}) - {"name", "launch"}:
        assert f"\n{key}:" in text, key


@pytest.mark.parametrize("pattern", ["testbed", "TEST*", "login?.bigmachine.example.org", "login1"])
def test_matched_by_cluster_or_host(folder, pattern):
    (folder / "one.yaml").write_text(f'match: ["other", "{pattern}"]\npartition: gpu\n')
    (folder / "two.yaml").write_text("match: [elsewhere]\n")
    assert find_profile(Launch()).launch == {"partition": "gpu"}


def test_no_profile_matches(folder):
    (folder / "two.yaml").write_text("match: [elsewhere]\n")
    assert find_profile(Launch()) == Profile()


def test_chosen_by_name_or_file(folder, tmp_path):
    (folder / "mine.yaml").write_text("time: 30\n")
    (tmp_path / "file.yaml").write_text("srun: [--label]\n")
    assert find_profile(Launch(profile="mine")).launch == {"time": "30"}
    assert find_profile(Launch(profile=str(tmp_path / "file.yaml"))).srun == ["--label"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "one.yaml: partitoin: unknown key; did you mean partition"),
        ("launch: {nodes: 3}", "launch: unknown key"),
        ("gpus_per_node: many", "one.yaml: gpus_per_node is 'many'; expected int or null"),
        ("setup: module load cuda", "one.yaml: setup is 'module load cuda'; expected list of str"),
        ("- partition", "one.yaml"),
    ],
)
def test_errors_are_one_line(folder, text, message):
    (folder / "one.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        find_profile(Launch(profile="one"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_profile_and_several(folder):
    (folder / "one.yaml").write_text("match: [testbed]")
    (folder / "two.yaml").write_text("match: [login1]")
    with pytest.raises(UserError, match="profiles one, two all match testbed or login1"):
        find_profile(Launch())
    with pytest.raises(UserError, match="there are one, two in"):
        find_profile(Launch(profile="three"))


def test_the_command_line_wins_over_the_profile_and_that_over_defaults():
    profile = Profile(launch={"partition": "gpu", "nodes": 2, "time": "10"}, scratch="/scratch")
    config = Config(launch=replace(Launch(), time="20"))
    filled = apply_profile(config, profile, ())
    assert (filled.launch.partition, filled.launch.nodes) == ("gpu", 2)
    assert filled.launch.time == "20", "the value of the configuration file is kept"
    assert filled.data.cache == "/scratch"
    given = apply_profile(config, profile, {"launch.nodes", "launch.partition", "data.cache"})
    assert (given.launch.partition, given.launch.nodes, given.data.cache) == (None, 1, None)
    assert apply_profile(Config(data=Data(cache="/mine")), profile, ()).data.cache == "/mine"
