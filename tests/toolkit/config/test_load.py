"""Loading the configuration: precedence of sources, types of values, and errors of one line."""

import dataclasses
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from toolkit.config.help import describe_keys
from toolkit.config.load import CONFIGS, Parser, load_config, nearest, parse
from toolkit.config.schema import Config, micro_batch
from toolkit.run_folder import to_yaml

ROOT = Path(__file__).parents[3]


def refused(*arguments):
    """Return the one-line error for arguments."""
    with pytest.raises(UserError) as error:
        load_config([str(argument) for argument in arguments])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_precedence_is_command_line_file_base_default(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "training: {lr: 0.5, steps: 7, warmup: 3}\nmodel: {speech: {config: {a: 1, b: 1}}}"
    )
    file = tmp_path / "mine.yaml"
    file.write_text("base: base.yaml\ntraining: {steps: 8, warmup: 4}\nmodel: {speech: {config: {b: 2, c: 2}}}")
    config = load_config(["--config", str(file), "--training.warmup_steps", "5", "--model.speech.config.c=3"])
    training = config.training
    assert (training.grad_clip, training.lr, training.steps, training.warmup_steps) == (1.0, 0.5, 8, 5)
    assert config.model.speech.config == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("training.lr", "1e-4", 1e-4),
        ("training.lr", "1", 1.0),
        ("training.stop_after", "null", None),
        ("training.stop_after", "12", 12),
        ("training.betas", "[0.5, 0.6]", [0.5, 0.6]),
        ("training.zero_stage", "3", 3),
        ("objectives.momentum.enabled", "true", True),
        ("objectives.denoising.snr_db", "-5", -5.0),
        ("model.speech.train", "2", "2"),
        ("model.speech.trunk", "null", None),
        ("model.speech.trunk", "007", "007"),
        ("launch.time", "24:00:00", "24:00:00"),
        ("final.split", "no", "no"),
        ("final.split", "", ""),
        ("run", "=odd", "=odd"),
        ("data.make", "[scenes, --seed, 3, --x, 0.5]", ["scenes", "--seed", "3", "--x", "0.5"]),
        ("deepspeed", "{a: {b: 1e9}}", {"a": {"b": 1e9}}),
    ],
)
def test_values(key, text, expected):
    for arguments in ([f"--{key}", text], [f"--{key}={text}"]):
        value = attrgetter(key)(load_config(arguments))
        assert value == expected
        assert type(value) is type(expected)


def test_keys_with_dots_in_a_file_are_keys_of_sections(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "training.lr: 0.5\nmodel.speech: {config.a: 1, head_layers: 2}\nmodel: {image.train: all}\n"
        "deepspeed.zero_optimization.overlap_comm: true\ndata.mixture: {a.b: 2}"
    )
    config = load_config(["--config", str(file)])
    assert (config.training.lr, config.model.speech.head_layers, config.model.image.train) == (0.5, 2, "all")
    assert config.model.speech.config["a"] == 1
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}
    assert config.data.mixture == {"a.b": 2}, "dots in the keys of a free mapping do not separate"


