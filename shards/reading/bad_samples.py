"""Samples that cannot be read: counted, named in a few lines, and too many of them end the run."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from shards.errors import UserError

FIRST = 5  # faults that are reported at once; later ones at most every `PAUSE` seconds
PAUSE = 30.0


class UnreadableSampleError(UserError):
    """One sample cannot be read; its shard is as it should be."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or decoded, and was replaced by another.

    Attributes:
        sample: Its key.
        shard: Path or URL of its shard.
        reason: One line.
        step: Global batch that it was to be in.
        row: Its row in the rank's micro-batch.
    """

    sample: str
    shard: str
    reason: str
    step: int
    row: int

    def __str__(self) -> str:
        return f"sample {self.sample} of {self.shard} at step {self.step}: {self.reason}"


def distinct(bad_samples: Iterable[BadSample]) -> set[tuple[str, str]]:
    """The samples that some faults are of, by shard and key."""
    return {(bad_sample.shard, bad_sample.sample) for bad_sample in bad_samples}


class BadSampleCounter:
    """Count the faults of one stream; a sample that is met in every pass is one bad sample."""

    def __init__(
        self,
        most: int,
        most_in_a_row: int,
        report: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin at none.

        Args:
            most: Bad samples that are borne.
            most_in_a_row: Faults that are borne without a picture between them that was read at the first attempt.
            report: Takes a line for the user.
            clock: Seconds.
        """
        self.most, self.most_in_a_row, self.report, self.clock = most, most_in_a_row, report, clock
        self.total = self.in_a_row = 0
        self.samples: set[tuple[str, str]] = set()  # one more than `most`, at most
        self._quiet_until = 0.0

    def add(self, bad_samples: Sequence[BadSample], rows: int) -> None:
        """Count the faults of a micro-batch of `rows` rows, in their order.

        Raises:
            UserError: There are too many.
        """
        before = -1
        for row, of_row in groupby(bad_samples, key=lambda bad_sample: bad_sample.row):
            if row > before + 1:
                self.in_a_row = 0  # there were good ones between
            before = row
            for bad_sample in of_row:
                self._count(bad_sample)
        if before < rows - 1:
            self.in_a_row = 0

    def _count(self, bad_sample: BadSample) -> None:
        self.total += 1
        self.in_a_row += 1
        self.samples |= distinct([bad_sample])
        now = self.clock()
        if self.total <= FIRST or now >= self._quiet_until:
            self._quiet_until = now + PAUSE
            count = f" ({self.total} times so far, bad samples: {len(self.samples)})" if self.total > 1 else ""
            self.report(f"replaced unreadable {bad_sample}{count}")
        if self.in_a_row > self.most_in_a_row:
            raise _too_many(bad_sample, f"{self.in_a_row} in a row", "max_bad_samples_in_a_row")
        if len(self.samples) > self.most:
            raise _too_many(bad_sample, f"{len(self.samples)} in all", "max_bad_samples")


def _too_many(bad_sample: BadSample, how_many: str, limit: str) -> UserError:
    return UserError(
        f"too many samples, {how_many}, could not be read; the last was {bad_sample}; look at the shards with "
        f"python toolkit/check_shards.py --decode all, make them again, or raise --data.{limit}"
    )
