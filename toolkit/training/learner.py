"""What a training step computes: the student, the three objectives and their sum, for one micro-batch.

batch -> frozen trunks (once) -> student: vectors, tokens
                              -> teacher: keys, clean tokens          no gradient
SIC  student vectors against the keys of all ranks and the queue
SIM  fusion of matching pairs and of hard negatives drawn by SIC's similarities
CMD  noised tokens of one modality rebuilt by attending to the other
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.stream import Batch
from toolkit import config
from toolkit.distributed import all_gather, fetch_rows, gather_with_grad, pad_to_common_length
from toolkit.model.encoded import Encoded
from toolkit.model.fusion import Denoiser
from toolkit.model.retrieval import SpeechImageModel
from toolkit.objectives.contrastive import contrastive_loss
from toolkit.objectives.denoising import add_noise, denoising_loss
from toolkit.objectives.matching import draw_negatives, matching_loss
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue


@dataclass
class Keys:
    """Vectors that SIC compares with: speech and image [M, D], and the picture identities [M]."""

    speech: Tensor
    image: Tensor
    ids: Tensor


@dataclass
class Draws:
    """The random part of a micro-batch, a function of seed and step only.

    Attributes:
        negatives: [2, B] in [0, 1), for this rank's rows; the same whatever the number of ranks.
        noise: Generator of the denoising noise.
    """

    negatives: Tensor
    noise: torch.Generator


class Learner(nn.Module):
    """The student and the denoisers; `forward` gives a micro-batch's losses.

    The model is what is kept after training; the denoisers are left behind.
    """

    def __init__(self, model: SpeechImageModel, objectives: config.Objectives, rank: int, world_size: int) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.rank, self.world_size = rank, world_size
        self.denoisers = nn.ModuleDict()
        if objectives.denoising.weight:
            sides = ["image", "speech"] if objectives.denoising.side == "both" else [objectives.denoising.side]
            self.denoisers.update({side: _denoiser(model, side, objectives.denoising.layers) for side in sides})

    def forward(
        self, batch: Batch, teacher: MomentumEncoder | None, queue: EmbeddingQueue, alpha: float, draws: Draws
    ) -> tuple[dict[str, Tensor], Keys]:
        """Compute the losses of one micro-batch.

        Args:
            batch: This rank's pairs.
            teacher: Momentum encoder; without one the student supplies its own keys, with gradient.
            queue: Keys of earlier batches.
            alpha: Weight of the teacher's soft targets.
            draws: Randomness of negatives and noise.

        Returns:
            Scalars by name, of which `loss` is minimised and the rest are detached, and the micro-batch's keys of all
            ranks for the queue.
        """
        speech_features, image_features = self.model.frozen(batch.images, batch.waveforms, batch.lengths)
        speech, image = self.model.encode(speech_features, image_features)
        clean_speech, clean_image = teacher(speech_features, image_features) if teacher else (speech, image)
        keys = self._keys(clean_speech.vector, clean_image.vector, batch.ids, differentiable=teacher is None)
        temperature = self.model.temperature()

        losses = {"contrastive": self._contrastive(speech, image, keys, queue, batch.ids, temperature, alpha)}
        if self.objectives.matching.weight:
            losses["matching"] = self._matching(speech, image, keys, batch.ids, temperature.detach(), draws.negatives)
        if self.objectives.denoising.weight:
            clean = (speech, image) if self.objectives.denoising.target == "own" else (clean_speech, clean_image)
            losses |= self._denoising(speech, image, *clean, batch.ids, draws.noise)

        weights = {name: getattr(self.objectives, name).weight for name in ("contrastive", "matching", "denoising")}
        loss = torch.stack([weights[name] * losses[name] for name in weights if name in losses]).sum()
        values = {name: value.detach() for name, value in losses.items()}
        return {"loss": loss, **values, "temperature": temperature.detach()}, keys

    def _keys(self, speech: Tensor, image: Tensor, ids: Tensor, differentiable: bool) -> Keys:
        """Gather the keys of all ranks: one collective for both modalities and the identities."""
        if differentiable:
            vectors = gather_with_grad(torch.cat([speech, image], dim=1), self.rank, self.world_size)
            speech, image = vectors.chunk(2, dim=1)
            return Keys(speech, image, all_gather(ids, self.world_size))
        # The identities travel as the bits of two float32: nothing is computed with them on the way.
        packed = torch.cat([speech.float(), image.float(), ids.view(-1, 1).view(torch.float32)], dim=1)
        packed = all_gather(packed, self.world_size)
        width = speech.shape[1]
        all_ids = packed[:, 2 * width :].contiguous().view(torch.int64).view(-1)
        return Keys(packed[:, :width], packed[:, width : 2 * width], all_ids)

    def _contrastive(
        self,
        speech: Encoded,
        image: Encoded,
        keys: Keys,
        queue: EmbeddingQueue,
        ids: Tensor,
        temperature: Tensor,
        alpha: float,
    ) -> Tensor:
        own = slice(self.rank * len(ids), (self.rank + 1) * len(ids))
        return contrastive_loss(
            speech.vector,
            image.vector,
            torch.cat([keys.speech, queue.speech]),
            torch.cat([keys.image, queue.image]),
            ids,
            torch.cat([keys.ids, queue.ids]),
            temperature,
            alpha,
            keys.speech[own].detach(),
            keys.image[own].detach(),
        )

    def _matching(
        self, speech: Encoded, image: Encoded, keys: Keys, ids: Tensor, temperature: Tensor, uniforms: Tensor
    ) -> Tensor:
        world = self.world_size if self.objectives.matching.negatives == "global" else 1
        rank = self.rank if world > 1 else 0
        own = slice(None) if world > 1 else slice(self.rank * len(ids), (self.rank + 1) * len(ids))
        negatives = draw_negatives(
            speech.vector.detach(),
            image.vector.detach(),
            keys.speech[own].detach(),
            keys.image[own].detach(),
            ids,
            keys.ids[own],
            temperature,
            uniforms,
        )
        wrong_image = _fetch(image, negatives.image, rank, world)
        wrong_speech = _fetch(speech, negatives.speech, rank, world)
        logits = self.model.match(_stack(speech, speech, wrong_speech), _stack(image, wrong_image, image))
        right, other_image, other_speech = logits.chunk(3)
        return matching_loss(right, other_image, other_speech, negatives.valid)

    def _denoising(
        self,
        speech: Encoded,
        image: Encoded,
        clean_speech: Encoded,
        clean_image: Encoded,
        ids: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Rebuild each noised side with the other's help, and without it to show what the help is worth."""
        sides = {"image": (image, speech, clean_image), "speech": (speech, image, clean_speech)}
        c = self.objectives.denoising
        helped: list[Tensor] = []
        alone: list[Tensor] = []
        for side, denoiser in self.denoisers.items():
            student, other, clean = sides[side]
            span = c.span if side == "speech" else 1  # frames change together, patches one by one
            noised = add_noise(student.tokens, student.mask, ids, c.noise, c.ratio, span, c.snr_db, generator)
            positions = noised.positions if c.positions == "noised" else student.mask
            truth = (clean.tokens.detach(), positions, student.mask, c.loss, c.token_temperature)
            helped.append(denoising_loss(denoiser(noised.tokens, student.mask, other.tokens, other.mask), *truth))
            with torch.no_grad():
                alone.append(denoising_loss(denoiser(noised.tokens, student.mask, None), *truth))
        return {"denoising": torch.stack(helped).mean(), "denoising_withheld": torch.stack(alone).mean()}


