"""What a training step computes: the student, the three objectives and their sum, for one micro-batch.

batch -> frozen trunks (once) -> student: embeddings, tokens
                              -> teacher: keys, clean tokens          no gradient
SIC  student embeddings against the keys of all ranks and the queue
SIM  fusion of matching pairs and of hard negatives drawn by SIC's similarities
CMD  noised tokens of one modality rebuilt by attending to the other
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.reading.dataset import Batch
from toolkit.config import schema as config
from toolkit.distributed import RowExchange, gather_packed
from toolkit.model.fusion import Denoiser
from toolkit.model.outputs import Encoded, Features
from toolkit.model.retrieval import SpeechImageModel
from toolkit.objectives.contrastive import contrastive_loss
from toolkit.objectives.counter_rng import CounterRNG
from toolkit.objectives.denoising import add_noise, denoising_loss
from toolkit.objectives.matching import Negatives, draw_negatives, matching_accuracy, matching_loss
from toolkit.training.metrics.spans import spanned
from toolkit.training.momentum import MomentumEncoder
from toolkit.training.queue import EmbeddingQueue, TokenQueue


@dataclass
class ContrastiveKeys:
    """Embeddings that SIC compares with: speech and image [M, D], and the picture identities [M]."""

    speech: Tensor
    image: Tensor
    ids: Tensor


@dataclass
class Pairs:
    """What the queues take of a micro-batch: keys of all ranks, and the encoded pairs of this one."""

    keys: ContrastiveKeys
    speech: Encoded | None = None
    image: Encoded | None = None


@dataclass
class CachedGradients:
    """What SIC found on a whole accumulated batch, for one of its micro-batches (see `toolkit/training/grad_cache.py`).

    Attributes:
        loss: SIC of the whole batch, a scalar.
        by_speech: [B, D] its gradient by the micro-batch's speech embeddings, times the number of micro-batches.
        by_image: [B, D] alike.
        by_temperature: Its gradient by the temperature, a scalar.
        keys: Of the micro-batch, from all ranks.
    """

    loss: Tensor
    by_speech: Tensor
    by_image: Tensor
    by_temperature: Tensor
    keys: ContrastiveKeys

    def surrogate_loss(self, speech: Tensor, image: Tensor, temperature: Tensor) -> Tensor:
        """A scalar with the value of `loss` and these gradients."""
        term = (self.by_speech * speech).sum() + (self.by_image * image).sum() + self.by_temperature * temperature
        return self.loss + (term - term.detach())


@dataclass
class StepRandomness:
    """The random part of a micro-batch, a function of seed and step only.

    Attributes:
        negatives: [2, B] in [0, 1), for this rank's rows; the same whatever the number of ranks.
        noise: Of the denoising, by the rows' places in the global batch.
    """

    negatives: Tensor
    noise: CounterRNG


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
        self,
        batch: Batch,
        teacher: MomentumEncoder | None,
        queue: EmbeddingQueue,
        alpha: float,
        draws: StepRandomness,
        cache: CachedGradients | None = None,
        tokens: TokenQueue | None = None,
        controls: bool = False,
        coarse: bool = False,
    ) -> tuple[dict[str, Tensor], Pairs]:
        """Compute the losses of one micro-batch.

        Args:
            batch: This rank's pairs.
            teacher: Momentum encoder; without one the student supplies its own keys, with gradient.
            queue: Keys of earlier batches.
            alpha: Weight of the teacher's soft targets.
            draws: Randomness of negatives and noise.
            cache: SIC's part, where it was computed on the whole accumulated batch already.
            tokens: Pairs of earlier batches that SIM draws negatives from, too.
            controls: Also measure SIM and CMD with the tokens of another pair in place of the right ones: what does
                not get worse by that does not look at them.
            coarse: SIC alone.

        Returns:
            Scalars by name, of which `loss` is minimised and the rest are detached, and what the queues take.
        """
        features = self._frozen(batch)
        speech, image = self._encode(*features)
        denoising = self.objectives.denoising
        match, denoise = self.objectives.matching.weight and not coarse, denoising.weight and not coarse
        cleaned = teacher and (cache is None or (denoise and denoising.target == "teacher"))
        clean_speech, clean_image = _cleaned(teacher, *features) if teacher and cleaned else (speech, image)
        temperature = self.model.temperature()
        if cache:
            keys = cache.keys
            losses = {"contrastive": cache.surrogate_loss(speech.embedding, image.embedding, temperature)}
        else:
            keys = self.keys(clean_speech.embedding, clean_image.embedding, batch.ids, differentiable=teacher is None)
            own = (speech.embedding, image.embedding)
            losses = {"contrastive": self.contrast(*own, keys, queue, batch.ids, temperature, alpha)}
        if match:
            negatives = self._draw(speech, image, keys, batch.ids, temperature.detach(), draws.negatives, tokens)
            requests = self._request(negatives, speech, image, tokens)
        denoised: dict[str, Tensor] = {}
        if denoise:  # between request and fetch of the negatives: it hides the wait for them
            clean = (speech, image) if denoising.target == "own" else (clean_speech, clean_image)
            denoised = self._denoising(speech, image, *clean, batch.ids, draws.noise, controls)
        if match:
            losses |= self._matching(speech, image, negatives, requests, tokens, controls)
        losses |= denoised

        weights = {name: getattr(self.objectives, name).weight for name in ("contrastive", "matching", "denoising")}
        loss = torch.stack([weights[name] * losses[name] for name in weights if name in losses]).sum()
        values = {name: value.detach() for name, value in losses.items()}
        pairs = Pairs(keys, *((speech.detach(), image.detach()) if tokens else ()))
        return {"loss": loss, **values, "temperature": temperature.detach()}, pairs

    def embeddings(self, batch: Batch, teacher: MomentumEncoder | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings [B, D] of a micro-batch: speech, image, and the teacher's or without one the same again."""
        features = self._frozen(batch)
        speech, image = self._encode(*features)
        clean_speech, clean_image = _cleaned(teacher, *features) if teacher else (speech, image)
        return speech.embedding, image.embedding, clean_speech.embedding, clean_image.embedding

    @spanned("gather of keys")
    def keys(self, speech: Tensor, image: Tensor, ids: Tensor, differentiable: bool) -> ContrastiveKeys:
        """Gather the keys of all ranks: one collective for both modalities and the identities."""
        embeddings, numbers = gather_packed([speech, image], [ids], self.rank, self.world_size, differentiable)
        return ContrastiveKeys(*embeddings, *numbers)

    @spanned("SIC")
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
        """SIC of this rank's embeddings [B, D] against the keys of all ranks, its own among them, and the queue."""
        own = slice(self.rank * len(ids), (self.rank + 1) * len(ids))
        return contrastive_loss(
            speech,
            image,
            [keys.speech, queue.speech],
            [keys.image, queue.image],
            ids,
            torch.cat([keys.ids, queue.ids]),
            temperature,
            alpha,
            keys.speech[own].detach(),
            keys.image[own].detach(),
        )

    @spanned("frozen trunks")
    def _frozen(self, batch: Batch) -> tuple[tuple[Features, ...], Features]:
        return self.model.frozen(batch.images, batch.waveforms, batch.lengths, batch.host_lengths)

    @spanned("encoders")
    def _encode(self, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
        return self.model.encode(speech, image)

    @spanned("SIM")
    def _draw(
        self,
        speech: Encoded,
        image: Encoded,
        keys: ContrastiveKeys,
        ids: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        tokens: TokenQueue | None,
    ) -> Negatives:
        """Draw hard negatives from the batch of all ranks or of this one, and from the pairs in the queue."""
        own = slice(self.rank * len(ids), (self.rank + 1) * len(ids))
        of = slice(None) if self.objectives.matching.negatives == "global" else own
        parts = [ContrastiveKeys(keys.speech[of].detach(), keys.image[of].detach(), keys.ids[of])]
        if tokens:
            parts.append(ContrastiveKeys(tokens.keys.speech, tokens.keys.image, tokens.keys.ids))
        return draw_negatives(
            speech.embedding.detach(),
            image.embedding.detach(),
            torch.cat([part.speech for part in parts]),
            torch.cat([part.image for part in parts]),
            ids,
            torch.cat([part.ids for part in parts]),
            temperature,
            uniforms,
        )

    @spanned("SIM")
    def _request(self, negatives: Negatives, speech: Encoded, image: Encoded, tokens: TokenQueue | None) -> RowExchange:
        """Ask for the rows of the negatives: pictures first, then speech."""
        index = torch.stack([negatives.image, negatives.speech])
        lengths = [image.tokens.shape[1], speech.tokens.shape[1]]
        if tokens:
            index, lengths[1] = tokens.global_rows(index), max(lengths[1], tokens.length)
        local = self.objectives.matching.negatives == "local"
        return RowExchange(index, lengths, *((0, 1) if local else (self.rank, self.world_size)))

    @spanned("SIM")
    def _matching(
        self,
        speech: Encoded,
        image: Encoded,
        negatives: Negatives,
        requests: RowExchange,
        tokens: TokenQueue | None,
        controls: bool,
    ) -> dict[str, Tensor]:
        """Tell matching pairs from those with the negatives; as a control with the tokens of another picture."""
        wrong_image, wrong_speech = _fetch(image, requests, 0, tokens), _fetch(speech, requests, 1, tokens)
        spoken, shown = _stack(speech, speech, wrong_speech), _stack(image, wrong_image, image)
        right, other_image, other_speech = self.model.match(spoken, shown).chunk(3)
        losses = {"matching": matching_loss(right, other_image, other_speech, negatives.valid)}
        if controls and len(speech.mask) > 1:
            accuracy = matching_accuracy(right, other_image, other_speech, negatives.valid)
            with _aside(shown.mask.device):
                right, other_image, other_speech = self.model.match(spoken, shown[_neighbours(shown.mask)]).chunk(3)
            losses["matching_control"] = matching_loss(right, other_image, other_speech, negatives.valid)
            losses["matching_accuracy"] = accuracy
            losses["matching_control_accuracy"] = matching_accuracy(right, other_image, other_speech, negatives.valid)
        return losses

    @spanned("CMD")
    def _denoising(
        self,
        speech: Encoded,
        image: Encoded,
        clean_speech: Encoded,
        clean_image: Encoded,
        ids: Tensor,
        random: CounterRNG,
        controls: bool,
    ) -> dict[str, Tensor]:
        """Rebuild each noised side by attending to the other; as a control to another pair's."""
        sides = {"image": (image, speech, clean_image), "speech": (speech, image, clean_speech)}
        c = self.objectives.denoising
        rebuilt: list[Tensor] = []
        swapped: list[Tensor] = []
        for side, denoiser in self.denoisers.items():
            student, other, clean = sides[side]
            span = c.span if side == "speech" else 1  # frames change together, patches one by one
            noised = add_noise(
                student.tokens, student.mask, ids, c.noise, c.ratio, span, c.snr_db, random, c.swap_group
            )
            positions = noised.positions if c.positions == "noised" else student.mask
            truth = (clean.tokens.detach(), positions, student.mask, c.loss, c.token_temperature)
            rebuilt.append(denoising_loss(denoiser(noised.tokens, student.mask, other.tokens, other.mask), *truth))
            if controls and len(ids) > 1:
                with _aside(other.mask.device):
                    wrong = other[_neighbours(other.mask)]
                    tokens = denoiser(noised.tokens, student.mask, wrong.tokens, wrong.mask)
                    swapped.append(denoising_loss(tokens, *truth))
        losses = {"denoising": torch.stack(rebuilt).mean()}
        return losses | ({"denoising_control": torch.stack(swapped).mean()} if swapped else {})


def _denoiser(model: SpeechImageModel, side: str, layers: int) -> Denoiser:
    fusion = model.config.fusion
    widths = {"speech": model.speech.token_dim, "image": model.image.token_dim}
    other = {"speech": "image", "image": "speech"}[side]
    return Denoiser(widths[side], widths[other], fusion["width"], layers, fusion["heads"], fusion["dropout"])


@spanned("teacher")
def _cleaned(teacher: MomentumEncoder, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
    return teacher(speech, image)


def _fetch(encoded: Encoded, requests: RowExchange, batch: int, queue: TokenQueue | None) -> Encoded:
    """Fetch the rows that were asked for, of the (global) batch 0: pictures or 1: speech and of the queue behind it."""
    length = requests.longest(batch)
    missing = length - encoded.tokens.shape[1]
    tokens, mask = nn.functional.pad(encoded.tokens, (0, 0, 0, missing)), nn.functional.pad(encoded.mask, (0, missing))
    earlier = queue.tokens(length) if queue else None
    if batch == 0:
        fetched = requests.fetch(0, tokens, earlier[2] if earlier else None)
        return Encoded(encoded.embedding, fetched, mask.new_ones(fetched.shape[:2]))
    fetched = requests.fetch(1, tokens, earlier[0] if earlier else None)
    return Encoded(encoded.embedding, fetched, requests.fetch(1, mask.byte(), earlier[1] if earlier else None).bool())


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Compute without gradient, and leave the dropout of what follows as it would be."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _neighbours(mask: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ...: for each row another of its pair, whatever the number of ranks; of an odd end the first."""
    rows = torch.arange(len(mask), device=mask.device) ^ 1
    return torch.where(rows < len(mask), rows, 0)


def _stack(*parts: Encoded) -> Encoded:
    """Put batches behind one another, padded to the longest."""
    length = max(part.tokens.shape[1] for part in parts)
    tokens = [nn.functional.pad(p.tokens, (0, 0, 0, length - p.tokens.shape[1])) for p in parts]
    mask = [nn.functional.pad(p.mask, (0, length - p.mask.shape[1])) for p in parts]
    return Encoded(torch.cat([p.embedding for p in parts]), torch.cat(tokens), torch.cat(mask))
