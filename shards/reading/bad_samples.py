"""Samples that cannot be read: counted, logged at a bounded rate, and an error beyond a limit."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from shards.errors import UserError

logger = logging.getLogger(__name__)

ALWAYS_LOGGED = 5  # replacements that are logged at once; later ones at most every `LOG_INTERVAL` seconds
LOG_INTERVAL = 30.0


class UnreadableSampleError(UserError):
    """One sample cannot be read; the rest of its shard can."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or decoded, and was replaced by another."""

    sample: str  # key of the sample
    shard: str  # path or URL of its shard
    reason: str  # one line
    step: int  # global batch that it belonged to
    row: int  # its row in the rank's micro-batch

    def __str__(self) -> str:
        return f"sample {self.sample} of {self.shard} at step {self.step}: {self.reason}"


def distinct(bad_samples: Iterable[BadSample]) -> set[tuple[str, str]]:
    """Return the distinct bad samples as (shard, key)."""
    return {(bad_sample.shard, bad_sample.sample) for bad_sample in bad_samples}


class BadSampleCounter:
    """Count the bad samples of one loader; a sample that is bad in every epoch counts once."""

    def __init__(self, max_bad_samples: int, max_in_a_row: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at zero.

        Args:
            max_bad_samples: Largest number of distinct bad samples.
            max_in_a_row: Largest number of replacements in a row, without a sample between them that was read at the
                first attempt.
            clock: Returns the time in seconds.
        """
        self.max_bad_samples, self.max_in_a_row, self.clock = max_bad_samples, max_in_a_row, clock
        self.total = self.in_a_row = 0
        self.samples: set[tuple[str, str]] = set()  # at most `max_bad_samples` + 1
        self._next_log = 0.0

    def add(self, bad_samples: Sequence[BadSample], rows: int) -> None:
        """Count the bad samples of a micro-batch of `rows` rows, in their order.

        Raises:
            UserError: A limit is exceeded.
        """
        previous = -1
        for row, of_row in groupby(bad_samples, key=lambda bad_sample: bad_sample.row):
            if row > previous + 1:
                self.in_a_row = 0  # the rows between were good
            previous = row
            for bad_sample in of_row:
                self._count(bad_sample)
        if previous < rows - 1:
            self.in_a_row = 0

    def _count(self, bad_sample: BadSample) -> None:
        self.total += 1
        self.in_a_row += 1
        self.samples |= distinct([bad_sample])
        now = self.clock()
        if self.total <= ALWAYS_LOGGED or now >= self._next_log:
            self._next_log = now + LOG_INTERVAL
            count = f" ({self.total} times so far, bad samples: {len(self.samples)})" if self.total > 1 else ""
            logger.warning("replaced unreadable %s%s", bad_sample, count)
        if self.in_a_row > self.max_in_a_row:
            raise _too_many_error(bad_sample, f"{self.in_a_row} in a row", "max_bad_samples_in_a_row")
        if len(self.samples) > self.max_bad_samples:
            raise _too_many_error(bad_sample, f"{len(self.samples)} in all", "max_bad_samples")


def _too_many_error(bad_sample: BadSample, how_many: str, limit: str) -> UserError:
    return UserError(
        f"too many samples, {how_many}, could not be read; the last was {bad_sample}; look at the shards with "
        f"python toolkit/check_shards.py --decode all, make them again, or raise --data.{limit}"
    )
