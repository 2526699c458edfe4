"""Sweeps: which members a file or the command line makes, their names, and what is refused."""

import re
from pathlib import Path

import pytest

from launch.sweep import expand
from shards.errors import UserError
from toolkit.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]


def write(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


def test_a_product_with_named_entries(tmp_path):
    members = expand(
        write(
            tmp_path,
            """
            base: {training: {steps: 7}, deepspeed: {zero_optimization: {stage: 2}}}
            list:
              - name: small
                model.embed_dim: 16
              - {name: large, model: {embed_dim: 32, speech: {pool: thirds}}}
            grid: {objectives.momentum.decay: [0.9, 1.0e-3], seed: [0, 1]}
            """,
        )
    )
    names = [
        f"{size}_decay{decay}_seed{seed}"
        for size in ("small", "large")
        for decay in ("0.9", "0.001")
        for seed in (0, 1)
    ]
    assert [member.name for member in members] == names
    config = load_config(["--config", "quickstart", *members[-1].arguments])
    assert (config.training.steps, config.model.embed_dim, config.model.speech.pool) == (7, 32, "thirds")
    assert (config.objectives.momentum.decay, config.seed) == (0.001, 1)
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_sweeps_of_the_command_line():
    sweeps = ["training.betas=[0.9, 0.98],[0.8, 0.9]", "data.train=train,dev", "objectives.momentum.enabled=true"]
    members = expand({"objectives.denoising.side": ["image"]}, sweeps)
    assert [member.name for member in members] == [
        f"side-image_betas-{betas}_train-{train}_enabled-true" for betas in (0, 1) for train in ("train", "dev")
    ]
    config = load_config(["--config", "quickstart", *members[-1].arguments])
    assert (config.training.betas, config.data.train) == ([0.8, 0.9], "dev")


def test_keys_with_the_same_last_word_have_longer_names():
    members = expand({"model.speech.pool": ["mean"], "model.image.pool": ["class", "grid"]})
    assert [member.name for member in members] == [
        "speech.pool-mean_image.pool-class",
        "speech.pool-mean_image.pool-grid",
    ]


def test_values_have_the_types_of_the_configuration():
    [member] = expand({"training.lr": [1], "deepspeed.zero_optimization.stage": [2]}, ["data.train=3"])
    assert member.name == "lr1.0_stage2_train-3"
    assert member.overrides == {"training.lr": 1.0, "deepspeed.zero_optimization.stage": 2, "data.train": "3"}


def test_a_pattern_of_names(tmp_path):
    text = """
    name: "{name} at {training.lr}"
    list: [{name: one, data.train: a/../b}]
    grid: {training.lr: [1.0e-3, 2.0e-3]}
    """
    assert [member.name for member in expand(write(tmp_path, text))] == ["one-at-0.001", "one-at-0.002"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {training.learning_rate: [1]}", "grid: training.learning_rate: unknown key; did you mean training."),
        ("grid: {training: {stepz: [1]}}", "training.stepz: unknown key; did you mean training.steps?"),
        ("grid: {training.steps: [many]}", "training.steps is 'many' (str); expected int"),
        ("grid: {training.steps: 3}", "training.steps is 3; expected a list of values"),
        ("grid: {training.steps: []}", "expected a list of values"),
        ("grdi: {training.steps: [3]}", "grdi: unknown key; did you mean grid?"),
        ("base: {run: x}\ngrid: {seed: [1]}", "base: run: all members are one job array"),
        ("grid: {launch.nodes: [1, 2]}", "launch.nodes: all members are one job array"),
        ("base: {seed: 1}", "nothing is swept"),
        ("grid: {seed: [1, 1]}", "two members are called seed1, with the same values"),
        ("list: [{name: a b, seed: 1}, {name: a-b, seed: 2}]", "two members are called a-b, with different values"),
        ("name: '{sede}'\ngrid: {seed: [1]}", "{sede} is not swept; there are seed"),
        ("list: [{name: logs, seed: 1}]", "'logs' cannot be the name of a member's folder"),
        ("list: [{name: ../.., seed: 1}]", "'' cannot be the name of a member's folder"),
        ("list: {name: x}", "list: expected a list of mappings"),
        ("grid: [1]", "grid: expected a mapping"),
    ],
)
def test_errors_are_one_line_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        expand(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("word", ["seed", "=1", "seed=[1", "seed=1,x"])
def test_wrong_sweeps(word):
    with pytest.raises(UserError, match=r"seed|--sweep"):
        expand({}, [word])


def test_a_sweep_given_twice():
    with pytest.raises(UserError, match="seed is swept twice"):
        expand({}, ["seed=1", "seed=2"])


@pytest.mark.parametrize("name", ["flickr8k", "spokencoco", "quickstart"])
def test_the_ablation_fits_the_configurations(name):
    members = expand(ROOT / "slurm" / "grids" / "ablation.yaml")
    assert len(members) == 39
    full = load_config(["--config", name])
    rows = {}
    for member in members:
        objectives = load_config(["--config", name, *member.arguments]).objectives
        rows.setdefault(member.name.rpartition("_seed")[0], set()).add(
            (
                objectives.contrastive.weight > 0,
                objectives.matching.weight > 0,
                objectives.contrastive.queue,
                objectives.momentum.enabled,
                objectives.contrastive.alpha,
                objectives.denoising.weight > 0 and (objectives.denoising.side, objectives.denoising.noise),
            )
        )
    queue, alpha = full.objectives.contrastive.queue, full.objectives.contrastive.alpha
    assert list(rows.items())[:4] == [
        ("sic", {(True, False, 0, False, 0.0, False)}),
        ("sic+sim", {(True, True, 0, False, 0.0, False)}),
        ("sic+sim+queue", {(True, True, queue, True, 0.0, False)}),
        ("sic+sim+queue+distillation", {(True, True, queue, True, alpha, False)}),
    ]
    denoising = [{(True, True, queue, True, alpha, (side, noise))} for side in ("image", "speech", "both")
                 for noise in ("swap", "gaussian", "mask")]  # fmt: skip
    assert list(rows.values())[4:] == denoising
