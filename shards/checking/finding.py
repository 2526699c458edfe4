"""A finding of check_shards, and lists of findings with a bounded length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

MAX_NAMED = 8  # findings of one kind that are named; the rest are counted


@dataclass(frozen=True)
class Finding:
    """One problem or warning."""

    where: str  # a file of the folder, or a split
    what: str

    def __str__(self) -> str:
        """Format it as one line; characters that are not printable, as in a malicious name, are escaped."""
        line = f"{self.where}: {self.what}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def shortened(findings: Iterable[Finding], count: int) -> Iterator[Finding]:
    """Yield the first findings and, if there are more, one with their number.

    Args:
        findings: Findings of one kind; only those that are shown are consumed.
        count: Number of findings.
    """
    yield from islice(findings, MAX_NAMED)
    if count > MAX_NAMED:
        yield Finding("all splits", f"and {count - MAX_NAMED:,} more like these")
