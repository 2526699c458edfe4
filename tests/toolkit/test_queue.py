import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.toolkit.naive import Ring
from toolkit.training.queue import EmbeddingQueue

WIDTH = 2


def pairs(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs number `first` and following, each recognisable."""
    ids = torch.arange(first, first + count)
    speech = ids[:, None] * torch.ones(WIDTH)
    return speech, -speech, ids


def content(queue: EmbeddingQueue) -> list[tuple[list[float], list[float], int]]:
    """The pairs of the ring, the oldest first."""
    order = (torch.arange(queue.size) + queue.pointer) % max(queue.size, 1)
    return [
        (queue.speech[slot].tolist(), queue.image[slot].tolist(), int(queue.ids[slot]))
        for slot in order.tolist()
        if queue.ids[slot] != -1
    ]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 7), batches=st.lists(st.integers(0, 20), max_size=8), restored=st.integers(0, 8))
def test_holds_what_a_plain_list_holds(size, batches, restored):
    queue, ring, first = EmbeddingQueue(size, WIDTH), Ring(size), 0
    for number, count in enumerate(batches):
        if number == restored:
            state, queue = queue.state_dict(), EmbeddingQueue(size, WIDTH)
            queue.load_state_dict(state)
        queue.push(*pairs(first, count))
        ring.push(*pairs(first, count))
        first += count
        assert content(queue) == ring.entries, f"after batches {batches[: number + 1]} into {size}"
        assert 0 <= queue.pointer < max(size, 1)


def test_starts_empty_and_is_not_trained():
    queue = EmbeddingQueue(3, WIDTH)
    assert queue.ids.tolist() == [-1, -1, -1]
    assert not list(queue.parameters())
    assert set(queue.state_dict()) == {"speech", "image", "ids", "pointer"}


def test_takes_no_gradient_and_leaves_earlier_graphs_alone():
    queue = EmbeddingQueue(4, WIDTH)
    vectors = torch.randn(3, WIDTH, requires_grad=True)
    loss = (vectors @ torch.cat([vectors, queue.speech]).T).square().sum()
    queue.push(vectors, vectors, torch.arange(3))
    assert not queue.speech.requires_grad
    loss.backward()
    assert vectors.grad.isfinite().all()


def test_keeps_low_precision_vectors_in_float32():
    queue = EmbeddingQueue(2, WIDTH)
    speech, image, ids = pairs(1, 3)
    queue.push(speech.bfloat16(), image.bfloat16(), ids)
    assert queue.speech.dtype == torch.float32
    assert content(queue) == [([2, 2], [-2, -2], 2), ([3, 3], [-3, -3], 3)]


def test_does_not_wait_for_the_device():
    with FakeTensorMode():  # refuses whatever needs a value on the host
        queue = EmbeddingQueue(4, WIDTH)
        queue.push(torch.ones(6, WIDTH), torch.ones(6, WIDTH), torch.arange(6))
        assert queue.ids.shape == (4,)
