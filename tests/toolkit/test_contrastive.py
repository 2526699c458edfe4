import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.toolkit import naive
from toolkit.objectives.contrastive import contrastive_loss


class Case:
    """A random batch with repeated identities, keys of further ranks and a partly empty queue."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        def vectors(rows: int) -> torch.Tensor:
            return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

        batch, others, queue, width = number(1, 5), number(0, 5), number(0, 6), number(2, 6)
        keys = batch + others + queue
        self.speech, self.image = vectors(batch).requires_grad_(), vectors(batch).requires_grad_()
        self.speech_keys, self.image_keys = vectors(keys), vectors(keys)
        self.own_speech, self.own_image = self.speech_keys[:batch], self.image_keys[:batch]
        self.ids = torch.randint(0, 4, (batch,), generator=generator)
        further = torch.randint(-1, 6, (others + queue,), generator=generator)
        further[:others].clamp_(min=0)  # only queue slots are empty
        self.key_ids = torch.cat([self.ids, further])
        self.temperature = torch.tensor(0.05 + 0.1 * number(0, 5), dtype=dtype, requires_grad=True)

    def arguments(self, alpha: float) -> tuple:
        pairs = (self.speech, self.image, self.speech_keys, self.image_keys, self.ids, self.key_ids, self.temperature)
        return (*pairs, alpha, self.own_speech, self.own_image)


@pytest.mark.parametrize("seed", range(12))
def test_equals_naive_loops(seed):
    case = Case(seed)
    for alpha in (0.0, 0.4, 1.0):
        ours, reference = (loss(*case.arguments(alpha)) for loss in (contrastive_loss, naive.contrastive))
        torch.testing.assert_close(ours, reference, msg=lambda text, a=alpha: f"loss at alpha {a}: {text}")
        inputs = (case.speech, case.image, case.temperature)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs))


@pytest.mark.parametrize("seed", range(3))
def test_equals_naive_loops_in_float32(seed):
    case = Case(100 + seed, torch.float32)
    ours, reference = (loss(*case.arguments(0.4)) for loss in (contrastive_loss, naive.contrastive))
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    inputs = (case.speech, case.image, case.temperature)
    expected = torch.autograd.grad(reference, inputs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_without_momentum_the_keys_carry_gradient(seed):
    case = Case(200 + seed)
    gradients = []
    for loss in (contrastive_loss, naive.contrastive):
        value = loss(case.speech, case.image, case.speech, case.image, case.ids, case.ids, case.temperature)
        gradients.append((value, *torch.autograd.grad(value, (case.speech, case.image, case.temperature))))
    torch.testing.assert_close(*gradients)


def test_one_certain_pair_costs_nothing_and_two_equal_ones_log_two():
    one, two = torch.eye(2)[:1], torch.ones(2, 2) / 2**0.5
    ids = torch.tensor([7, 8])
    assert contrastive_loss(one, one, one, one, ids[:1], ids[:1], torch.tensor(0.07)) == 0
    even = contrastive_loss(two, two, two, two, ids, ids, torch.tensor(0.07))
    torch.testing.assert_close(even, torch.tensor(2.0).log())


def test_content_of_empty_slots_is_ignored():
    case = Case(3)
    assert len(case.key_ids) > len(case.ids)
    case.key_ids[len(case.ids) :] = -1
    empty = case.key_ids == -1
    before = contrastive_loss(*case.arguments(0.4))
    case.speech_keys[empty], case.image_keys[empty] = 1e3, -1e3
    assert contrastive_loss(*case.arguments(0.4)) == before


def test_targets_are_constants():
    case = Case(4)
    own_speech, own_image = case.own_speech.clone().requires_grad_(), case.own_image.clone().requires_grad_()
    loss = contrastive_loss(*case.arguments(0.4)[:8], own_speech, own_image)
    assert torch.autograd.grad(loss, (own_speech, own_image), allow_unused=True) == (None, None)


def test_is_float32_under_bf16_inputs_and_autocast():
    case = Case(5, torch.bfloat16)
    arguments = case.arguments(0.4)
    wide = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    expected = contrastive_loss(*wide)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(contrastive_loss(*arguments), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive_loss(*wide), expected, atol=0, rtol=0)


def test_soft_targets_need_the_rows_own_keys():
    case = Case(6)
    with pytest.raises(ValueError, match="own_speech_keys"):
        contrastive_loss(*case.arguments(0.4)[:8])


def test_does_not_wait_for_the_device():
    case = Case(7)
    with FakeTensorMode() as mode:  # refuses whatever needs a value on the host
        fake = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in case.arguments(0.4)]
        assert contrastive_loss(*fake).shape == ()