def test_free_keys_and_sections():
    config = load_config(["--deepspeed.zero_optimization.overlap_comm", "true", "--training", "{steps: 3, lr: 0.1}"])
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}
    assert (config.training.steps, config.training.lr) == (3, 0.1)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("training.lr", "fast", "--training.lr is 'fast' (str); expected float"),
        ("training.lr", "true", "--training.lr is True (bool); expected float"),
        ("training.lr", ".inf", "--training.lr is '.inf' (str); expected float"),
        ("training.lr", "1e999", "--training.lr is inf (float); expected float"),
        ("training.steps", "1.5", "--training.steps is 1.5 (float); expected int"),
        ("training.steps", "true", "--training.steps is True (bool); expected int"),
        ("training.zero_stage", "4", "--training.zero_stage is 4 (int); expected one of 0, 1, 2, 3"),
        ("training.zero_stage", "true", "--training.zero_stage is True (bool); expected one of 0, 1, 2, 3"),
        ("training.stop_after", "x", "--training.stop_after is 'x' (str); expected int or null"),
        ("training.betas", "[1, x]", "--training.betas is [1, 'x'] (list); expected list of float"),
        ("objectives.momentum.enabled", "yes", "--objectives.momentum.enabled is 'yes' (str); expected true or false"),
        ("model.speech.config", "3", "--model.speech.config is 3 (int); expected mapping"),
        ("training", "3", "--training is 3 (int); expected a section with keys of: steps, batch_size, "),
        ("training.lr.x", "3", "--training.lr is {'x': 3} (dict); expected float"),
        ("training.leaning_rate", "1", "--training.leaning_rate: unknown key; did you mean training."),
        ("training.bach_size", "1", "--training.bach_size: unknown key; did you mean training.batch_size?"),
        ("trainig.lr", "1", "--trainig: unknown key; did you mean training?"),
        ("lr", "1", "--lr: unknown key; did you mean training.lr?"),
        ("deepspeed", "{a", "--deepspeed '{a' (str) line 1: not YAML: "),
        ("deepspeed", "{a: 1, a: 2}", "--deepspeed '{a: 1, a: 2}' (str) line 1: not YAML: duplicate key a"),
    ],
)
def test_wrong_values(key, text, message):
    assert refused(f"--{key}", text).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.steps"], "--training.steps has no value"),
        (["--training.steps", "--seed", "1"], "--training.steps has no value"),
        (["steps"], "steps: expected --section.key VALUE; --help lists the keys"),
        (["--config", "quikstart"], "configuration quikstart: no such file or name; did you mean quickstart?"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_arguments(arguments, message):
    assert refused(*arguments).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: fast}", ": training.lr is 'fast' (str); expected float"),
        ("training: {lrr: 1}", ": training.lrr: unknown key; did you mean training.lr?"),
        ("trainig: {lr: 1}", ": trainig: unknown key; did you mean training?"),
        ("training.lrr: 1", ": training.lrr: unknown key; did you mean training.lr?"),
        ("training.lr: fast", ": training.lr is 'fast' (str); expected float"),
        ("training.lr.x: 1", ": training.lr is {'x': 1} (dict); expected float"),
        ("seed: 1\ntraining: {lr: 1", " line 2: not YAML: "),
        ("seed: 1\nseed: 2", " line 2: not YAML: duplicate key seed"),
        ("seed: !!python/object/apply:os.getpid []", " line 1: not YAML: could not determine a constructor"),
        ("- 1", ": expected sections with keys, not [1] (list)"),
        ("base: mine.yaml", ": base mine.yaml leads back to the file itself"),
        ("seed: '\0'", ": not YAML: "),
        (b"seed: \xff", " cannot be read: "),
    ],
)
def test_wrong_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused("--config", file).startswith(f"{file}{message}".split("\0")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--training.batch_size 0", "--training.batch_size is 0; expected 1 or more"),
        ("--training.lr -1", "--training.lr is -1.0; expected more than 0"),
        ("--training.betas [0.9]", "--training.betas is [0.9]; expected two numbers"),
        ("--training.betas [0.9,1.5]", "--training.betas is [0.9, 1.5]; expected from 0 up to, not including, 1"),
        ("--training.min_lr 1 --training.lr 0.1", "--training.min_lr 1.0 is above --training.lr 0.1"),
        (
            "--training.batch_size 64 --training.accumulation 3",
            "--training.batch_size 64 is not divisible by --training.accumulation 3",
        ),
        ("--training.stop_after 0", "--training.stop_after is 0; expected 1 or more, or null"),
        ("--model.speech.train some", "--model.speech.train is some; expected none, all, or a number of layers"),
        (
            "--model.fusion.width 192 --model.fusion.heads 5",
            "--model.fusion.width 192 is not divisible by --model.fusion.heads 5",
        ),
        ("--objectives.denoising.swap_group 0", "--objectives.denoising.swap_group is 0; expected 1 or more"),
        (
            "--objectives.denoising.swap_group 1",
            "--objectives.denoising.swap_group 1 leaves no row to swap with: set it to 2",
        ),
        ("--objectives.contrastive.temperature 0.9", "--objectives.contrastive.temperature 0.9 is not between"),
        ("--objectives.momentum.enabled false", "--objectives.contrastive.alpha 0.4 needs the momentum encoder"),
        (
            "--objectives.momentum.enabled false --objectives.contrastive.alpha 0",
            "--objectives.denoising.target teacher needs the momentum encoder",
        ),
        (
            "--objectives.matching.weight 0 --evaluation.rerank 4",
            "--evaluation.rerank needs the matching objective",
        ),
        (
            "--objectives.contrastive.weight 0 --objectives.matching.weight 0 --objectives.denoising.weight 0",
            "all of objectives.contrastive.weight, matching.weight and denoising.weight are 0",
        ),
    ],
)
def test_values_out_of_range(arguments, message):
    assert refused(*arguments.split()).startswith(message)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations(path):
    config = load_config(["--config", path.stem])
    assert config.run == f"runs/{path.stem}"
    assert f"--config {path.stem}" in path.read_text().split("\n\n")[0], "the header shows no command"
    for world_size in (1, 2, 4, 8):
        assert micro_batch(config, world_size) * world_size == config.training.batch_size


