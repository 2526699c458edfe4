import pytest
import torch

from toolkit.objectives.counter_rng import CounterRNG


def splitmix(seed: int, row: int, stream: int, index: int) -> float:
    """The same number, computed with Python's integers."""
    step, wrap = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(z: int) -> int:
        z &= wrap
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
        return z ^ z >> 31

    key = mixed(row * step + mixed(seed + stream * step))
    return (mixed(key + index * step) >> 40) / 2**24


def test_numbers_are_those_of_the_formula():
    drawn = CounterRNG(2**62 + 5, torch.tensor([0, 3, 2**40])).uniform(2, 2, 3)
    for n, row in enumerate((0, 3, 2**40)):
        assert drawn[n].flatten().tolist() == [splitmix(2**62 + 5, row, 2, index) for index in range(6)]


@pytest.mark.parametrize("stream", range(5))
def test_uniform_numbers_are_uniform_and_uncorrelated(stream):
    drawn = CounterRNG(stream, torch.arange(400)).uniform(stream, 500).double()
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = torch.histc(drawn, 100, 0, 1)
    assert (((counts - 2000) ** 2) / 2000).sum() < 100 + 5 * 200**0.5
    centered = drawn - drawn.mean()
    for other in (centered.roll(1, 0), centered.roll(1, 1)):  # neighbors in the batch, and in a row
        assert abs((centered * other).mean() / centered.var()) < 5 / drawn.numel() ** 0.5


def test_normal_numbers_have_the_distribution():
    drawn = CounterRNG(0, torch.arange(300)).normal(4, 40, 20).double().flatten()
    assert drawn.isfinite().all()
    expected = torch.special.ndtri((torch.arange(len(drawn)) + 0.5) / len(drawn))
    distance = (drawn.sort().values - expected)[100:-100].abs().max()
    assert distance < 0.05
    assert drawn.abs().max() > 4


def test_streams_seeds_and_rows_differ():
    base = CounterRNG(1, torch.arange(8))
    others = [base.uniform(1, 9), CounterRNG(2, base.rows).uniform(0, 9), CounterRNG(1, base.rows + 8).uniform(0, 9)]
    assert all(not torch.isin(other, base.uniform(0, 9)).any() for other in others)