def _denoiser(model: SpeechImageModel, side: str, layers: int) -> Denoiser:
    fusion = model.config.fusion
    widths = {"speech": model.speech.token_dim, "image": model.image.token_dim}
    other = {"speech": "image", "image": "speech"}[side]
    return Denoiser(widths[side], widths[other], fusion["width"], layers, fusion["heads"], fusion["dropout"])


def _fetch(encoded: Encoded, index: Tensor, rank: int, world_size: int) -> Encoded:
    """Take rows of the (global) batch by index."""
    tokens, mask = pad_to_common_length(encoded.tokens, encoded.mask, world_size)
    return Encoded(
        fetch_rows(encoded.vector, index, rank, world_size),
        fetch_rows(tokens, index, rank, world_size),
        fetch_rows(mask, index, rank, world_size),
    )


def _stack(*parts: Encoded) -> Encoded:
    """Put batches behind one another, padded to the longest."""
    length = max(part.tokens.shape[1] for part in parts)
    tokens = [nn.functional.pad(p.tokens, (0, 0, 0, length - p.tokens.shape[1])) for p in parts]
    mask = [nn.functional.pad(p.mask, (0, length - p.mask.shape[1])) for p in parts]
    return Encoded(torch.cat([p.vector for p in parts]), torch.cat(tokens), torch.cat(mask))
