"""The order of samples: which picture and which of its captions is number t of a run, as a pure function.

    pass e:   shards, shuffled          [ 4 0 7 | 2 6 1 | 5 3 ]         by (seed, e)
              windows of whole shards     window    window
              samples, shuffled within each window                      reads stay local, every picture once a pass
    run:      pass 0, pass 1, pass 2 ... end to end, cut into global batches of B
    rank r:   a contiguous part of each micro-batch of the global batch

Nothing here knows how many ranks or workers there are, so global batch t is the same set of samples on any cluster, and
resuming at step t is arithmetic.
"""

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest


class Order:
    """Global batches of one split."""

    def __init__(
        self,
        rows: np.ndarray,
        shard: np.ndarray,
        first_caption: np.ndarray,
        batch_size: int,
        seed: int = 0,
        window: int = 16,
    ) -> None:
        """Describe the order; nothing is shuffled yet.

        Args:
            rows: int64 [n], sample numbers of the split, the samples of a shard side by side.
            shard: int32 [n], the shard of each row.
            first_caption: int64 [S + 1], first caption row of every sample of the manifest.
            batch_size: Pairs in a global batch.
            seed: Seed of the run.
            window: Shards shuffled together.

        Raises:
            UserError: There are fewer than two batches of pictures.
        """
        if len(rows) < 2 * batch_size:
            raise UserError(
                f"a batch of {batch_size} needs at least {2 * batch_size} pictures, training has {len(rows)}: "
                f"set --training.batch_size to {max(1, len(rows) // 2)} or less"
            )
        self.rows, self.shard, self.first_caption = rows, shard, first_caption
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self._recent: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return global batch number `step`.

        Returns:
            Sample numbers, caption rows and positions in the run (from 0), each int64 [batch_size]. No sample number
            occurs twice.
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(positions, len(self.rows))
        samples = np.concatenate([self.permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return samples, self._caption(samples, epochs), positions

    def _caption(self, samples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Choose a caption of each picture; K passes in a row use each of its K captions exactly once."""
        first = self.first_caption[samples]
        count = self.first_caption[samples + 1] - first
        return first + (_scramble(samples, self.seed) + epochs) % count

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the sample numbers of a pass in their order, int64 [n]."""
        if epoch not in self._recent:
            self._recent = {e: p for e, p in self._recent.items() if e == epoch - 1}
            self._recent[epoch] = self._permutation(epoch)
        return self._recent[epoch]

    def _permutation(self, epoch: int) -> np.ndarray:
        """Order one pass so that the batch across its beginning holds no picture twice.

        The first batch of a pass may begin with the last `tail` pictures of the pass before. Those are moved behind the
        rest of that batch; only the first `batch_size` places change: the end of a pass is known without its beginning.
        """
        rows = self._shuffled(epoch)
        tail = epoch * len(self.rows) % self.batch_size
        if tail == 0:
            return rows
        held = np.isin(rows[: self.batch_size], self._shuffled(epoch - 1)[-tail:])
        order = np.argsort(held, kind="stable")
        return np.concatenate([rows[: self.batch_size][order], rows[self.batch_size :]])

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        shards, first, counts = np.unique(self.shard, return_index=True, return_counts=True)
        chosen = generator.permutation(len(shards))
        windows = []
        for start in range(0, len(chosen), self.window):
            members = [self.rows[first[s] : first[s] + counts[s]] for s in chosen[start : start + self.window]]
            windows.append(generator.permutation(np.concatenate(members)))
        return np.concatenate(windows)


def order_of(manifest: Manifest, split: str, batch_size: int, seed: int = 0, window: int = 16) -> Order:
    """Build the order of a split.

    Raises:
        UserError: The split is unknown or smaller than two batches.
    """
    rows = manifest.rows(split)
    return Order(rows, manifest.shard[rows], manifest.first_caption, batch_size, seed, window)


def part_of(batch_size: int, micro: int, micros: int, rank: int, world_size: int) -> slice:
    """Return the part of a global batch that `rank` takes in micro-batch `micro` of `micros`.

    Micro-batches are contiguous in the global batch and ranks are contiguous in a micro-batch: gathering in rank order
    restores the global order.
    """
    size = batch_size // (micros * world_size)
    start = (micro * world_size + rank) * size
    return slice(start, start + size)


def _scramble(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers (the finaliser of splitmix64), so that neighbouring pictures do not start with the same caption."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)
