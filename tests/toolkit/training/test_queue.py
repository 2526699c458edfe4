from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.toolkit.objectives.naive import Ring
from toolkit.model.outputs import Encoded
from toolkit.training.queue import EmbeddingQueue, TokenQueue

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
    embeddings = torch.randn(3, WIDTH, requires_grad=True)
    loss = (embeddings @ torch.cat([embeddings, queue.speech]).T).square().sum()
    queue.push(embeddings, embeddings, torch.arange(3))
    assert not queue.speech.requires_grad
    loss.backward()
    assert embeddings.grad.isfinite().all()


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


FRAMES, PATCHES = 5, 3


def encoded(ids: torch.Tensor, length: int) -> tuple[Encoded, Encoded]:
    """Utterances of at most `length` frames, and pictures: every number is the identity."""
    frames = ids[:, None, None] * torch.ones(length, WIDTH)
    mask = torch.arange(length) <= ids[:, None] % length
    patches = -ids[:, None, None] * torch.ones(PATCHES, WIDTH)
    return Encoded(frames[:, 0], frames, mask), Encoded(frames[:, 0], patches, torch.ones(len(ids), PATCHES).bool())


def fill(queues: list[TokenQueue], batches: int, first: int = 0) -> None:
    """Push global micro-batches of consecutive identities into the queues of all ranks."""
    rows, ranks = queues[0].rows, len(queues)
    for number in range(first, first + batches):
        ids = torch.arange(number * ranks * rows, (number + 1) * ranks * rows)
        keys = ids[:, None] * torch.ones(WIDTH), -ids[:, None] * torch.ones(WIDTH), ids
        for rank, queue in enumerate(queues):
            own = ids[rank * rows : (rank + 1) * rows]
            queue.push(*encoded(own, 2 + number % (FRAMES - 1)), *keys)


def make(size: int, rows: int, ranks: int) -> list[TokenQueue]:
    return [TokenQueue(size, rows, ranks, WIDTH, (FRAMES, WIDTH), (PATCHES, WIDTH)) for _ in range(ranks)]


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 40), rows=st.integers(1, 4), ranks=st.integers(1, 3), batches=st.integers(0, 7), data=st.data()
)
def test_a_candidates_key_and_its_tokens_on_its_rank_are_of_one_pair(size, rows, ranks, batches, data):
    queues = make(size, rows, ranks)
    fill(queues, batches)
    kept = min(batches, size // (rows * ranks)) * rows * ranks
    newest = set(range(batches * rows * ranks)[-kept:]) if kept else set()
    assert {int(each) for each in queues[0].keys.ids if each != -1} == newest
    if not kept:
        return
    chosen = data.draw(st.integers(0, len(queues[0].keys.ids) - 1))
    candidate = torch.tensor(rows * ranks + chosen)  # behind the batch
    row = int(queues[0].global_rows(candidate))
    per_rank = (1 + queues[0].blocks) * rows
    owner, local = queues[row // per_rank], row % per_rank - rows
    queued = owner.tokens(FRAMES)
    speech, mask, image = queued.frames, queued.mask, queued.patches
    identity = int(queues[0].keys.ids[chosen])
    if identity != -1:
        assert image[local].eq(-identity).all()
        assert speech[local][mask[local].bool()].eq(identity).all()
        assert mask[local].any()


def test_the_batch_is_block_zero():
    (queue,) = make(8, 2, 1)
    assert queue.global_rows(torch.arange(4)).tolist() == [0, 1, 2, 3]
    queues = make(8, 2, 2)  # rank 0 has rows 0 to 5, rank 1 rows 6 to 11
    assert queues[0].global_rows(torch.arange(12)).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def reader(state: dict[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """A state as a file gives it: tensors in slices that know their shape."""

    class Piece:
        def __init__(self, name: str) -> None:
            self.tensor = state[name].clone()

        def get_shape(self) -> list[int]:
            return list(self.tensor.shape)

        def __getitem__(self, index: slice) -> torch.Tensor:
            return self.tensor[index]

    return Piece


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1), (3, 2), (2, 6), (6, 3)])
@pytest.mark.parametrize("batches", [1, 3, 5])
def test_a_restored_queue_goes_on_as_the_one_that_was_saved(before: int, after: int, batches: int):
    pairs = 6
    saved, unbroken = make(3 * pairs, pairs // before, before), make(3 * pairs, pairs // after, after)
    fill(saved, batches)
    fill(unbroken, batches)
    restored = make(3 * pairs, pairs // after, after)
    states = [reader(queue.state(rank)) for rank, queue in enumerate(saved)]
    for rank, queue in enumerate(restored):
        queue.load(states, rank)
    fill(unbroken, 2, batches)
    fill(restored, 2, batches)
    for ours, theirs in zip(restored, unbroken, strict=True):
        for name, tensor in theirs.keys.state_dict().items():
            assert ours.keys.state_dict()[name].equal(tensor), name
        real = theirs.speech_mask.bool()
        assert ours.speech_mask.equal(theirs.speech_mask)
        assert ours.speech[real].equal(theirs.speech[real])
        assert ours.image.equal(theirs.image)
        assert ours.block == theirs.block
        assert all(mine >= needed for mine, needed in zip(ours.lengths, theirs.lengths, strict=True))
        if before == after:
            assert ours.lengths == theirs.lengths


def test_a_queue_of_another_size_is_not_taken_over():
    (saved,), (queue,) = make(12, 2, 1), make(8, 2, 1)
    with pytest.raises(ValueError, match="it does not consist of 4 micro-batches of 2 pairs"):
        queue.load([reader(saved.state(0))], 0)


def test_tokens_take_no_gradient_and_are_not_cut_by_what_follows():
    (queue,) = make(4, 2, 1)
    speech, image = encoded(torch.tensor([1, 2]), 3)
    speech.tokens.requires_grad_()
    queue.push(speech, image, torch.zeros(2, WIDTH), torch.zeros(2, WIDTH), torch.tensor([1, 2]))
    assert not queue.speech.requires_grad
    queue.push(*encoded(torch.tensor([3, 4]), 2), torch.zeros(2, WIDTH), torch.zeros(2, WIDTH), torch.tensor([3, 4]))
    assert queue.length == 3
    assert queue.tokens(3).mask.sum(1).tolist() == [2, 3, 2, 1]
