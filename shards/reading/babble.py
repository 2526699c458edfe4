"""Background voices for the augmentation: utterances of the training split, chosen by position alone.

They are those of the next global batch, whose shards are read shortly in any case, in the sample's own shard group, so
that a node downloads no shard for them. They are not in the sample's batch, where each is a negative of it.
"""

from dataclasses import dataclass, field

import numpy as np

from shards.errors import UserError
from shards.media.audio import decode_audio
from shards.reading.bad_samples import UnreadableSampleError
from shards.reading.order import Order, Selection
from shards.reading.reader import Reader


@dataclass
class Babble:
    """Background voices of the samples of an order."""

    reader: Reader  # the data sets that the order numbers
    order: Order  # the global batches
    max_samples: int  # longer utterances are cut
    _last: tuple[int, Selection] | None = field(default=None, repr=False)

    def voices(self, position: int, sample: int, generator: np.random.Generator, count: int) -> list[np.ndarray]:
        """Return up to `count` utterances of other pictures than `sample`, drawn for a position in the training data.

        Returns:
            Arrays of float32 [n], n > 0. An unreadable utterance is left out.

        Raises:
            UserError: A shard is missing or differs in size from the manifest.
            TransientError: The disk or network does not respond.
        """
        step, index = divmod(position, self.order.batch_size)
        size = self.order.batch_size // self.order.shard_groups
        first = index // size * size
        batch = self._batch(step + 1)
        samples, captions = (rows[first : first + size] for rows in (batch.samples, batch.captions))
        candidates = captions[samples != sample]
        chosen = generator.permutation(candidates)[:count].tolist()
        return [wave for caption in chosen if (wave := self._read(caption)) is not None]

    def _read(self, caption: int) -> np.ndarray | None:
        try:
            audio = self.reader.audio(caption)
        except UnreadableSampleError:
            return None
        try:
            return decode_audio(audio)[: self.max_samples]
        except UserError:
            return None

    def _batch(self, step: int) -> Selection:
        if self._last is None or self._last[0] != step:
            self._last = step, self.order.batch(step)
        return self._last[1]
