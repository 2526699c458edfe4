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

from toolkit.model.encoded import Encoded


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
        self.speech_weight = nn.Linear(speech_dim, 1)
        self.image_weight = nn.Linear(image_dim, 1)
        for linear in (self.speech_weight, self.image_weight):
            nn.init.zeros_(linear.weight)

    def forward(self, speech: Encoded, image: Encoded) -> Tensor:
        """Compare the utterance and the picture of each row.

        Args:
            speech: B utterances of L frames.
            image: B pictures of P patches.

        Returns:
            [B, 2 * D]: each frame times the patch that is most like it, then each patch times its frame, both averaged
            by the tokens' weights. The similarity is half the sum of a row.
        """
        frames, frame_weights, patches, patch_weights = self._project(speech, image)
        similarity = (frames @ patches.mT).masked_fill(~speech.mask[..., None], -1.0)  # [B, L, P]
        nearest_patch, nearest_frame = similarity.argmax(2), similarity.argmax(1)
        shown = patches.gather(1, nearest_patch[..., None].expand(-1, -1, patches.shape[2]))
        spoken = frames.gather(1, nearest_frame[..., None].expand(-1, -1, frames.shape[2]))
        by_frame = (frame_weights[:, None] @ (frames * shown))[:, 0]
        by_patch = (patch_weights[:, None] @ (patches * spoken))[:, 0]
        return torch.cat([by_frame, by_patch], dim=1)

    def all_pairs(self, speech: Encoded, image: Encoded) -> Tensor:
        """Similarities [B, C] of B utterances with C pictures."""
        frames, frame_weights, patches, patch_weights = self._project(speech, image)
        similarity = torch.einsum("btd,cpd->bctp", frames, patches)
        by_frame = (similarity.amax(3) * frame_weights[:, None]).sum(2)
        similarity = similarity.masked_fill(~speech.mask[:, None, :, None], -1.0)
        return (by_frame + (similarity.amax(2) * patch_weights).sum(2)) / 2

    def _project(self, speech: Encoded, image: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit frames [B, L, D] and their weights [B, L], unit patches [C, P, D] and their weights [C, P]."""
        lowest = torch.finfo(speech.tokens.dtype).min
        frame_weights = self.speech_weight(speech.tokens).squeeze(-1).masked_fill(~speech.mask, lowest).softmax(1)
        patch_weights = self.image_weight(image.tokens).squeeze(-1).softmax(1)
        frames, patches = (
            F.normalize(project(tokens), dim=-1)
            for project, tokens in ((self.speech, speech.tokens), (self.image, image.tokens))
        )
        return frames, frame_weights, patches, patch_weights
