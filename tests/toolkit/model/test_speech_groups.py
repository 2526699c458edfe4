"""Groups of utterances of similar length: the same encodings with less padding, also under ZeRO-3."""

import numpy as np
import pytest
import torch
from torch import nn

from shards.length_groups import padded_length
from tests.distributed import run_ranks
from tests.tiny import tiny_model
from tests.toolkit.model.test_speech import BASE, LARGE, make_encoder, make_waves
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.speech import SpeechEncoder


@pytest.mark.parametrize("values", [BASE, LARGE])
@pytest.mark.parametrize("train", ["all", "1", "none"])
def test_groups_by_length_do_not_change_the_result(train: str, values: dict) -> None:
    torch.manual_seed(0)
    settings = tiny_model()
    settings.speech.train, settings.speech.config = train, values
    model = build_model(settings)
    waves, lengths = make_waves(16000, 500, 9000, 9000, 12345, 3000, 1)
    encoded = []
    for groups in (1, 3, 7, 20):
        model.speech.groups = groups
        encoded.append(model.speech(model.speech.frozen_features(waves, lengths, lengths.tolist())))
    for other in encoded[1:]:
        assert torch.equal(other.mask, encoded[0].mask)
        torch.testing.assert_close(other.embedding, encoded[0].embedding, atol=1e-5, rtol=0)
        real = other.mask
        torch.testing.assert_close(other.tokens[real], encoded[0].tokens[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("train", ["all", "1", "none"])
def test_each_group_is_padded_to_its_own_longest_only(train: str) -> None:
    settings = tiny_model()
    settings.speech.train, settings.speech.groups = train, 3
    model = build_model(settings)
    lengths = [16000, 4000, 9000, 8000, 15000, 3000, 2000]
    seen = []
    hook = model.speech.trunk.feature_extractor.conv_layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape))
    )
    model.speech(model.speech.frozen_features(torch.randn(7, 16000), torch.tensor(lengths), lengths))
    hook.remove()
    assert seen == [(3, 1, 4000), (2, 1, 9000), (2, 1, 16000)]
    assert sum(rows * samples for rows, _, samples in seen) == padded_length(lengths, 3), (
        "differs from the estimate of the dry run"
    )


@pytest.mark.parametrize("cut", [8.0, 15.0])
def test_the_fraction_of_padding_is_small(cut: float) -> None:
    """Batches of 32 with SpokenCOCO-like durations: see `tests/benchmarks/padding.py`."""
    chance = np.random.default_rng(0)
    batches = [np.minimum(chance.lognormal(1.38, 0.41, 32), cut) for _ in range(100)]
    padded = sum(padded_length(batch, config.Speech().groups) for batch in batches)
    assert 1 - sum(batch.sum() for batch in batches) / padded < 0.10


class Loss(nn.Module):
    """An encoder that computes its loss in `forward`, as DeepSpeed requires."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        features = self.encoder.frozen_features(waves, lengths, lengths.tolist())
        return self.encoder(features).embedding.square().sum(0).std()


def losses_of_stages(rank: int, world_size: int) -> list[list[float]]:
    from toolkit.training.zero.engine import make_engine

    batch = make_waves(*[(9000, 9000, 9000, 9000), (12000, 3000, 500, 7000)][rank])
    seen = []
    for zero in (0, 3):
        encoder = make_encoder(BASE, "all", head_layers=0)
        encoder.groups = 3
        training = config.Training(batch_size=world_size, zero_stage=zero, precision="fp32", lr=1e-2)
        # The default threshold would leave small parameters unpartitioned.
        sharding = {"stage3_param_persistence_threshold": 0} if zero == 3 else {}
        made = config.Config(training=training, deepspeed={"zero_optimization": sharding})
        engine = make_engine(Loss(encoder), made, world_size, torch.device("cpu"))
        losses = []
        for _ in range(3):
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        seen.append(losses)
        engine.destroy()
    return seen


@pytest.mark.timeout(120)
def test_ranks_with_different_lengths_run_under_zero_3():
    """The weights of the group norm are gathered where they are used, and all ranks call every layer equally often."""
    for sharded_not, sharded in run_ranks(losses_of_stages, 2, timeout=90):
        assert sharded == pytest.approx(sharded_not, rel=1e-4)
        assert sharded[0] != pytest.approx(sharded[-1], rel=1e-3), "the loss does not change"
