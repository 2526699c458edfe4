import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.toolkit.objectives import naive
from toolkit.objectives.matching import draw_negatives, matching_loss

ALMOST_ONE = (1 - 2**-24, 1 - 2**-53)  # the largest float32 and float64 below 1


def embeddings(seed: int, rows: int, width: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, rows, generator=torch.Generator().manual_seed(seed))


def assert_frequencies(drawn: torch.Tensor, probabilities: list[float]) -> None:
    """Check that Pearson's statistic is within five deviations of its mean, and no impossible value was sampled."""
    expected = torch.tensor(probabilities) * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0, f"drawn though impossible: {counts.tolist()} for {probabilities}"
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = float(possible.sum() - 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 1, f"{counts.tolist()} for {expected.tolist()}"


def test_frequencies_are_the_softmax_of_the_similarities():
    rows = 8000
    speech, image = embeddings(0, 1).expand(rows, -1), embeddings(1, 1).expand(rows, -1)
    speech_keys, image_keys = embeddings(2, 9), embeddings(3, 9)
    key_ids = torch.tensor([5, 1, 2, 5, 3, 3, -1, 4, 5])
    ids = torch.full((rows,), 5)
    temperature = torch.tensor(0.5)
    drawn = draw_negatives(speech, image, speech_keys, image_keys, ids, key_ids, temperature, uniforms(rows))
    assert drawn.valid.all()
    assert_frequencies(drawn.image, naive.draw_probabilities(speech[0], image_keys, 5, key_ids, 0.5))
    assert_frequencies(drawn.speech, naive.draw_probabilities(image[0], speech_keys, 5, key_ids, 0.5))


@pytest.mark.parametrize("seed", range(5))
def test_samples_equal_a_search_in_the_cumulative_distribution(seed):
    speech, image, speech_keys, image_keys = (embeddings(10 * seed + n, 6, dtype=torch.float64) for n in range(4))
    ids = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(seed))
    chances = uniforms(6, seed)
    drawn = draw_negatives(speech, image, speech_keys, image_keys, ids, ids, torch.tensor(0.3), chances)
    directions = ((speech, image_keys, drawn.image), (image, speech_keys, drawn.speech))
    for direction, (query, keys, got) in enumerate(directions):
        for i in range(6):
            probabilities = naive.draw_probabilities(query[i], keys, int(ids[i]), ids, 0.3)
            assert drawn.valid[direction, i] == (sum(probabilities) > 0)
            if sum(probabilities) > 0:
                cumulative, expected = 0.0, -1
                while cumulative <= chances[direction, i]:
                    expected += 1
                    cumulative += probabilities[expected]
                assert got[i] == expected, f"row {i} of direction {direction}"


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.001])
def test_never_samples_the_same_picture_or_an_empty_slot(temperature):
    ids = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(1))
    keys = torch.eye(5)[ids]  # a row's own picture is by far the most similar
    key_ids = torch.where(torch.arange(64) % 7 == 0, -1, ids)
    for chance in (0.0, 0.5, *ALMOST_ONE):
        chances = torch.full((2, 64), chance, dtype=torch.float64)
        drawn = draw_negatives(keys, keys, keys, keys, ids, key_ids, torch.tensor(temperature), chances)
        assert drawn.valid.all(), f"nothing drawn at {chance}"
        for index in (drawn.image, drawn.speech):
            assert (key_ids[index] != ids).all(), f"same picture drawn at {chance}"
            assert (key_ids[index] != -1).all(), f"empty slot drawn at {chance}"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_samples_uniformly_if_the_similarities_are_not_finite(broken):
    rows = 4000
    speech, image = torch.full((rows, 2), broken), torch.ones(rows, 2)
    key_ids = torch.tensor([0, 1, 0, 2, 3])
    keys = torch.ones(5, 2)
    ids = torch.zeros(rows, dtype=torch.int64)
    drawn = draw_negatives(speech, image, keys, keys, ids, key_ids, torch.tensor(0.07), uniforms(rows))
    assert drawn.valid.all()
    assert_frequencies(drawn.image, [0, 1 / 3, 0, 1 / 3, 1 / 3])


def test_marks_rows_without_any_other_picture():
    x = embeddings(0, 3)
    ids = torch.tensor([4, 4, 4])
    drawn = draw_negatives(x, x, x, x, ids, ids, torch.tensor(0.07), uniforms(3))
    assert not drawn.valid.any()
    assert ((drawn.image >= 0) & (drawn.image < 3)).all(), "index out of range"


def test_samples_do_not_depend_on_the_world_size():
    x, y, ids, chances = embeddings(0, 12), embeddings(1, 12), torch.arange(12) % 7, uniforms(12)
    whole = draw_negatives(x, y, x, y, ids, ids, torch.tensor(0.2), chances)
    for own in torch.arange(12).chunk(4):
        part = draw_negatives(x[own], y[own], x, y, ids[own], ids, torch.tensor(0.2), chances[:, own])
        assert part.image.tolist() == whole.image[own].tolist()
        assert part.speech.tolist() == whole.speech[own].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_loss_equals_naive_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    dtype, tolerance = ((torch.float64, 1e-9), (torch.float32, 1e-5))[seed % 2]
    rows = 1 + seed
    logits = [torch.randn(rows, 2, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]
    valid = torch.rand(2, rows, generator=generator) < 0.7
    results = []
    for loss in (matching_loss, naive.matching):
        value = loss(*logits, valid)
        results.append((value, *torch.autograd.grad(value, logits, materialize_grads=True)))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_invalid_negatives_add_nothing():
    positive, negative = torch.zeros(2, 2), torch.tensor([[0.0, 50.0], [0.0, 50.0]])
    loss = matching_loss(positive, negative, negative, torch.zeros(2, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor(2.0).log() / 3)


def test_does_not_synchronize_with_the_device():
    x, ids = embeddings(0, 4), torch.arange(4)
    with FakeTensorMode() as mode:  # raises if a value is needed on the host
        x, ids, temperature, chances = map(mode.from_tensor, (x, ids, torch.tensor(0.07), uniforms(4)))
        drawn = draw_negatives(x, x, x, x, ids, ids, temperature, chances)
        assert matching_loss(x[:, :2], x[drawn.image, :2], x[drawn.speech, :2], drawn.valid).shape == ()