def test_reference_configurations_differ_where_the_corpora_do():
    flickr8k, spokencoco = (load_config(["--config", name]) for name in ("flickr8k", "spokencoco"))
    assert flickr8k.model == spokencoco.model
    assert flickr8k.training == spokencoco.training
    assert flickr8k.objectives.contrastive.queue < 30_000 < spokencoco.objectives.contrastive.queue


def test_the_gpu_benchmark_reads_the_reference_configurations():
    code = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, "tests/benchmarks")
        import gpu
        for name in ("flickr8k", "spokencoco"):
            tree = gpu.configuration(name, Path("shards"), False)
            print(tree["run"], tree["model"]["speech"]["config"]["hidden_size"])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["runs/flickr8k 1024", "runs/spokencoco 1024", ""], done.stderr


def test_a_batch_size_that_is_not_divisible():
    config = load_config(["--training.batch_size", "100", "--training.accumulation", "2"])
    assert micro_batch(config, 2) == 25
    with pytest.raises(
        UserError, match="is not divisible by 3 ranks x 2 accumulated micro-batches; the nearest valid sizes: 96 or 102"
    ):
        micro_batch(config, 3)
    with pytest.raises(UserError, match=r"the nearest valid sizes: 256$"):
        micro_batch(config, 128)


def test_options_of_an_entry_point():
    parser = Parser("Description")
    parser.add_argument("--split")
    parser.add_argument("--rerank", type=int)
    config, options = parse(["--split", "dev", "--training.steps", "3", "--rerank=4", "--local_rank=1"], parser)
    assert (options.split, options.rerank, options.local_rank, config.training.steps) == ("dev", 4, 1, 3)
    with pytest.raises(UserError, match=r"^argument --rerank: invalid int value: 'x'$"):
        parse(["--rerank", "x"], parser)


def test_help_names_every_key_with_type_default_and_meaning():
    listed = describe_keys()

    def keys(section, prefix=""):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            yield from (
                keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [f"{prefix}{field.name}"]
            )

    for key in keys(Config()):
        assert re.search(rf"^  --{re.escape(key)} \S.* = \S", listed, re.MULTILINE), key
    assert re.search(r"^  --training\.zero_stage one of 0, 1, 2, 3 = 1 +# DeepSpeed ZeRO stage$", listed, re.MULTILINE)
    assert re.search(r"^  --training\.stop_after int or null = null +# steps", listed, re.MULTILINE)


def test_help_imports_nothing_heavy():
    code = """
import sys
from toolkit.config.load import load_config
try:
    load_config(["--help"])
except SystemExit as ended:
    heavy = {"torch", "transformers", "deepspeed", "submitit", "numpy", "torchaudio"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else ended.code)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "--training.lr float = 0.0001" in ended.stdout


def test_nearest():
    assert nearest("training.stepz", ["training.steps", "training.save_every", "seed"]) == "training.steps"


@example("\x85", 1.0, None)
@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=20),
    st.floats(min_value=1e-12, max_value=1e12),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda leaf: st.lists(leaf, max_size=3),
        max_leaves=5,
    ),
)
def test_yaml_reads_back_the_same(tmp_path_factory, text, number, free):
    config = Config()
    config.data.train = config.wandb.project = text
    config.data.make = [text]
    config.training.lr, config.training.min_lr = number, 0.0
    config.deepspeed = {"free": free}
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["--config", str(file)]) == config
    assert yaml.safe_load(to_yaml(config))["data"]["train"] == text
