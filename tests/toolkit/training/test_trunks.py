"""Every trunk trains with the same losses at every ZeRO stage, and in bf16, and its export computes the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.tiny import PARTITIONED
from tests.toolkit.model.small_trunks import with_trunk, write_trunk
from tests.toolkit.model.test_spectrogram import settings as spectrogram_settings
from tests.toolkit.training.test_trainer import losses, make_trainer, settings
from toolkit.config import schema as config
from toolkit.model.retrieval import SpeechImageModel

PAIRS = [("wavlm-large", "siglip"), ("wav2vec2-base", "dinov2"), ("whisper", "siglip-vision"), ("wavlm-base", "dinov2")]


def exported(rank: int, world_size: int, *runs: config.Config) -> None:
    """Train, and check that the export computes what the trained model computes."""
    from toolkit.training.zero.engine import gathered_parameters

    for run in runs:
        trainer = make_trainer(rank, world_size, run)
        trainer.train()
        generator = torch.Generator().manual_seed(3)
        waves, lengths = 0.1 * torch.randn(2, 9000, generator=generator), torch.tensor([9000, 6000])
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
        model = trainer.learner.model.eval()
        with torch.no_grad(), gathered_parameters(trainer.engine, list(model.parameters())):
            speech, image = model.encode_speech(waves, lengths), model.encode_image(images)
        if rank == 0:
            again = SpeechImageModel.from_pretrained(Path(run.run) / "export/last", dtype="auto")
            with torch.no_grad():
                found = again.encode_speech(waves, lengths), again.encode_image(images)
            for one, other in zip((speech, image), found, strict=True):
                torch.testing.assert_close(other.embedding, one.embedding, atol=1e-5, rtol=0)  # LoRA is merged
                assert torch.equal(one.mask, other.mask)
        trainer.close()


def run_of(shards: Path, folder: Path, names: tuple[str, str], train: str, **training: object) -> config.Config:
    run = settings(shards, folder, steps=2, warmup_steps=0, log_every=1, **training)
    for name in names:
        path = folder.parent / name
        if not path.is_dir():
            write_trunk(name, path)
    run.model.speech = with_trunk(names[0], folder.parent / names[0], train).speech
    run.model.image = with_trunk(names[1], folder.parent / names[1], train).image
    if train == "lora":
        for side in (run.model.speech, run.model.image):
            side.train, side.lora_rank = "none", 2
    run.data.resize = "squash" if names[1].startswith("siglip") else "crop"
    if training.get("zero_stage") == 3:
        run.deepspeed = PARTITIONED
    return run


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("names", "train"), [(PAIRS[n], train) for n, train in ((0, "1"), (0, "all"), (0, "lora"), (1, "all"), (2, "lora"))]
)
def test_every_zero_stage_trains_with_the_same_losses(
    shards: Path, tmp_path: Path, names: tuple[str, str], train: str
) -> None:
    runs = [run_of(shards, tmp_path / str(zero), names, train, zero_stage=zero) for zero in range(4)]
    run_ranks(exported, 2, *runs, timeout=240)
    reference = losses(tmp_path / "0")
    assert reference[0]["loss"] != pytest.approx(reference[1]["loss"], rel=1e-3), "nothing was learned"
    weights = load_file(tmp_path / "0/export/last/model.safetensors")
    for zero in (1, 2, 3):
        for found, expected in zip(losses(tmp_path / str(zero)), reference, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), f"step {expected['step']}, ZeRO {zero}"
        assert load_file(tmp_path / f"{zero}/export/last/model.safetensors").keys() == weights.keys()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("names", PAIRS[2:], ids=" and ".join)
def test_every_trunk_trains_in_bf16(shards: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    runs = [run_of(shards, tmp_path / str(zero), names, "all", zero_stage=zero, precision="bf16") for zero in (0, 3)]
    run_ranks(exported, 1, *runs, timeout=200)
    for zero in (0, 3):
        assert all(math.isfinite(each["loss"]) for each in losses(tmp_path / str(zero)))
        weights = load_file(tmp_path / f"{zero}/export/last/model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.bfloat16}
        stored = json.loads((tmp_path / f"{zero}/export/last/config.json").read_text())
        assert stored["speech"]["architecture"] == names[0].split("-")[0]


@pytest.mark.timeout(240)
def test_spectrograms_train_with_the_same_losses_at_zero_3(shards: Path, tmp_path: Path) -> None:
    runs = []
    for zero in (0, 3):
        run = settings(shards, tmp_path / str(zero), steps=2, warmup_steps=0, log_every=1, zero_stage=zero)
        run.model.speech = spectrogram_settings(groups=2).speech
        run.deepspeed = PARTITIONED if zero else {}
        runs.append(run)
    run_ranks(exported, 2, *runs, timeout=200)
    reference = losses(tmp_path / "0")
    assert reference[0]["loss"] != pytest.approx(reference[1]["loss"], rel=1e-3), "nothing was learned"
    for found, expected in zip(losses(tmp_path / "3"), reference, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
