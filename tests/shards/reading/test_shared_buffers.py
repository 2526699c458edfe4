import gc

import torch

from shards.reading.shared_buffers import SharedBuffers, bytes_of

WANTED = [(torch.uint8, (3, 5)), (torch.float32, (2, 4))]


def fill(slots: SharedBuffers, value: int) -> int:
    slot = slots.take(bytes_of(WANTED))
    assert slot is not None
    for tensor in slots.tensors(slot, WANTED):
        tensor.fill_(value)
    return slot


def test_tensors_of_a_slot_do_not_overlap():
    slots = SharedBuffers(2, bytes_of(WANTED))
    images, waves = slots.tensors(1, WANTED)
    images.fill_(7)
    waves.fill_(0.5)
    assert [tuple(t.shape) for t in (images, waves)] == [(3, 5), (2, 4)]
    assert (images == 7).all()
    assert (waves == 0.5).all()
    assert (slots.memory[0] == 0).all(), "another slot was written"


def test_a_slot_is_free_when_the_last_view_of_it_is_gone():
    slots = SharedBuffers(1, bytes_of(WANTED))
    slot = fill(slots, 3)
    images, waves = slots.lend(slot, WANTED)
    assert slots.take(1) is None
    view = images[1:, 2:].transpose(0, 1)
    del images
    gc.collect()
    assert slots.take(1) is None, "the waveforms are still in use"
    del waves
    gc.collect()
    assert slots.take(1) is None, "a view of the pictures is still in use"
    assert (view == 3).all()
    del view
    gc.collect()
    assert slots.take(1) == slot


def test_what_does_not_fit_gets_no_slot():
    slots = SharedBuffers(1, bytes_of(WANTED))
    assert slots.take(bytes_of(WANTED) + 1) is None
    assert slots.take(bytes_of(WANTED)) == 0
