import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.toolkit.objectives import naive
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import Noised, add_noise, denoising_loss

LOSSES = ("cosine", "mse", "infonce")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths_to_mask(lengths: list[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def labeled(mask: torch.Tensor) -> torch.Tensor:
    """Tokens [B, L, 2] that contain their own row and position."""
    batch, length = mask.shape
    return torch.stack(torch.meshgrid(torch.arange(batch), torch.arange(length), indexing="ij"), dim=-1).float()


def noise(tokens: torch.Tensor, mask: torch.Tensor, kind: str, seed: int = 0, **options) -> Noised:
    settings = {
        "ids": torch.arange(len(tokens)),
        "ratio": 0.5,
        "span": 1,
        "snr_db": 0.0,
        "swap_group": 10**6,
        **options,
    }
    random = CounterRNG(seed, torch.arange(len(tokens)))
    return add_noise(tokens, mask, **({"noise": kind, "random": random} | settings))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_naive_loops(loss, seed):
    g = generator(seed)
    dtype, tolerance = ((torch.float64, 1e-9), (torch.float32, 1e-5))[seed % 2]
    batch, length, width = 1 + seed, 3 + seed % 3, 2 + seed
    mask = lengths_to_mask(torch.randint(0, length + 1, (batch,), generator=g).tolist(), length)
    mask[0] = True
    positions = torch.rand(batch, length, generator=g) < 0.6  # includes padding, which must not count
    predicted = torch.randn(batch, length, width, generator=g, dtype=dtype, requires_grad=True)
    target = torch.randn(batch, length, width, generator=g, dtype=dtype)
    results = []
    for function in (denoising_loss, naive.denoising):
        value = function(predicted, target, positions, mask, loss, 0.2)
        results.append((value, *torch.autograd.grad(value, predicted)))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_has_no_gradient_to_the_target_and_none_from_padding(loss):
    mask = lengths_to_mask([3, 0], 4)  # the second row is padding only
    predicted, target = (torch.randn(2, 4, 5, generator=generator(n), requires_grad=True) for n in range(2))
    value = denoising_loss(predicted, target, mask, mask, loss)
    gradient, none = torch.autograd.grad(value, (predicted, target), allow_unused=True)
    assert none is None
    assert gradient.isfinite().all()
    assert gradient[~mask].eq(0).all()
    elsewhere = torch.where(mask[..., None], 0.0, 1e3)
    assert denoising_loss(predicted + elsewhere, target - elsewhere, mask, mask, loss) == value


def test_loss_of_rows_without_positions_counts_in_the_mean():
    mask = torch.ones(2, 3, dtype=torch.bool)
    positions = torch.tensor([[True, False, False], [False, False, False]])
    x = torch.randn(2, 3, 4, generator=generator())
    torch.testing.assert_close(denoising_loss(-x, x, positions, mask, "cosine"), torch.tensor(1.0))


def test_loss_is_float32_under_bf16_inputs_and_autocast():
    x, y = (torch.randn(2, 3, 4, generator=generator(n)).bfloat16() for n in range(2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    for loss in LOSSES:
        expected = denoising_loss(x.float(), y.float(), mask, mask, loss)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(denoising_loss(x, y, mask, mask, loss), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["swap", "gaussian", "mask"])
@pytest.mark.parametrize("span", [1, 4])
def test_noise_is_only_at_its_positions_and_not_on_padding(kind, span):
    mask = lengths_to_mask([9, 1, 5, 12], 12)
    tokens = torch.randn(4, 12, 3, generator=generator(1))
    noised = noise(tokens, mask, kind, span=span, ratio=0.7)
    assert noised.positions.any()
    assert not noised.positions[~mask].any()
    assert noised.tokens[~noised.positions].equal(tokens[~noised.positions])
    assert (noised.tokens != tokens).any(-1)[noised.positions].all()


@pytest.mark.parametrize(("span", "ratio"), [(1, 0.15), (5, 0.5), (5, 1.0), (3, 0.0)])
def test_every_position_is_noised_with_probability_ratio(span, ratio):
    rows, length = 4000, 17
    mask = torch.ones(rows, length, dtype=torch.bool)
    noised = noise(torch.ones(rows, length, 1), mask, "mask", span=span, ratio=ratio)
    share = noised.positions.float().mean(0)  # by position, including the first and the last
    deviation = (ratio * (1 - ratio) / rows) ** 0.5
    assert ((share - ratio).abs() <= 4.5 * deviation).all(), f"shares {share.tolist()}, expected {ratio}"


def test_spans_are_complete_and_start_anywhere():
    noised = noise(torch.ones(50, 40, 1), torch.ones(50, 40, dtype=torch.bool), "mask", span=4, ratio=0.3)
    for row in noised.positions.tolist():
        inner = "".join("x" if one else "." for one in row).split(".")[1:-1]
        assert all(len(run) % 4 == 0 for run in inner), f"runs {inner}"
    starts = (noised.positions[:, 1:] & ~noised.positions[:, :-1]).nonzero()[:, 1]
    assert set((starts % 4).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("span", [1, 3])
def test_swap_takes_spans_of_other_pictures_without_padding(span):
    mask = lengths_to_mask([10, 7, 2, 10, 6, 0], 10)
    mask[3, 4] = False  # padding may be anywhere
    ids = torch.tensor([1, 1, 2, 3, 3, 4])
    tokens = labeled(mask)
    for seed in range(20):
        noised = noise(tokens, mask, "swap", seed, ids=ids, span=span, ratio=0.6)
        for b, t in noised.positions.nonzero().tolist():
            row, place = (int(n) for n in noised.tokens[b, t])
            assert ids[row] != ids[b], f"row {b} took from row {row}, the same picture"
            assert mask[row, place], f"row {b} took padding: place {place} of row {row}"


def test_swapped_spans_are_consecutive_frames_of_one_row():
    mask = torch.ones(6, 30, dtype=torch.bool)
    noised = noise(labeled(mask), mask, "swap", span=5, ratio=1.0)
    same_row = noised.tokens[:, 1:, 0] == noised.tokens[:, :-1, 0]
    following = noised.tokens[:, 1:, 1] == noised.tokens[:, :-1, 1] + 1
    breaks = (~(same_row & following)).sum(1)
    assert (breaks <= 6).all(), f"{breaks.tolist()} breaks, a row of 30 has at most 7 runs of 5"


def test_swap_samples_rows_and_positions_uniformly():
    rows, length = 400, 20
    mask = torch.ones(rows, length, dtype=torch.bool)
    tokens = labeled(mask)
    noised = noise(tokens, mask, "swap", ids=torch.arange(rows) % 4, ratio=1.0)
    assert noised.positions.all()
    for label, choices in ((0, rows), (1, length)):
        counts = torch.bincount(noised.tokens[..., label].flatten().long(), minlength=choices)
        expected = rows * length / choices
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < choices + 5 * (2 * choices) ** 0.5, f"uneven: {counts.tolist()}"


def test_swap_leaves_rows_without_another_picture_unchanged():
    mask = lengths_to_mask([4, 4, 0], 4)
    tokens = labeled(mask)
    noised = noise(tokens, mask, "swap", ids=torch.tensor([7, 7, 8]), ratio=1.0)  # the third row is padding only
    assert not noised.positions.any()
    assert noised.tokens.equal(tokens)


def test_swap_passes_gradients_to_the_source_tokens():
    mask = torch.ones(3, 4, dtype=torch.bool)
    tokens = torch.randn(3, 4, 2, generator=generator(), requires_grad=True)
    noise(tokens, mask, "swap", ratio=0.5).tokens.sum().backward()
    assert tokens.grad.sum() == tokens.numel()
    assert (tokens.grad != 1).any()


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0])
def test_gaussian_noise_has_the_requested_ratio_in_each_row(snr_db):
    mask = lengths_to_mask([200, 60], 200)
    tokens = torch.randn(2, 200, 50, generator=generator(1)) * torch.tensor([1.0, 30.0])[:, None, None]
    tokens[~mask] = 1e4  # padding does not count as signal
    noised = noise(tokens, mask, "gaussian", ratio=1.0, snr_db=snr_db)
    for clean, noisy, real in zip(tokens, noised.tokens, mask, strict=True):
        added = (noisy - clean)[real]
        measured = 10 * (clean[real].square().mean() / added.square().mean()).log10()
        assert abs(measured - snr_db) < 0.3
        assert abs(added.mean()) < 0.1 * added.std()


def test_mask_inserts_zeros():
    mask = torch.ones(2, 6, dtype=torch.bool)
    tokens = torch.ones(2, 6, 3)
    zeros = noise(tokens, mask, "mask")
    assert zeros.tokens[zeros.positions].eq(0).all()


@pytest.mark.parametrize("kind", ["swap", "gaussian", "mask"])
def test_noise_is_determined_by_the_seed(kind):
    tokens, mask = torch.randn(3, 8, 2, generator=generator()), torch.ones(3, 8, dtype=torch.bool)
    before = torch.get_rng_state()
    first = noise(tokens, mask, kind, seed=1)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    again, other = noise(tokens, mask, kind, seed=1), noise(tokens, mask, kind, seed=2)
    assert again.tokens.equal(first.tokens)
    assert not other.tokens.equal(first.tokens)


@pytest.mark.parametrize("kind", ["swap", "gaussian", "mask"])
@pytest.mark.parametrize("span", [1, 3])
def test_the_noise_of_a_row_does_not_depend_on_world_size_and_padding(kind, span):
    mask = lengths_to_mask([9, 7, 5, 8, 12, 3, 6, 12], 12)
    tokens = torch.randn(8, 12, 3, generator=generator(1))
    whole = noise(tokens, mask, kind, span=span, swap_group=2)
    for ranks in (2, 4):
        for rank in range(ranks):
            own = torch.arange(8).chunk(ranks)[rank]
            longest = int(mask[own].sum(1).max())
            part = noise(
                tokens[own, :longest],
                mask[own, :longest],
                kind,
                ids=own,
                span=span,
                swap_group=2,
                random=CounterRNG(0, own),
            )
            assert part.positions.equal(whole.positions[own, :longest])
            real = mask[own, :longest]
            assert part.tokens[real].equal(whole.tokens[own, :longest][real])


def test_swap_takes_from_the_rows_of_its_group():
    mask = torch.ones(12, 40, dtype=torch.bool)
    taken = noise(labeled(mask), mask, "swap", ratio=1.0, swap_group=4).tokens[..., 0].long()
    for row in range(12):
        assert set(taken[row].tolist()) == {n for n in range(12) if n // 4 == row // 4 and n != row}


def test_unknown_names_are_refused():
    tokens, mask = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected swap, gaussian or mask"):
        noise(tokens, mask, "salt")
    with pytest.raises(ValueError, match="span is 0"):
        noise(tokens, mask, "mask", span=0)
    with pytest.raises(ValueError, match="expected cosine, mse or infonce"):
        denoising_loss(tokens, tokens, mask, mask, "l1")


def test_does_not_synchronize_with_the_device():
    with FakeTensorMode() as mode:  # raises if a value is needed on the host
        tokens, mask = mode.from_tensor(torch.ones(2, 5, 3)), mode.from_tensor(torch.ones(2, 5, dtype=torch.bool))
        for kind in ("swap", "gaussian", "mask"):
            random = CounterRNG(0, mode.from_tensor(torch.arange(2)))
            noised = noise(tokens, mask, kind, span=2, ids=mode.from_tensor(torch.arange(2)), random=random)
            for loss in LOSSES:
                assert denoising_loss(noised.tokens, tokens, noised.positions, mask, loss).shape == ()
