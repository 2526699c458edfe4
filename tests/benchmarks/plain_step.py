"""A training step as in ALBEF's code (arXiv 2107.07651), with this project's modules: the baseline of `step.py`.

Single rank. Student and teacher are complete models, trunks included, and share no computation.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.reading.dataset import Batch
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.outputs import Encoded
from toolkit.objectives.denoising import add_noise, denoising_loss
from toolkit.objectives.matching import draw_negatives
from toolkit.training.learner import Learner
from toolkit.training.queue import EmbeddingQueue
from toolkit.training.step_randomness import StepRandomness


class PlainStep:
    """Model, teacher, queue and optimizer of the plain implementation, initialized from a learner."""

    def __init__(self, learner: Learner, queue: EmbeddingQueue, configuration: config.Config) -> None:
        """Copy the learner, which may already belong to a DeepSpeed engine, and the queue, which is full."""
        self.c, training = configuration.objectives, configuration.training
        self.decay, self.clip = self.c.momentum.decay, training.grad_clip
        self.learner = Learner(build_model(configuration.model, self.c.contrastive), self.c, 0, 1)
        self.learner.load_state_dict(learner.state_dict())
        self.model, self.denoiser = self.learner.model.train(), self.learner.denoisers["image"]
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        self.groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(self.groups, lr=training.lr, betas=tuple(training.betas))
        self.speech_queue, self.image_queue = queue.speech.T.clone(), queue.image.T.clone()
        self.queue_ids, self.pointer = queue.ids[None].clone(), 0

    def step(self, batch: Batch, randomness: StepRandomness, row_by_row: bool = False) -> dict[str, Tensor]:
        """Run one step and return its losses; draw negatives row by row, or with the trainer's random numbers."""
        speech, image = self.model(batch.images, batch.waveforms, batch.lengths)
        temperature = self.model.temperature()
        with torch.no_grad():
            self.update_teacher()
            speech_m, image_m = self.teacher(batch.images, batch.waveforms, batch.lengths)
        losses = {"contrastive": self.contrastive(speech, image, speech_m, image_m, batch.ids, temperature)}
        with torch.no_grad():
            own = (speech.embedding, image.embedding, speech_m.embedding, image_m.embedding, batch.ids, temperature)
            rows = draw_row_by_row(*own) if row_by_row else draw_with_uniforms(*own, randomness.negatives)
        losses["matching"] = self.matching(speech, image, *rows)
        losses["denoising"] = self.denoising(speech, image, image_m, batch.ids, randomness)
        loss = sum(getattr(self.c, name).weight * value for name, value in losses.items())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.groups for p in group["params"]], self.clip)
        self.optimizer.step()
        self.push(speech_m.embedding, image_m.embedding, batch.ids)
        return {name: value.detach() for name, value in losses.items()}

    def contrastive(
        self, speech: Encoded, image: Encoded, speech_m: Encoded, image_m: Encoded, ids: Tensor, temperature: Tensor
    ) -> Tensor:
        """Compute SIC with full logits of batch and queue: four matrices."""
        alpha = self.c.contrastive.alpha
        with torch.no_grad():
            speech_keys = torch.cat([speech_m.embedding.T, self.speech_queue], dim=1)
            image_keys = torch.cat([image_m.embedding.T, self.image_queue], dim=1)
            positive = torch.eq(ids[:, None], torch.cat([ids[None], self.queue_ids], dim=1)).float()
            targets = positive / positive.sum(1, keepdim=True)
            soft_s2i = F.softmax(speech_m.embedding @ image_keys / temperature, dim=1)
            soft_i2s = F.softmax(image_m.embedding @ speech_keys / temperature, dim=1)
            targets_s2i = alpha * soft_s2i + (1 - alpha) * targets
            targets_i2s = alpha * soft_i2s + (1 - alpha) * targets
        s2i = speech.embedding @ image_keys / temperature
        i2s = image.embedding @ speech_keys / temperature
        loss_s2i = -torch.sum(F.log_softmax(s2i, dim=1) * targets_s2i, dim=1).mean()
        loss_i2s = -torch.sum(F.log_softmax(i2s, dim=1) * targets_i2s, dim=1).mean()
        return (loss_s2i + loss_i2s) / 2

    def matching(
        self, speech: Encoded, image: Encoded, negative_images: list[int], negative_speech: list[int]
    ) -> Tensor:
        """Compute SIM: fusion of the positive pairs, then of both kinds of negative pairs."""
        positive_logits = self.model.match(speech, image)
        images = torch.stack([image.tokens[row] for row in negative_images])
        image_embeddings = torch.stack([image.embedding[row] for row in negative_images])
        tokens = torch.stack([speech.tokens[row] for row in negative_speech])
        masks = torch.stack([speech.mask[row] for row in negative_speech])
        speech_embeddings = torch.stack([speech.embedding[row] for row in negative_speech])
        speech_all = Encoded(
            torch.cat([speech.embedding, speech_embeddings]),
            torch.cat([speech.tokens, tokens]),
            torch.cat([speech.mask, masks]),
        )
        image_all = Encoded(
            torch.cat([image_embeddings, image.embedding]),
            torch.cat([images, image.tokens]),
            torch.cat([image.mask, image.mask]),
        )
        logits = torch.cat([positive_logits, self.model.match(speech_all, image_all)])
        rows = len(positive_logits)
        labels = torch.cat([torch.ones(rows, dtype=torch.long), torch.zeros(2 * rows, dtype=torch.long)])
        return F.cross_entropy(logits, labels)

    def denoising(
        self, speech: Encoded, image: Encoded, image_m: Encoded, ids: Tensor, randomness: StepRandomness
    ) -> Tensor:
        """Compute CMD on the image tokens."""
        c = self.c.denoising
        noised = add_noise(image.tokens, image.mask, ids, c.noise, c.ratio, 1, c.snr_db, randomness.noise, c.swap_group)
        reconstructed = self.denoiser(noised.tokens, image.mask, speech.tokens, speech.mask)
        return denoising_loss(reconstructed, image_m.tokens, noised.positions, image.mask, c.loss, c.token_temperature)

    def update_teacher(self) -> None:
        """Update the moving average one parameter at a time, including frozen parameters."""
        for param, param_m in zip(self.model.parameters(), self.teacher.parameters(), strict=True):
            param_m.data = param_m.data * self.decay + param.data * (1.0 - self.decay)

    def push(self, speech: Tensor, image: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest keys; the queue size must be a multiple of the batch size."""
        end = self.pointer + len(ids)
        self.speech_queue[:, self.pointer : end] = speech.T
        self.image_queue[:, self.pointer : end] = image.T
        self.queue_ids[:, self.pointer : end] = ids
        self.pointer = end % self.queue_ids.shape[1]


def draw_row_by_row(
    speech: Tensor, image: Tensor, speech_m: Tensor, image_m: Tensor, ids: Tensor, temperature: Tensor
) -> tuple[list[int], list[int]]:
    """Draw for each row a negative image and a negative caption from the softmax over the batch, one row at a time."""
    same = torch.eq(ids[:, None], ids[None])
    weights_s2i = F.softmax(speech @ image_m.T / temperature, dim=1).masked_fill(same, 0)
    weights_i2s = F.softmax(image @ speech_m.T / temperature, dim=1).masked_fill(same, 0)
    negative_images = [int(torch.multinomial(weights_s2i[row], 1).item()) for row in range(len(ids))]
    negative_speech = [int(torch.multinomial(weights_i2s[row], 1).item()) for row in range(len(ids))]
    return negative_images, negative_speech


def draw_with_uniforms(
    speech: Tensor,
    image: Tensor,
    speech_m: Tensor,
    image_m: Tensor,
    ids: Tensor,
    temperature: Tensor,
    uniforms: Tensor,
) -> tuple[list[int], list[int]]:
    """Draw negatives as `draw_row_by_row` does, with the trainer's random numbers, so that losses can be compared."""
    drawn = draw_negatives(speech, image, speech_m, image_m, ids, ids, temperature, uniforms)
    return drawn.image.tolist(), drawn.speech.tolist()
