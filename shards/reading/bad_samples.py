"""Samples that cannot be read: counted, named in a few lines, and too many of them end the run."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from shards.errors import UserError

FIRST = 5  # faults that are reported at once; later ones at most every `PAUSE` seconds
PAUSE = 30.0


class BadSample(UserError):
    """One sample cannot be read; its shard is as it should be."""


@dataclass(frozen=True)
class Fault:
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


def distinct(faults: Iterable[Fault]) -> set[tuple[str, str]]:
    """The samples that some faults are of, by shard and key."""
    return {(fault.shard, fault.sample) for fault in faults}


class FaultCounter:
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

    def add(self, faults: Sequence[Fault], rows: int) -> None:
        """Count the faults of a micro-batch of `rows` rows, in their order.

        Raises:
            UserError: There are too many.
        """
        before = -1
        for row, of_row in groupby(faults, key=lambda fault: fault.row):
            if row > before + 1:
                self.in_a_row = 0  # there were good ones between
            before = row
            for fault in of_row:
                self._count(fault)
        if before < rows - 1:
            self.in_a_row = 0

    def _count(self, fault: Fault) -> None:
        self.total += 1
        self.in_a_row += 1
        self.samples |= distinct([fault])
        now = self.clock()
        if self.total <= FIRST or now >= self._quiet_until:
            self._quiet_until = now + PAUSE
            count = f" ({self.total} times so far, bad samples: {len(self.samples)})" if self.total > 1 else ""
            self.report(f"replaced unreadable {fault}{count}")
        if self.in_a_row > self.most_in_a_row:
            raise _too_many(fault, f"{self.in_a_row} in a row", "max_faults_in_a_row")
        if len(self.samples) > self.most:
            raise _too_many(fault, f"{len(self.samples)} in all", "max_faults")


def _too_many(fault: Fault, how_many: str, limit: str) -> UserError:
    return UserError(
        f"too many samples, {how_many}, could not be read; the last was {fault}; look at the shards with "
        f"python toolkit/check_shards.py --decode all, make them again, or raise --data.{limit}"
    )
