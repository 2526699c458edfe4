"""DeepSpeed's configuration: accepted by DeepSpeed itself; keys that it would ignore are refused."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from shards.errors import UserError
from tests.distributed import run_ranks
from tests.tiny import PARTITIONED
from tests.toolkit.training.checkpointing import resumed_runs
from toolkit.config.schema import Config
from toolkit.training.zero.settings import deepspeed_config


def config(**free):
    made = Config()
    made.training.batch_size = 48
    made.training.accumulation = 2
    made.deepspeed = free
    return made


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_reads_the_derived_settings(stage, precision):
    from deepspeed.runtime.config import DeepSpeedConfig

    made = config()
    made.training.zero_stage, made.training.precision, made.training.grad_clip = stage, precision, 0.5
    settings = deepspeed_config(made, 4)
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 6
    read = DeepSpeedConfig({**settings, "train_batch_size": 12})  # this process is a world of one
    assert read.zero_optimization_stage == stage
    assert read.gradient_accumulation_steps == 2
    assert read.gradient_clipping == 0.5
    assert read.bfloat16_config.enabled == (precision == "bf16")


def test_free_section_adds_to_the_derived_settings():
    made = config(zero_optimization={"overlap_comm": True}, wall_clock_breakdown=True)
    settings = deepspeed_config(made, 1)
    assert settings["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert settings["wall_clock_breakdown"] is True
    assert settings["bf16"] == {"enabled": True}
    assert made.deepspeed["zero_optimization"] == {"overlap_comm": True}, "the configuration was changed"


def nested(key, value):
    """A dotted key as the mappings of a YAML file."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


PRECISION = "set --training.precision bf16 or fp32"
OURS = [  # key, other values, the derived value as configured below, the message about others
    ("train_batch_size", [3, "auto"], 48, "set --training.batch_size"),
    ("train_micro_batch_size_per_gpu", [3, "auto"], 24, "set --training.batch_size and --training.accumulation"),
    ("gradient_accumulation_steps", [3, "auto"], 2, "set --training.accumulation"),
    ("gradient_clipping", [7.0, 0, "auto"], 0.5, "set --training.grad_clip"),
    ("optimizer", [{"type": "Adam"}, {"type": "AdamW", "params": {"lr": "auto"}}], None, "set --training.lr, "),
    ("scheduler", [{"type": "WarmupLR"}], None, "set --training.lr, warmup_steps and min_lr"),
    ("zero_optimization.stage", [0, 1, 3, "two", 4, None], 2, "set --training.zero_stage"),
    ("bf16.enabled", [False, "false", None], True, PRECISION),
    ("bfloat16.enabled", [False], True, PRECISION),
    ("fp16.enabled", [True, "true"], False, PRECISION),
    ("torch_autocast.enabled", [True], False, PRECISION),
    ("data_types.param_dtype", ["fp16", "fp32"], "bf16", PRECISION),
    ("wandb.enabled", [True], False, "set --wandb.mode"),
    ("zero_force_ds_cpu_optimizer", [True, "auto"], False, "it is always False here"),
    ("bf16.bf16_master_weights_and_grads", [True], False, "it is always False here"),
    ("bf16.bf16_optimizer_states", [True], False, "it is always False here"),
    ("fp16.fp16_master_weights_and_grads", [True], False, "it is always False here"),
    ("gradient_allreduce_op", ["sum", "auto"], "mean", "it is always 'mean' here"),
    ("sequence_parallel_size", [2], 1, "it is always 1 here"),
    ("bf16.check_grad_overflow", [False], True, "it is always True here"),
    ("zero_optimization.compute_grad_norm", [False], True, "it is always True here"),
]


def configured(**free):
    made = config(**free)
    made.training.zero_stage, made.training.grad_clip = 2, 0.5
    return made


def test_every_derived_key_is_tested():
    from toolkit.training.zero.settings import _DECIDED_BY, _FIXED

    assert [key for key, *_ in OURS] == [*_DECIDED_BY, *_FIXED]
    flat = {
        f"{key}.{name}"
        for key, value in deepspeed_config(config(), 1).items()
        if isinstance(value, dict)
        for name in value
    }
    assert flat <= {key for key, *_ in OURS}


