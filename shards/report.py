"""What make_shards did: counts, hours and durations of speech, speakers, and what was dropped, with the reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.files import atomic_write

REPORT = "report.json"
_NAMED = 20  # dropped ones shown; the file names all
_BARS, _BAR_LENGTH = 12, 40  # of the histogram: at most so many, each at most so long


@dataclass(frozen=True)
class Dropped:
    """A picture or a caption left out, and why."""

    what: str  # "picture" or "caption"
    name: str
    split: str
    reason: str
    captions: int  # lost: the caption itself, or those that went with an unreadable picture


@dataclass(frozen=True)
class RecordingWarning:
    """A stored recording that someone should listen to, and why."""

    utterance: str
    split: str
    shard: str
    sample: str  # its key
    caption: int  # of the sample, from 0
    what: str  # begins with a word for its kind, such as "clipped: "


@dataclass
class Counts:
    """What one split holds."""

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
    """The closing report of make_shards."""

    splits: dict[str, Counts] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    shards: int = 0
    bytes: int = 0
    durations: list[int] = field(default_factory=list)  # captions that last n to n + 1 seconds, by n
    kept: int = field(default=0, compare=False)  # shards that an earlier run had finished; not in the file
    gone: int = field(default=0, compare=False)  # source files that were not there at the end; not in the file
    warnings: list[RecordingWarning] = field(default_factory=list)

    def add_durations(self, durations: Sequence[float]) -> None:
        """Count captions by their whole seconds."""
        for seconds in durations:
            missing = int(seconds) + 1 - len(self.durations)
            self.durations += [0] * missing
            self.durations[int(seconds)] += 1

    def save(self, folder: Path) -> str:
        """Write `report.json` and give its sha256, which the manifest keeps."""
        stored = {name: value for name, value in asdict(self).items() if name not in ("kept", "gone")}
        if not self.warnings:
            del stored["warnings"]
        data = json.dumps(stored, indent=1, ensure_ascii=False, default=sorted).encode() + b"\n"
        with atomic_write(folder / REPORT) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def text(self) -> str:
        """A table for people, a histogram of the durations, then the dropped pictures and captions by name."""
        lines = [f"{'split':<12}{'pictures':>10}{'captions':>10}{'hours':>9}{'speakers':>10}"]
        rows = list(self.splits.items())
        if len(rows) > 1:
            rows.append(("all", self._total()))
        for name, n in rows:
            hours = f"{n.seconds / 3600:.2f}"
            lines.append(f"{name:<12}{n.pictures:>10,}{n.captions:>10,}{hours:>9}{len(n.speakers) or '-':>10}")
        kept = f", {self.kept} of them kept from an earlier run" if self.kept else ""
        lines.append(f"{self.shards} shards, {self.bytes / 1e6:,.1f} MB{kept}")
        if self.gone:
            lines.append(f"{self.gone:,} files that they were made from are gone: whether these changed was not seen")
        return "\n".join(lines + self._histogram() + self.losses() + self._to_listen_to())

    def _total(self) -> Counts:
        every = self.splits.values()
        return Counts(
            sum(n.pictures for n in every),
            sum(n.captions for n in every),
            sum(n.seconds for n in every),
            set().union(*(n.speakers for n in every)),
        )

    def _histogram(self) -> list[str]:
        """Bars of equal width in whole seconds, none empty before the first or after the last."""
        first = next((n for n, count in enumerate(self.durations) if count), 0)
        spread = len(self.durations) - first
        width = next((w for w in (1, 2, 5, 10, 30, 60, 120, 300) if spread <= w * _BARS), 3600)
        starts = range(first // width * width, len(self.durations), width)
        counts = [sum(self.durations[start : start + width]) for start in starts]
        lines = [f"{'seconds':<12}{'captions':>10}"] if counts else []
        for start, count in zip(starts, counts, strict=True):
            bar = "#" * -(-_BAR_LENGTH * count // max(1, *counts))  # rounded up, so that a single caption shows
            lines.append(f"{f'{start} to {start + width}':<12}{count:>10,}  {bar}".rstrip())
        return lines

    def losses(self) -> list[str]:
        """Lines that name the dropped pictures and captions."""
        if not self.dropped:
            return ["nothing dropped"]
        pictures = sum(one.what == "picture" for one in self.dropped)
        lines = [f"dropped: {pictures} pictures, {sum(one.captions for one in self.dropped)} captions"]
        lines += [f"  {one.split} {one.what} {one.name}: {one.reason}" for one in self.dropped[:_NAMED]]
        if len(self.dropped) > _NAMED:
            lines.append(f"  and {len(self.dropped) - _NAMED} more, named in {REPORT}")
        return lines

    def _to_listen_to(self) -> list[str]:
        if not self.warnings:
            return []
        kinds = Counter(one.what.partition(":")[0] for one in self.warnings)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines = [f"stored, but to be listened to: {len(self.warnings)} recordings ({counts})"]
        lines += [f"  {one.split} caption {one.utterance}: {one.what}" for one in self.warnings[:_NAMED]]
        if len(self.warnings) > _NAMED:
            lines.append(f"  and {len(self.warnings) - _NAMED} more, named in {REPORT}")
        return lines


def load_report(folder: Path) -> Report:
    """Read what `Report.save` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / REPORT
    try:
        stored = json.loads(path.read_bytes())
        splits = {name: Counts(**{**n, "speakers": set(n["speakers"])}) for name, n in stored["splits"].items()}
        dropped = [Dropped(**one) for one in stored["dropped"]]
        warnings = [RecordingWarning(**one) for one in stored.get("warnings", [])]
        report = Report(splits, dropped, stored["shards"], stored["bytes"], stored["durations"], warnings=warnings)
        counts = [report.shards, report.bytes, *report.durations, *(one.captions for one in dropped)]
        counts += [count for n in splits.values() for count in (n.pictures, n.captions)]
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise ValueError("a count is no whole number")
        if not all(type(n.seconds) in (int, float) and 0 <= n.seconds < 2**62 for n in splits.values()):
            raise ValueError("a number of seconds is none")
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): make the shards again") from None


@dataclass(frozen=True)
class SizeEstimate:
    """What one split will hold, as far as some of its samples tell."""

    split: str
    pictures: int
    captions: int
    shards: int
    seconds: float  # estimated, as are the bytes
    bytes: float


def outlook_text(splits: Sequence[SizeEstimate], tried: int) -> str:
    """A table of what a run would write.

    Args:
        splits: in order of writing.
        tried: samples that were encoded for the estimates.
    """
    rows = list(splits)
    if len(rows) > 1:
        rows.append(SizeEstimate("all", *(sum(getattr(one, name) for one in splits) for name in _SUMMED)))
    lines = [f"{'split':<12}{'pictures':>10}{'captions':>10}{'shards':>8}{'hours':>9}{'MB':>12}"]
    for one in rows:
        numbers = f"{one.pictures:>10,}{one.captions:>10,}{one.shards:>8,}"
        lines.append(f"{one.split:<12}{numbers}{one.seconds / 3600:>9.2f}{one.bytes / 1e6:>12,.1f}")
    return "\n".join([*lines, f"hours and MB are estimated from {tried} samples; nothing is written"])


_SUMMED = ("pictures", "captions", "shards", "seconds", "bytes")
