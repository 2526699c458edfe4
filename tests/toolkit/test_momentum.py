"""The momentum encoder: an exact average, under bf16 too, that shares what is frozen."""

import copy

import pytest
import torch

from tests.tiny import tiny_model
from toolkit.model.build import build_model
from toolkit.training.momentum import MomentumEncoder

CPU = torch.device("cpu")


def wander(student: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every trained weight a little, as an optimizer would."""
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))


def test_the_average_is_exact_under_bf16_where_a_bf16_average_is_not() -> None:
    torch.manual_seed(0)
    student = build_model(tiny_model())
    teacher = MomentumEncoder(student, decay=0.995)
    student.bfloat16()
    teacher.to(CPU, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    exact = [a.double() for a in teacher.average]
    naive = [a.bfloat16() for a in teacher.average]
    for _ in range(200):
        wander(student, generator)
        teacher.update()
        for reference, low, weight in zip(exact, naive, teacher.student, strict=True):
            reference.mul_(0.995).add_(weight.detach().double(), alpha=0.005)
            low.mul_(0.995).add_(weight.detach(), alpha=0.005)
    scale = torch.cat([e.flatten() for e in exact]).norm()
    error = torch.cat([(a - e).flatten() for a, e in zip(teacher.average, exact, strict=True)]).norm() / scale
    failing = torch.cat([(n - e).flatten() for n, e in zip(naive, exact, strict=True)]).norm() / scale
    assert error < 1e-5
    assert failing > 1e-2, "a bf16 average would have done: this test shows nothing"
    for working, average in zip(teacher.working, teacher.average, strict=True):
        assert working.dtype == torch.bfloat16
        torch.testing.assert_close(working.data, average.bfloat16())


def test_in_float32_the_average_is_what_encodes() -> None:
    torch.manual_seed(0)
    student = build_model(tiny_model())
    teacher = MomentumEncoder(student, decay=0.5).to(CPU, torch.float32)
    images, waves, lengths = (
        torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        torch.randn(2, 9000),
        torch.tensor([9000, 8000]),
    )
    before = teacher(*student.frozen(images, waves, lengths))[0].vector
    wander(student, torch.Generator().manual_seed(0))
    teacher.update()
    after = teacher(*student.frozen(images, waves, lengths))[0].vector
    assert not torch.allclose(before, after), "an update did not reach the forward pass"
    assert not after.requires_grad


def test_frozen_weights_are_shared_and_not_averaged() -> None:
    model = tiny_model()
    model.speech.train, model.image.train = "1", "none"
    student = build_model(model)
    teacher = MomentumEncoder(student, decay=0.9).to(CPU, torch.float32)
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    held = {p.data_ptr() for p in teacher.encoder.parameters()}
    assert frozen <= held, "the teacher has its own copy of frozen weights"
    assert not frozen & {a.data_ptr() for a in teacher.average}
    assert all(name.startswith(("speech.", "image.")) for name in teacher.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_round(dtype: torch.dtype) -> None:
    student = build_model(tiny_model())
    teacher = MomentumEncoder(student, decay=0.9).to(CPU, dtype)
    wander(student, torch.Generator().manual_seed(0))
    teacher.update()
    state = copy.deepcopy(teacher.state_dict())
    other = MomentumEncoder(build_model(tiny_model()), decay=0.9).to(CPU, dtype)
    other.load_state_dict(state)
    for a, b, w, v in zip(teacher.average, other.average, teacher.working, other.working, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(w.data, v.data, rtol=0, atol=0)
