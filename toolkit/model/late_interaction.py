r"""Late interaction: a similarity of token sequences, frames against patches.

With the real frames :math:`s_f` and patches :math:`v_p` of a pair, projected to unit length in one space, and weights
:math:`a_f, b_p` that sum to 1 over a sequence:

.. math::
    S(s, v) = \frac{1}{2} \Big[ \sum_f a_f \max_p s_f \cdot v_p + \sum_p b_p \max_f s_f \cdot v_p \Big]

Source: the largest similarity of each token is ColBERT's (arXiv 2004.12832) and, in both directions between text and
patches, FILIP's (arXiv 2111.07783, equation 4); that a token's weight is learned is DRL's (arXiv 2203.07111).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LateInteraction(nn.Module):
    """Token-level similarity of utterances and pictures.

    Args:
        speech_dim: Size of a frame.
        image_dim: Size of a patch.
        embed_dim: D, size of the space in which they are compared.
    """

    def __init__(self, speech_dim: int, image_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.speech = nn.Linear(speech_dim, embed_dim)
        self.image = nn.Linear(image_dim, embed_dim)
        self.speech_weight = nn.Linear(speech_dim, 1, bias=False)
        self.image_weight = nn.Linear(image_dim, 1, bias=False)
        self.scale = nn.Parameter(torch.tensor([10.0]))  # of the similarity in a match logit
        for linear in (self.speech_weight, self.image_weight):
            nn.init.zeros_(linear.weight)

    def forward(self, frames: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """Compare the utterance and the picture of each row.

        Args:
            frames: [B, L, Hs].
            mask: bool [B, L], True on real frames.
            patches: [B, P, Hi].

        Returns:
            Similarities [B], in [-1, 1].
        """
        frames, frame_weights, patches, patch_weights = self._project(frames, mask, patches)
        similarity = frames @ patches.mT  # [B, L, P]
        by_frame = (similarity.amax(2) * frame_weights).sum(1)
        by_patch = (similarity.masked_fill(~mask[..., None], -1.0).amax(1) * patch_weights).sum(1)
        return (by_frame + by_patch) / 2

    def all_pairs(self, frames: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """Similarities [B, C] of B utterances with C pictures: frames [B, L, Hs], their mask, patches [C, P, Hi]."""
        frames, frame_weights, patches, patch_weights = self._project(frames, mask, patches)
        similarity = torch.einsum("btd,cpd->bctp", frames, patches)
        by_frame = (similarity.amax(3) * frame_weights[:, None]).sum(2)
        similarity = similarity.masked_fill(~mask[:, None, :, None], -1.0)
        return (by_frame + (similarity.amax(2) * patch_weights).sum(2)) / 2

    def _project(self, frames: Tensor, mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit frames [B, L, D] and their weights [B, L], unit patches [C, P, D] and their weights [C, P]."""
        lowest = torch.finfo(frames.dtype).min
        frame_weights = self.speech_weight(frames).squeeze(-1).masked_fill(~mask, lowest).softmax(1)
        patch_weights = self.image_weight(patches).squeeze(-1).softmax(1)
        frames, patches = F.normalize(self.speech(frames), dim=-1), F.normalize(self.image(patches), dim=-1)
        return frames, frame_weights, patches, patch_weights
