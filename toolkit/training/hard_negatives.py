"""Hard negatives of SIM: drawn by SIC's similarities, their tokens fetched from the ranks that encoded them."""

import torch
from torch import Tensor

from toolkit.distributed import RowExchange
from toolkit.model.outputs import Encoded, pad
from toolkit.objectives.matching import draw_negatives
from toolkit.training.metrics.spans import span
from toolkit.training.queue import ContrastiveKeys, TokenQueue

_IMAGE, _SPEECH = 0, 1  # the two batches of the row exchange


class HardNegatives:
    """A negative picture for each utterance and a negative utterance for each picture of a micro-batch.

    The constructor draws and requests them, in a collective that every rank starts; `fetch` waits for their tokens:
    what is computed between the two hides the wait. With `local` negatives, keys, rank and world size are those of this
    rank alone.

    Attributes:
        valid: bool [2, B], False where there was no candidate; first of pictures, then of utterances.
    """

    @span("SIM")
    def __init__(
        self,
        speech: Encoded,
        image: Encoded,
        keys: ContrastiveKeys,
        ids: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        token_queue: TokenQueue | None,
        rank: int,
        world_size: int,
    ) -> None:
        """Draw negatives among the keys of a batch and the pairs of the queue, and request their rows.

        Args:
            speech: This rank's B utterances.
            image: Their pictures.
            keys: Candidates of the batch, of all ranks.
            ids: int64 [B], identities of the pictures.
            temperature: Scalar.
            uniforms: [2, B] in [0, 1), random numbers to draw by.
            token_queue: Earlier pairs that are candidates, too.
            rank: This process.
            world_size: Number of processes.
        """
        self._speech, self._image, self._token_queue = speech, image, token_queue
        candidates = [keys.detach(), *([token_queue.keys] if token_queue else ())]
        drawn = draw_negatives(
            speech.embedding.detach(),
            image.embedding.detach(),
            torch.cat([each.speech for each in candidates]),
            torch.cat([each.image for each in candidates]),
            ids,
            torch.cat([each.ids for each in candidates]),
            temperature.detach(),
            uniforms,
        )
        self.valid = drawn.valid
        index = torch.stack([drawn.image, drawn.speech])
        lengths = [image.tokens.shape[1], speech.tokens.shape[1]]
        if token_queue:
            index, lengths[_SPEECH] = token_queue.global_rows(index), max(lengths[_SPEECH], token_queue.length)
        self._exchange = RowExchange(index, lengths, rank, world_size)

    def fetch(self) -> tuple[Encoded, Encoded]:
        """Fetch the utterances and pictures; their embeddings are not fetched, and are those of the batch.

        Returns:
            Negative utterances and pictures, B each, padded to the longest utterance of all ranks and the queue.
        """
        length = self._exchange.longest(_SPEECH)  # of pictures all ranks have equally many patches
        queued = self._token_queue.tokens(length) if self._token_queue else None
        patches = self._exchange.fetch(_IMAGE, self._image.tokens, queued.patches if queued else None)
        image = Encoded(self._image.embedding, patches, self._image.mask.new_ones(patches.shape[:2]))
        frames = self._exchange.fetch(_SPEECH, pad(self._speech.tokens, length), queued.frames if queued else None)
        mask = pad(self._speech.mask, length).byte()
        mask = self._exchange.fetch(_SPEECH, mask, queued.mask if queued else None).bool()
        return Encoded(self._speech.embedding, frames, mask), image
