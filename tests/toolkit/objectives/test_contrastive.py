import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.toolkit.objectives import naive
from toolkit.objectives.contrastive import BLOCK, contrastive_loss


class Case:
    """A random batch with repeated picture ids, keys of other ranks and a partly empty queue."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        def embeddings(rows: int) -> torch.Tensor:
            return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

        batch, others, queue, width = number(1, 5), number(0, 5), number(0, 6), number(2, 6)
        keys = batch + others + queue
        self.speech, self.image = embeddings(batch).requires_grad_(), embeddings(batch).requires_grad_()
        self.speech_keys, self.image_keys = embeddings(keys), embeddings(keys)
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
def test_equals_naive_loops_for_any_block_size(seed):
    case = Case(seed)
    inputs = (case.speech, case.image, case.temperature)
    for alpha in (0.0, 0.4, 1.0):
        reference = naive.contrastive(*case.arguments(alpha))
        expected = torch.autograd.grad(reference, inputs)
        for block in (1, 2 * len(case.key_ids), BLOCK):  # one row, two rows, all rows at once
            ours = contrastive_loss(*case.arguments(alpha), block=block)
            torch.testing.assert_close(ours, reference, msg=lambda text, a=alpha: f"loss at alpha {a}: {text}")
            torch.testing.assert_close(torch.autograd.grad(3 * ours, inputs), tuple(3 * one for one in expected))


@pytest.mark.parametrize("seed", range(3))
def test_equals_naive_loops_in_float32(seed):
    case = Case(100 + seed, torch.float32)
    ours, reference = (loss(*case.arguments(0.4)) for loss in (contrastive_loss, naive.contrastive))
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    inputs = (case.speech, case.image, case.temperature)
    expected = torch.autograd.grad(reference, inputs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_without_momentum_the_keys_receive_gradients(seed):
    case = Case(200 + seed)
    gradients = []
    for loss in (contrastive_loss, naive.contrastive):
        value = loss(case.speech, case.image, case.speech, case.image, case.ids, case.ids, case.temperature)
        gradients.append((value, *torch.autograd.grad(value, (case.speech, case.image, case.temperature))))
    torch.testing.assert_close(*gradients)


def test_keys_may_be_given_in_parts_of_which_some_receive_gradients():
    case = Case(2)
    cut, rows = len(case.ids), len(case.key_ids)
    assert 1 < cut < rows
    speech_keys, image_keys = (keys.clone().requires_grad_() for keys in (case.speech_keys, case.image_keys))
    arguments = (case.speech, case.image, speech_keys, image_keys, *case.arguments(0.4)[4:])
    reference = naive.contrastive(*arguments)
    expected = torch.autograd.grad(reference, (speech_keys, image_keys, case.speech, case.image))
    expected = (*(by_key[:cut] for by_key in expected[:2]), *expected[2:])
    for block in (1, BLOCK):
        parts = [[keys.detach()[:cut].requires_grad_(), keys.detach()[cut:]] for keys in (speech_keys, image_keys)]
        ours = contrastive_loss(case.speech, case.image, *parts, *arguments[4:], block=block)
        torch.testing.assert_close(ours, reference)
        gradients = torch.autograd.grad(ours, (parts[0][0], parts[1][0], case.speech, case.image))
        torch.testing.assert_close(gradients, expected)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in filter(torch.is_tensor, tree_leaves(output)):
            self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


def test_the_logits_of_all_rows_are_never_materialized_at_once():
    rows, keys, width, block = 32, 300, 2, 1200
    speech_keys, image_keys = (F.normalize(torch.randn(keys, width), dim=1) for _ in range(2))
    speech, image = (side[:rows].clone().requires_grad_() for side in (speech_keys, image_keys))
    arguments = (speech_keys, image_keys, torch.arange(rows), torch.arange(keys))
    temperature = torch.tensor(0.1, requires_grad=True)
    own = (speech_keys[:rows], image_keys[:rows])
    with Largest() as largest:
        contrastive_loss(speech, image, *arguments, temperature, 0.4, *own, block=block).backward()
    assert largest.numbers == 2 * block, "more than a block of student's and teacher's logits, or not seen at all"


def test_the_loss_is_0_for_one_certain_pair_and_log_2_for_two_equal_ones():
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


def test_does_not_synchronize_with_the_device():
    case = Case(7)
    with FakeTensorMode() as mode:  # raises if a value is needed on the host
        fake = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in case.arguments(0.4)]
        assert contrastive_loss(*fake).shape == ()
