"""What make_shards did: counts a split, hours of speech, speakers, and everything that was dropped, with the reason."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.manifest import atomic

REPORT = "report.json"
_NAMED = 20  # dropped ones shown; the file names all


@dataclass(frozen=True)
class Dropped:
    """A picture or a caption left out, and why."""

    what: str  # "picture" or "caption"
    name: str
    split: str
    reason: str
    captions: int  # lost: the caption itself, or those that went with an unreadable picture


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

    def save(self, folder: Path) -> None:
        """Write `report.json`."""
        with atomic(folder / REPORT) as file:
            file.write(json.dumps(asdict(self), indent=1, ensure_ascii=False, default=sorted).encode() + b"\n")

    def text(self) -> str:
        """A table for people, then the dropped pictures and captions by name."""
        lines = [f"{'split':<12}{'pictures':>10}{'captions':>10}{'hours':>9}{'speakers':>10}"]
        rows = list(self.splits.items())
        if len(rows) > 1:
            rows.append(("all", self._total()))
        for name, n in rows:
            hours = f"{n.seconds / 3600:.2f}"
            lines.append(f"{name:<12}{n.pictures:>10,}{n.captions:>10,}{hours:>9}{len(n.speakers) or '-':>10}")
        lines.append(f"{self.shards} shards, {self.bytes / 1e6:,.1f} MB")
        return "\n".join(lines + self._losses())

    def _total(self) -> Counts:
        every = self.splits.values()
        return Counts(
            sum(n.pictures for n in every),
            sum(n.captions for n in every),
            sum(n.seconds for n in every),
            set().union(*(n.speakers for n in every)),
        )

    def _losses(self) -> list[str]:
        if not self.dropped:
            return ["nothing dropped"]
        pictures = sum(one.what == "picture" for one in self.dropped)
        lines = [f"dropped: {pictures} pictures, {sum(one.captions for one in self.dropped)} captions"]
        lines += [f"  {one.split} {one.what} {one.name}: {one.reason}" for one in self.dropped[:_NAMED]]
        if len(self.dropped) > _NAMED:
            lines.append(f"  and {len(self.dropped) - _NAMED} more, named in {REPORT}")
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
        return Report(splits, [Dropped(**one) for one in stored["dropped"]], stored["shards"], stored["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): make the shards again") from None
