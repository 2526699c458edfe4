"""Late interaction against loops over tokens."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.model.late_interaction import LateInteraction
from toolkit.objectives.matching import late_interaction_loss

LENGTHS = [7, 3, 1]


def make() -> tuple[LateInteraction, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    late = LateInteraction(5, 6, 4)
    for linear in (late.speech_weight, late.image_weight):
        torch.nn.init.normal_(linear.weight)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return late, torch.randn(3, 7, 5), mask, torch.randn(3, 9, 6)


def naive(late: LateInteraction, frames: torch.Tensor, patches: torch.Tensor) -> float:
    """The similarity of one utterance, without padding, and one picture."""
    spoken = [F.normalize(late.speech(frame), dim=0) for frame in frames]
    shown = [F.normalize(late.image(patch), dim=0) for patch in patches]
    of_frames = torch.stack([late.speech_weight(frame)[0] for frame in frames]).softmax(0)
    of_patches = torch.stack([late.image_weight(patch)[0] for patch in patches]).softmax(0)
    by_frame = sum(float(w) * max(float(f @ p) for p in shown) for w, f in zip(of_frames, spoken, strict=True))
    by_patch = sum(float(w) * max(float(f @ p) for f in spoken) for w, p in zip(of_patches, shown, strict=True))
    return (by_frame + by_patch) / 2


def test_all_pairs_and_single_pairs_equal_loops() -> None:
    late, frames, mask, patches = make()
    expected = [[naive(late, frames[b, : LENGTHS[b]], patches[c]) for c in range(3)] for b in range(3)]
    with torch.no_grad():
        assert late.all_pairs(frames, mask, patches).tolist() == [pytest.approx(row, abs=1e-5) for row in expected]
        assert late(frames, mask, patches).tolist() == pytest.approx([expected[n][n] for n in range(3)], abs=1e-5)


def test_padding_counts_nowhere() -> None:
    late, frames, mask, patches = make()
    other = torch.where(mask[..., None], frames, 1e3 * torch.randn(3, 7, 5))
    torch.testing.assert_close(late(other, mask, patches), late(frames, mask, patches))
    torch.testing.assert_close(late.all_pairs(other, mask, patches), late.all_pairs(frames, mask, patches))


def test_the_loss_is_a_symmetric_cross_entropy_even_over_one_pictures_rows() -> None:
    similarity, ids = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [4, 7, 4]
    temperature = 0.2
    for row, loss in enumerate(
        late_interaction_loss(similarity, torch.tensor(ids), torch.tensor(temperature)).tolist()
    ):
        expected = 0.0
        for scores in (similarity[row], similarity[:, row]):
            logs = (scores / temperature).log_softmax(0)
            right = [n for n in range(3) if ids[n] == ids[row]]
            expected -= sum(float(logs[n]) for n in right) / len(right) / 2
        assert loss == pytest.approx(expected)