@pytest.mark.parametrize(
    ("key", "value", "mend"), [(key, value, mend) for key, others, _, mend in OURS for value in others]
)
def test_a_derived_key_cannot_have_another_value(key, value, mend):
    with pytest.raises(UserError) as error:
        deepspeed_config(configured(**nested(key, value)), 1)
    assert str(error.value).startswith(f"deepspeed.{key} cannot be set here; {mend}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, _, ours, _ in OURS for value in (ours, *["auto"] * ("." in key))]
)
def test_a_derived_key_may_repeat_its_value_or_be_auto_in_a_section(key, value):
    made = configured(**nested(key, value))
    assert deepspeed_config(made, 1) == deepspeed_config(configured(), 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_of_a_precision_is_the_one_configured(precision):
    made = config(bf16={"enabled": "auto"}, fp16={"enabled": "auto", "loss_scale": 0, "hysteresis": 2})
    made.training.precision = precision
    assert deepspeed_config(made, 1)["bf16"] == {"enabled": precision == "bf16"}
    assert "enabled" not in deepspeed_config(made, 1)["fp16"]


@pytest.mark.parametrize(
    "free",
    [
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"activation_checkpointing": {"partition_activations": True}},
        {"checkpoint": {"load_universal": True, "parallel_write": {"pipeline_stage": True}}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"data_types": {"grad_accum_dtype": "bf16", "keep_in_fp32_modules": "auto"}},
        {"zero_optimization": {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}},
        {"flops_profiler": {"enabled": True}},
        {"csv_monitor": {"enabled": True, "output_path": "x"}},
        {"communication_data_type": "fp32", "prescale_gradients": True, "zero_allow_untested_optimizer": True},
    ],
)
def test_keys_that_deepspeed_knows(free):
    settings = deepspeed_config(configured(**free), 1)
    for name, value in free.items():
        assert value.items() <= settings[name].items() if isinstance(value, dict) else value == settings[name]


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"gradient_cliping": 1}, "deepspeed.gradient_cliping: unknown key; did you mean deepspeed.gradient_clipping?"),
        (
            {"zero_optimisation": {"stage": 1}},
            "deepspeed.zero_optimisation: unknown key; did you mean deepspeed.zero_optimization?",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            "deepspeed.zero_optimization.overlap_com: unknown key; "
            "did you mean deepspeed.zero_optimization.overlap_comm?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.devise: unknown key; "
            "did you mean deepspeed.zero_optimization.offload_optimizer.device?",
        ),
        ({"bf16": {"enable": True}}, "deepspeed.bf16.enable: unknown key; did you mean deepspeed.bf16.enabled?"),
        (
            {"checkpoint": {"load_universl": True}},
            "deepspeed.checkpoint.load_universl: unknown key; did you mean deepspeed.checkpoint.load_universal?",
        ),
        ({"wandb": {"enable": True}}, "deepspeed.wandb.enable: unknown key; did you mean deepspeed.wandb.enabled?"),
        ({"zero_optimization": {"sub_group_size": "two"}}, "deepspeed.zero_optimization.sub_group_size is 'two': "),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization is 3; expected a section with keys in it"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization is True; expected a section with keys in it"),
        ({"bf16": "auto"}, "deepspeed.bf16 is 'auto'; expected a section with keys in it"),
        ({"fp16": None}, "deepspeed.fp16 is None; expected a section with keys in it"),
        ({"prescale_gradients": "auto"}, "deepspeed.prescale_gradients is 'auto', which is for other trainers; "),
        ({"gradient_predivide_factor": "auto"}, "deepspeed.gradient_predivide_factor is 'auto', which is for "),
        ({"flops_profiler": {"enabled": "auto"}}, "deepspeed.flops_profiler.enabled is 'auto', which is for "),
        ({"communication_data_type": "int"}, "deepspeed: Invalid communication_data_type. Supported data types: "),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "deepspeed.zero_optimization.offload_optimizer.device is nvme, which cannot be saved; set cpu",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            "deepspeed.data_types.grad_accum_dtype is fp32 and the model bf16, which ZeRO 1 cannot do; set ",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "deepspeed.data_types.grad_accum_dtype is 'fp8'; expected "),
    ],
)
def test_mistakes(free, message):
    with pytest.raises(UserError) as error:
        deepspeed_config(config(**free), 1)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"48 is not divisible by 5 ranks x 2 .*: 40 or 50"):
        deepspeed_config(config(), 5)


CPU = {"device": "cpu"}
SUMS = [(stage, None, False) for stage in range(4)] + [(2, "fp32", False), (3, "fp32", False)]
SUMS += [(stage, "fp32", True) for stage in (1, 2, 3)]


