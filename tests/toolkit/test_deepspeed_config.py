"""DeepSpeed's configuration: accepted by DeepSpeed itself; what it would pass over in silence is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shards.errors import UserError
from tests.distributed import run_ranks
from tests.toolkit import test_checkpoint, test_trainer
from toolkit.config import Config
from toolkit.training.deepspeed_config import deepspeed_config

shards = test_trainer.shards


def config(**free):
    made = Config()
    made.training.batch_size = 48
    made.training.accumulation = 2
    made.deepspeed = free
    return made


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_reads_what_is_derived(stage, precision):
    from deepspeed.runtime.config import DeepSpeedConfig

    made = config()
    made.training.zero, made.training.precision, made.training.clip = stage, precision, 0.5
    settings = deepspeed_config(made, 4)
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 6
    read = DeepSpeedConfig({**settings, "train_batch_size": 12})  # this process is a world of one
    assert read.zero_optimization_stage == stage
    assert read.gradient_accumulation_steps == 2
    assert read.gradient_clipping == 0.5
    assert read.bfloat16_config.enabled == (precision == "bf16")


def test_free_section_wins():
    made = config(
        zero_optimization={"stage": 2, "overlap_comm": True}, gradient_clipping=7.0, wall_clock_breakdown=True
    )
    settings = deepspeed_config(made, 1)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["gradient_clipping"] == 7.0
    assert settings["wall_clock_breakdown"] is True
    assert settings["bf16"] == {"enabled": True}
    assert made.deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": True}, "the configuration was changed"


@pytest.mark.parametrize(
    "free",
    [
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"activation_checkpointing": {"partition_activations": True}},
        {"checkpoint": {"load_universal": True, "parallel_write": {"pipeline_stage": True}}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 2}},
        {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"stage": 0}},
        {"flops_profiler": {"enabled": True}},
        {"csv_monitor": {"enabled": True, "output_path": "x"}},
        {"communication_data_type": "fp32", "prescale_gradients": True, "zero_allow_untested_optimizer": True},
    ],
)
def test_keys_that_deepspeed_knows(free):
    assert free.items() <= {**deepspeed_config(config(**free), 1), **free}.items()


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
        (
            {"wandb": {"enable": True}},
            "deepspeed.wandb.enable: unknown key; did you mean deepspeed.wandb.enabled?",
        ),
        ({"zero_optimization": {"stage": "two"}}, "deepspeed.zero_optimization.stage is 'two': Input should be "),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage is 4: Input should be "),
        ({"zero_optimization": 3}, "deepspeed: "),
        ({"communication_data_type": "int"}, "deepspeed: Invalid communication_data_type. Supported data types: "),
        ({"fp16": {"enabled": True}}, "deepspeed: bfloat16 and fp16 modes cannot be simultaneously enabled"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "deepspeed.zero_optimization.offload_optimizer.device is nvme, which cannot be saved; set cpu",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            "deepspeed.data_types.grad_accum_dtype is fp32 and the model bf16, which ZeRO 1 cannot do; set ",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "deepspeed.data_types.grad_accum_dtype is 'fp8'; expected "),
        ({"train_batch_size": 3}, "deepspeed.train_batch_size cannot be set here; set --training.batch_size"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer cannot be set here; set --training.lr"),
    ],
)
def test_mistakes(free, message):
    with pytest.raises(UserError) as error:
        deepspeed_config(config(**free), 1)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"48 does not divide by 5 ranks x 2 .*: 40 or 50"):
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
    from toolkit.training.engine import backward, make_engine
    from toolkit.training.fragments import fragments

    found = []
    for stage, added_up, offloaded in SUMS:
        made = Config()
        made.training.batch_size, made.training.accumulation = 3 * world_size, 3
        made.training.clip, made.training.betas, made.training.zero = 0.0, [0.0, 0.9], stage
        zero = {"stage3_param_persistence_threshold": 10}
        made.deepspeed = {"zero_optimization": zero | ({"offload_optimizer": CPU} if offloaded else {})}
        if added_up:
            made.deepspeed["data_types"] = {"grad_accum_dtype": added_up}
        engine = make_engine(One(), made, world_size, torch.device("cpu"))
        for slope in (3, 3 / 256, 3 / 256):
            backward(engine, engine(torch.tensor(slope, dtype=torch.bfloat16)))
            engine.step()
        found += {each.exp_avg[0].item() for each in fragments(engine)}
        engine.destroy()
    return found


@pytest.mark.timeout(120)
def test_gradients_of_micro_batches_are_added_up_in_float32_where_asked_for() -> None:
    expected = [1 + 2 / 256 if added_up else 1.0 for _, added_up, _ in SUMS]
    assert run_ranks(sums, 2, timeout=100) == 2 * [expected]


OFFLOADS = {
    2: {"offload_optimizer": CPU},
    3: {"offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 300},
}


@pytest.mark.timeout(400)
def test_offloaded_to_the_cpu_it_trains_alike_and_continues_to_the_bit(shards: Path, tmp_path: Path) -> None:
    runs = [(test_checkpoint.settings(shards, tmp_path / "plain", zero=2), None, "")]
    for zero, offload in OFFLOADS.items():
        for name, last in (("whole", None), ("broken", 2), ("broken", None)):
            run = test_checkpoint.settings(shards, tmp_path / f"{name}{zero}", zero=zero)
            run.deepspeed = {"zero_optimization": offload}
            runs.append((run, last, "raise"))
    run_ranks(test_checkpoint.train, 2, runs, timeout=350)
    plain = test_checkpoint.losses(tmp_path / "plain")
    for zero in OFFLOADS:
        for step, found in test_checkpoint.losses(tmp_path / f"whole{zero}").items():
            assert found == pytest.approx(plain[step], rel=1e-5, abs=1e-5)
        test_checkpoint.assert_equal(tmp_path / f"broken{zero}", tmp_path / f"whole{zero}")


@pytest.mark.timeout(240)
def test_frozen_trunks_train_alike_where_no_parameter_stays_whole(shards: Path, tmp_path: Path) -> None:
    runs = []
    for zero in (0, 3):
        run = test_checkpoint.settings(shards, tmp_path / str(zero), zero=zero, save_every=9)
        run.model.speech.train = run.model.image.train = "none"
        run.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        runs.append((run, None, ""))
    run_ranks(test_checkpoint.train, 2, runs, timeout=220)
    expected = test_checkpoint.losses(tmp_path / "0")
    for step, found in test_checkpoint.losses(tmp_path / "3").items():
        assert found == pytest.approx(expected[step], rel=1e-5, abs=1e-5)
