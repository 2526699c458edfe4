import gc

import torch

from shards.reading.shared_buffers import SharedBuffers, bytes_of

LAYOUT = [(torch.uint8, (3, 5)), (torch.float32, (2, 4))]


def fill(buffers: SharedBuffers, value: int) -> int:
    slot = buffers.take(bytes_of(LAYOUT))
    assert slot is not None
    for tensor in buffers.tensors(slot, LAYOUT):
        tensor.fill_(value)
    return slot


def test_tensors_of_a_slot_do_not_overlap():
    buffers = SharedBuffers(2, bytes_of(LAYOUT))
    images, waves = buffers.tensors(1, LAYOUT)
    images.fill_(7)
    waves.fill_(0.5)
    assert [tuple(t.shape) for t in (images, waves)] == [(3, 5), (2, 4)]
    assert (images == 7).all()
    assert (waves == 0.5).all()
    assert (buffers.memory[0] == 0).all(), "another slot was written"


def test_a_slot_is_free_when_the_last_view_of_it_is_gone():
    buffers = SharedBuffers(1, bytes_of(LAYOUT))
    slot = fill(buffers, 3)
    images, waves = buffers.lend(slot, LAYOUT)
    assert buffers.take(1) is None
    view = images[1:, 2:].transpose(0, 1)
    del images
    gc.collect()
    assert buffers.take(1) is None, "the waveforms are still in use"
    del waves
    gc.collect()
    assert buffers.take(1) is None, "a view of the pictures is still in use"
    assert (view == 3).all()
    del view
    gc.collect()
    assert buffers.take(1) == slot


def test_what_does_not_fit_gets_no_slot():
    buffers = SharedBuffers(1, bytes_of(LAYOUT))
    assert buffers.take(bytes_of(LAYOUT) + 1) is None
    assert buffers.take(bytes_of(LAYOUT)) == 0
