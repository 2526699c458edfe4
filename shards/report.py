"""The report of make_shards: counts, hours and durations of speech, speakers, and dropped input with the reasons."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.files import atomic_write

REPORT = "report.json"
_MAX_NAMED = 20  # dropped pictures and captions shown; the file has all
_MAX_BARS, _BAR_LENGTH = 12, 40  # bars of the histogram, and characters of the longest


@dataclass(frozen=True)
class Dropped:
    """A dropped picture or caption, and the reason."""

    what: str  # "picture" or "caption"
    name: str
    split: str
    reason: str
    captions: int  # number dropped: the caption itself, or all captions of the picture


@dataclass(frozen=True)
class AudioWarning:
    """A stored audio file that should be checked by ear, and the reason."""

    utterance: str
    split: str
    shard: str
    sample: str  # key
    caption: int  # number in the sample, from 0
    what: str  # begins with its kind, such as "clipped: "


@dataclass
class SplitCounts:
    """Contents of one split."""

    pictures: int = 0
    captions: int = 0
    seconds: float = 0.0
    speakers: set[str] = field(default_factory=set)

    def add(self, durations: Sequence[float], speakers: Sequence[str | None]) -> None:
        """Count one picture with its captions."""
        self.pictures += 1
        self.captions += len(durations)
        self.seconds += sum(durations)
        self.speakers.update(name for name in speakers if name is not None)


@dataclass
class Report:
    """The report at the end of make_shards."""

    splits: dict[str, SplitCounts] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    shards: int = 0
    bytes: int = 0
    durations: list[int] = field(default_factory=list)  # number of captions of n to n + 1 seconds, by n
    kept: int = field(default=0, compare=False)  # shards of an earlier run; not in the file
    missing_sources: int = field(default=0, compare=False)  # source files missing at the end; not in the file
    warnings: list[AudioWarning] = field(default_factory=list)

    def add_durations(self, durations: Sequence[float]) -> None:
        """Count captions by duration, rounded down to seconds."""
        for seconds in durations:
            missing = int(seconds) + 1 - len(self.durations)
            self.durations += [0] * missing
            self.durations[int(seconds)] += 1

    def save(self, folder: Path) -> str:
        """Write `report.json` and return its SHA-256, which is stored in the manifest."""
        stored = {name: value for name, value in asdict(self).items() if name not in ("kept", "missing_sources")}
        if not self.warnings:
            del stored["warnings"]
        data = json.dumps(stored, indent=1, ensure_ascii=False, default=sorted).encode() + b"\n"
        with atomic_write(folder / REPORT) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def text(self) -> str:
        """Format a table, a histogram of the durations, and the dropped pictures and captions by name."""
        lines = [f"{'split':<12}{'pictures':>10}{'captions':>10}{'hours':>9}{'speakers':>10}"]
        rows = list(self.splits.items())
        if len(rows) > 1:
            rows.append(("all", self._total()))
        for name, n in rows:
            hours = f"{n.seconds / 3600:.2f}"
            lines.append(f"{name:<12}{n.pictures:>10,}{n.captions:>10,}{hours:>9}{len(n.speakers) or '-':>10}")
        kept = f", {self.kept} of them kept from an earlier run" if self.kept else ""
        lines.append(f"{self.shards} shards, {self.bytes / 1e6:,.1f} MB{kept}")
        if self.missing_sources:
            lines.append(f"{self.missing_sources:,} source files are missing now: whether these changed is unknown")
        return "\n".join(lines + self._histogram() + self.dropped_lines() + self._warning_lines())

    def _total(self) -> SplitCounts:
        splits = self.splits.values()
        return SplitCounts(
            sum(n.pictures for n in splits),
            sum(n.captions for n in splits),
            sum(n.seconds for n in splits),
            set().union(*(n.speakers for n in splits)),
        )

    def _histogram(self) -> list[str]:
        """Return bars of equal width in seconds, from the first to the last that is not empty."""
        first = next((n for n, count in enumerate(self.durations) if count), 0)
        seconds_range = len(self.durations) - first
        width = next((w for w in (1, 2, 5, 10, 30, 60, 120, 300) if seconds_range <= w * _MAX_BARS), 3600)
        starts = range(first // width * width, len(self.durations), width)
        counts = [sum(self.durations[start : start + width]) for start in starts]
        lines = [f"{'seconds':<12}{'captions':>10}"] if counts else []
        for start, count in zip(starts, counts, strict=True):
            bar = "#" * -(-_BAR_LENGTH * count // max(1, *counts))  # rounded up, so that a single caption shows
            lines.append(f"{f'{start} to {start + width}':<12}{count:>10,}  {bar}".rstrip())
        return lines

    def dropped_lines(self) -> list[str]:
        """Return lines that name the dropped pictures and captions."""
        if not self.dropped:
            return ["nothing dropped"]
        pictures = sum(one.what == "picture" for one in self.dropped)
        lines = [f"dropped: {pictures} pictures, {sum(one.captions for one in self.dropped)} captions"]
        lines += [f"  {one.split} {one.what} {one.name}: {one.reason}" for one in self.dropped[:_MAX_NAMED]]
        if len(self.dropped) > _MAX_NAMED:
            lines.append(f"  and {len(self.dropped) - _MAX_NAMED} more, listed in {REPORT}")
        return lines

    def _warning_lines(self) -> list[str]:
        if not self.warnings:
            return []
        kinds = Counter(one.what.partition(":")[0] for one in self.warnings)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines = [f"stored, but should be checked by ear: {len(self.warnings)} audio files ({counts})"]
        lines += [f"  {one.split} caption {one.utterance}: {one.what}" for one in self.warnings[:_MAX_NAMED]]
        if len(self.warnings) > _MAX_NAMED:
            lines.append(f"  and {len(self.warnings) - _MAX_NAMED} more, listed in {REPORT}")
        return lines


def load_report(folder: Path) -> Report:
    """Read `report.json`.

    Raises:
        UserError: It is missing or damaged.
    """
    path = folder / REPORT
    try:
        stored = json.loads(path.read_bytes())
        splits = {name: SplitCounts(**{**n, "speakers": set(n["speakers"])}) for name, n in stored["splits"].items()}
        dropped = [Dropped(**one) for one in stored["dropped"]]
        warnings = [AudioWarning(**one) for one in stored.get("warnings", [])]
        report = Report(splits, dropped, stored["shards"], stored["bytes"], stored["durations"], warnings=warnings)
        counts = [report.shards, report.bytes, *report.durations, *(one.captions for one in dropped)]
        counts += [count for n in splits.values() for count in (n.pictures, n.captions)]
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise ValueError("counts must be integers of at least 0")
        if not all(type(n.seconds) in (int, float) and 0 <= n.seconds < 2**62 for n in splits.values()):
            raise ValueError("seconds must be numbers of at least 0")
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): make the shards again") from None


@dataclass(frozen=True)
class SizeEstimate:
    """Estimated contents of one split."""

    split: str
    pictures: int
    captions: int
    shards: int
    seconds: float  # estimated
    bytes: float  # estimated


def size_table(splits: Sequence[SizeEstimate], encoded: int) -> str:
    """Format the estimates, from a number of encoded samples, as a table."""
    rows = list(splits)
    if len(rows) > 1:
        rows.append(SizeEstimate("all", *(sum(getattr(one, name) for one in splits) for name in _SUMMED)))
    lines = [f"{'split':<12}{'pictures':>10}{'captions':>10}{'shards':>8}{'hours':>9}{'MB':>12}"]
    for one in rows:
        numbers = f"{one.pictures:>10,}{one.captions:>10,}{one.shards:>8,}"
        lines.append(f"{one.split:<12}{numbers}{one.seconds / 3600:>9.2f}{one.bytes / 1e6:>12,.1f}")
    return "\n".join([*lines, f"hours and MB are estimated from {encoded} samples; nothing is written"])


_SUMMED = ("pictures", "captions", "shards", "seconds", "bytes")
