"""One line of what the doctor found, and lists of such lines that stay short."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

NAMED = 8  # findings of one kind that are named; the rest are counted


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    where: str  # a file of the folder, or a split
    what: str

    def __str__(self) -> str:
        """Show it in one line, whatever bytes a hostile name is made of."""
        line = f"{self.where}: {self.what}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def shortened(findings: Iterable[Finding], count: int) -> Iterator[Finding]:
    """Yield the first findings and say how many more there are.

    Args:
        findings: Findings of one kind, taken only as far as they are shown: it may make them one by one.
        count: How many there are.
    """
    yield from islice(findings, NAMED)
    if count > NAMED:
        yield Finding("all splits", f"and {count - NAMED:,} more like these")