class One(nn.Module):
    """A parameter whose gradient is given."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(64, 4))

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        return (self.value * slope).sum()


def sums(rank: int, world_size: int) -> list[float]:
    """The gradient of a step of three micro-batches, of 1 and twice 1/256, as AdamW gets it."""
    from toolkit.training.zero.engine import backward, make_engine
    from toolkit.training.zero.state import fragments

    result = []
    for stage, added_up, offloaded in SUMS:
        made = Config()
        made.training.batch_size, made.training.accumulation = 3 * world_size, 3
        made.training.grad_clip, made.training.betas, made.training.zero_stage = 0.0, [0.0, 0.9], stage
        zero = {"stage3_param_persistence_threshold": 10}
        made.deepspeed = {"zero_optimization": zero | ({"offload_optimizer": CPU} if offloaded else {})}
        if added_up:
            made.deepspeed["data_types"] = {"grad_accum_dtype": added_up}
        engine = make_engine(One(), made, world_size, torch.device("cpu"))
        for slope in (3, 3 / 256, 3 / 256):
            backward(engine, engine(torch.tensor(slope, dtype=torch.bfloat16)))
            engine.step()
        result += {each.exp_avg[0].item() for each in fragments(engine)}
        engine.destroy()
    return result


WRITTEN_FOR_OTHERS = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "zero_optimization": {
        "stage": "auto",
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "data_types": {"param_dtype": "auto"},
    "torch_autocast": {"enabled": "auto"},
    "wall_clock_breakdown": False,
}


def engines(rank: int, world_size: int) -> list[dict[str, object]]:
    """What engines with such a section train in, after a step."""
    from toolkit.training.zero.engine import backward, make_engine

    result = []
    for precision, stage in itertools.product(("fp32", "bf16"), range(4)):
        made = Config(deepspeed=WRITTEN_FOR_OTHERS)
        made.training.batch_size, made.training.accumulation, made.training.grad_clip = 2 * world_size, 2, 0.25
        made.training.precision, made.training.zero_stage = precision, stage
        engine = make_engine(One(), made, world_size, torch.device("cpu"))
        for _ in range(2):
            backward(engine, engine(torch.tensor(1.0, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)))
            engine.step()
        result.append({
            "precision": str(engine.module.value.dtype), "stage": engine.zero_optimization_stage(),
            "micro": engine.train_micro_batch_size_per_gpu(), "accumulation": engine.gradient_accumulation_steps(),
            "clip": engine.gradient_clipping(), "steps": engine.global_steps, "fp16": engine.fp16_enabled(),
        })  # fmt: skip
        engine.destroy()
    return result


@pytest.mark.timeout(120)
def test_settings_for_another_trainer_train_as_configured_here() -> None:
    common = {"micro": 1, "accumulation": 2, "clip": 0.25, "steps": 1, "fp16": False}
    expected = [
        {"precision": precision, "stage": stage, **common}
        for precision, stage in itertools.product(("torch.float32", "torch.bfloat16"), range(4))
    ]
    assert run_ranks(engines, 1, timeout=100) == [expected]


@pytest.mark.timeout(120)
def test_gradients_of_micro_batches_are_added_up_in_float32_where_requested() -> None:
    expected = [1 + 2 / 256 if added_up else 1.0 for _, added_up, _ in SUMS]
    assert run_ranks(sums, 2, timeout=100) == 2 * [expected]


OFFLOADS = {
    2: {"offload_optimizer": CPU},
    3: {"offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 300},
}


@pytest.mark.timeout(400)
def test_offloading_to_the_cpu_trains_alike_and_resumes_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    runs = [(resumed_runs.settings(shards, tmp_path / "plain", zero_stage=2), None, "")]
    for zero, offload in OFFLOADS.items():
        for name, last in (("unbroken", None), ("broken", 2), ("broken", None)):
            run = resumed_runs.settings(shards, tmp_path / f"{name}{zero}", zero_stage=zero)
            run.deepspeed = {"zero_optimization": offload}
            runs.append((run, last, "raise"))
    run_ranks(resumed_runs.train, 2, runs, timeout=350)
    plain = resumed_runs.losses(tmp_path / "plain")
    for zero in OFFLOADS:
        for step, result in resumed_runs.losses(tmp_path / f"unbroken{zero}").items():
            assert result == pytest.approx(plain[step], rel=1e-5, abs=1e-5)
        resumed_runs.assert_equal(tmp_path / f"broken{zero}", tmp_path / f"unbroken{zero}")


@pytest.mark.timeout(240)
def test_frozen_trunks_train_alike_where_no_parameter_is_complete(shards: Path, tmp_path: Path) -> None:
    runs = []
    for zero in (0, 3):
        run = resumed_runs.settings(shards, tmp_path / str(zero), zero_stage=zero, save_every=9)
        run.model.speech.train = run.model.image.train = "none"
        run.deepspeed = PARTITIONED
        runs.append((run, None, ""))
    run_ranks(resumed_runs.train, 2, runs, timeout=220)
    expected = resumed_runs.losses(tmp_path / "0")
    for step, result in resumed_runs.losses(tmp_path / "3").items():
        assert result == pytest.approx(expected[step], rel=1e-5, abs=1e-5)
