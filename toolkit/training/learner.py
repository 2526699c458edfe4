"""The computation of a training step: the student, the three objectives and their sum, for one micro-batch.

batch -> frozen trunks (once) -> student: embeddings, tokens
                              -> teacher: keys, clean tokens          no gradient
SIC  student embeddings against the keys of all ranks and the queue
SIM  fusion of matching pairs and of hard negatives drawn by SIC's similarities
CMD  noised tokens of one modality reconstructed by attending to the other
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.reading.dataset import Batch
from toolkit.config import schema as config
from toolkit.distributed import gather_packed
from toolkit.model.fusion import Denoiser
from toolkit.model.outputs import Encoded, concatenate
from toolkit.model.retrieval import SpeechImageModel
from toolkit.objectives.contrastive import contrastive_loss
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import add_noise, denoising_loss
from toolkit.objectives.matching import matching_accuracy, matching_loss
from toolkit.training.hard_negatives import HardNegatives
from toolkit.training.metrics.spans import span
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import ContrastiveKeys, EmbeddingQueue, TokenQueue
from toolkit.training.step_randomness import StepRandomness


@dataclass
class QueueEntries:
    """What a micro-batch adds to the queues.

    Attributes:
        keys: Keys of all ranks' pairs.
        speech: This rank's utterances, for SIM's queue; None: there is none.
        image: Their pictures.
    """

    keys: ContrastiveKeys
    speech: Encoded | None = None
    image: Encoded | None = None


@dataclass
class CachedGradients:
    """SIC over an accumulated batch, for one of its micro-batches (see `toolkit/training/grad_cache.py`).

    Attributes:
        loss: SIC of the accumulated batch, a scalar.
        speech_grad: [B, D] gradient with respect to the micro-batch's speech embeddings, times the number of
            micro-batches.
        image_grad: [B, D] gradient with respect to its image embeddings, scaled in the same way.
        temperature_grad: Gradient with respect to the temperature, a scalar.
        keys: Keys of the micro-batch, from all ranks.
    """

    loss: Tensor
    speech_grad: Tensor
    image_grad: Tensor
    temperature_grad: Tensor
    keys: ContrastiveKeys

    def surrogate_loss(self, speech: Tensor, image: Tensor, temperature: Tensor) -> Tensor:
        """Return a scalar with the value of `loss` and these gradients."""
        term = (self.speech_grad * speech).sum() + (self.image_grad * image).sum() + self.temperature_grad * temperature
        return self.loss + (term - term.detach())


class Learner(nn.Module):
    """The student model and the denoisers; `forward` returns a micro-batch's losses.

    The denoisers are used in training only, and are not exported.
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
        self,
        batch: Batch,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        alpha: float,
        randomness: StepRandomness,
        cached: CachedGradients | None = None,
        token_queue: TokenQueue | None = None,
        measure_controls: bool = False,
        coarse: bool = False,
    ) -> tuple[dict[str, Tensor], QueueEntries]:
        """Compute the losses of one micro-batch.

        Args:
            batch: This rank's pairs.
            teacher: Momentum encoder; without one the student supplies its own keys, with gradient.
            queue: Keys of earlier batches.
            alpha: Weight of the teacher's soft targets.
            randomness: Random numbers of negatives and noise.
            cached: Gradients of SIC, where it was computed over the accumulated batch.
            token_queue: Pairs of earlier batches, further candidates for SIM's negatives.
            measure_controls: Also compute SIM and CMD with the tokens of another pair in place of the right ones; if
                a loss does not increase, the objective ignores those tokens.
            coarse: Compute SIC alone.

        Returns:
            Scalars by name, of which `loss` is minimized and the rest are detached, and what is pushed to the queues.
        """
        matching, denoising = self.objectives.matching, self.objectives.denoising
        use_matching, use_denoising = matching.weight and not coarse, denoising.weight and not coarse
        needs_teacher = cached is None or (use_denoising and denoising.target == "teacher")  # see `encode`
        speech, image, teacher_speech, teacher_image = self.encode(batch, teacher if needs_teacher else None)
        temperature = self.model.temperature()

        if cached:
            keys = cached.keys
            losses = {"contrastive": cached.surrogate_loss(speech.embedding, image.embedding, temperature)}
        else:
            key_embeddings = teacher_speech.embedding, teacher_image.embedding
            keys = self.gather_keys(*key_embeddings, batch.ids, differentiable=teacher is None)
            embeddings = speech.embedding, image.embedding
            losses = {"contrastive": self.contrast(*embeddings, keys, queue, batch.ids, temperature, alpha)}

        if use_matching:
            uniforms = randomness.negatives
            negatives = self.request_negatives(speech, image, keys, batch.ids, temperature, uniforms, token_queue)
        if use_denoising:  # between request and fetch of the negatives: it hides the wait for them
            clean = (speech, image) if denoising.target == "own" else (teacher_speech, teacher_image)
            denoising_losses = self.denoise(speech, image, *clean, batch.ids, randomness.noise, measure_controls)
        if use_matching:
            losses |= self.match(speech, image, negatives, measure_controls)
        if use_denoising:
            losses |= denoising_losses

        weights = {name: getattr(self.objectives, name).weight for name in ("contrastive", "matching", "denoising")}
        loss = torch.stack([weights[name] * losses[name] for name in weights if name in losses]).sum()
        scalars = {name: value.detach() for name, value in losses.items()}
        entries = QueueEntries(keys, speech.detach(), image.detach()) if token_queue else QueueEntries(keys)
        return {"loss": loss, **scalars, "temperature": temperature.detach()}, entries

    def encode(self, batch: Batch, teacher: MomentumEncoder | None) -> tuple[Encoded, Encoded, Encoded, Encoded]:
        """Encode a micro-batch: speech and image of the student, and of the teacher; without one the student's again.

        Both read the same features of the frozen trunks, which are computed once. Keys and clean tokens are the
        teacher's or, without a momentum encoder and in a coarse step, the student's, the keys with gradient. Cached SIC
        brings its keys along, so that the teacher is run for CMD's target alone. `config/validate.py` refuses the
        target "teacher" without a momentum encoder.
        """
        with span("frozen trunks"):
            features = self.model.frozen_features(batch.images, batch.waveforms, batch.lengths, batch.host_lengths)
        with span("encoders"):
            student = self.model.encode(*features)
        if teacher is None:
            return (*student, *student)
        with span("teacher"):
            return (*student, *teacher(*features))

    @span("gather keys")
    def gather_keys(self, speech: Tensor, image: Tensor, ids: Tensor, differentiable: bool) -> ContrastiveKeys:
        """Gather the keys of all ranks: one collective for both modalities and the identities."""
        embeddings, integers = gather_packed([speech, image], [ids], self.rank, self.world_size, differentiable)
        return ContrastiveKeys(*embeddings, *integers)

    def request_negatives(
        self,
        speech: Encoded,
        image: Encoded,
        keys: ContrastiveKeys,
        ids: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        token_queue: TokenQueue | None,
    ) -> HardNegatives:
        """Draw SIM's negatives from all ranks' pairs or this rank's, and request their tokens."""
        local = self.objectives.matching.negatives == "local"
        candidates = keys[self._own_rows(ids)] if local else keys
        ranks = (0, 1) if local else (self.rank, self.world_size)
        return HardNegatives(speech, image, candidates, ids, temperature, uniforms, token_queue, *ranks)

    @span("SIC")
    def contrast(
        self,
        speech: Tensor,
        image: Tensor,
        keys: ContrastiveKeys,
        queue: EmbeddingQueue,
        ids: Tensor,
        temperature: Tensor,
        alpha: float,
    ) -> Tensor:
        """Compute SIC of this rank's embeddings [B, D] against the queue and the keys of all ranks."""
        own = keys[self._own_rows(ids)].detach()
        return contrastive_loss(
            speech,
            image,
            [keys.speech, queue.speech],
            [keys.image, queue.image],
            ids,
            torch.cat([keys.ids, queue.ids]),
            temperature,
            alpha,
            own.speech,
            own.image,
        )

    @span("SIM")
    def match(
        self, speech: Encoded, image: Encoded, negatives: HardNegatives, measure_controls: bool
    ) -> dict[str, Tensor]:
        """Compute SIM: classify matching pairs and hard negatives; as a control, with another pair's patches."""
        negative_speech, negative_image = negatives.fetch()
        # Row by row: matching pairs, each utterance with a negative picture, each picture with a negative utterance.
        utterances = concatenate([speech, speech, negative_speech])
        pictures = concatenate([image, negative_image, image])
        logits = self._match_logits(utterances, pictures)
        losses = {"matching": matching_loss(*logits, negatives.valid)}
        if measure_controls and len(speech.mask) > 1:
            with _no_side_effects(pictures.mask.device):
                control = self._match_logits(utterances, pictures[_neighbors(pictures.mask)])
            losses["matching_control"] = matching_loss(*control, negatives.valid)
            losses["matching_accuracy"] = matching_accuracy(*logits, negatives.valid)
            losses["matching_control_accuracy"] = matching_accuracy(*control, negatives.valid)
        return losses

    def _match_logits(self, speech: Encoded, image: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, 2] of matching pairs, of pairs with a negative picture, and of pairs with a negative utterance."""
        positive, negative_image, negative_speech = self.model.match(speech, image).chunk(3)
        return positive, negative_image, negative_speech

    @span("CMD")
    def denoise(
        self,
        speech: Encoded,
        image: Encoded,
        clean_speech: Encoded,
        clean_image: Encoded,
        ids: Tensor,
        random: CounterRNG,
        measure_controls: bool,
    ) -> dict[str, Tensor]:
        """Compute CMD: reconstruct each noised side by attending to the other; as a control, to another pair's."""
        sides = {"image": (image, speech, clean_image), "speech": (speech, image, clean_speech)}
        c = self.objectives.denoising
        losses: list[Tensor] = []
        control_losses: list[Tensor] = []
        for side, denoiser in self.denoisers.items():
            student, other, clean = sides[side]
            noise_span = c.span if side == "speech" else 1  # frames change together, patches one by one
            noised = add_noise(
                student.tokens, student.mask, ids, c.noise, c.ratio, noise_span, c.snr_db, random, c.swap_group
            )
            positions = noised.positions if c.positions == "noised" else student.mask
            target = (clean.tokens.detach(), positions, student.mask, c.loss, c.token_temperature)
            losses.append(denoising_loss(denoiser(noised.tokens, student.mask, other.tokens, other.mask), *target))
            if measure_controls and len(ids) > 1:
                with _no_side_effects(other.mask.device):
                    control = other[_neighbors(other.mask)]
                    tokens = denoiser(noised.tokens, student.mask, control.tokens, control.mask)
                    control_losses.append(denoising_loss(tokens, *target))
        means = {"denoising": torch.stack(losses).mean()}
        return means | ({"denoising_control": torch.stack(control_losses).mean()} if control_losses else {})

    def _own_rows(self, ids: Tensor) -> slice:
        """Rows of this rank's batch in the batch of all ranks."""
        return slice(self.rank * len(ids), (self.rank + 1) * len(ids))


def _denoiser(model: SpeechImageModel, side: str, layers: int) -> Denoiser:
    fusion = model.config.fusion
    widths = {"speech": model.speech.token_dim, "image": model.image.token_dim}
    other = {"speech": "image", "image": "speech"}[side]
    return Denoiser(widths[side], widths[other], fusion["width"], layers, fusion["heads"], fusion["dropout"])


@contextlib.contextmanager
def _no_side_effects(device: torch.device) -> Iterator[None]:
    """Compute without gradient, and leave the random generators as they are."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _neighbors(mask: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ...: another row for each, whatever the world size; for an odd last row the first."""
    rows = torch.arange(len(mask), device=mask.device) ^ 1
    return torch.where(rows < len(mask), rows, 0)
