"""Published results, which stand beside those of a run where the test data are the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.yaml_files import read_yaml
from toolkit.reporting.figures import CUTOFFS, DIRECTION_LABELS


@dataclass(frozen=True)
class Published:
    """A published result.

    Attributes:
        name: Name of the method and its publication.
        source: Where its figures stand.
        protocol: How it was measured.
        recall: {"speech_to_image": {"R@1", "R@5", "R@10"}, "image_to_speech": the same, "mean_R@1"} in percent, None
            for what is not published.
    """

    name: str
    source: str
    protocol: str
    recall: dict[str, Any]


def published_results(corpus: str, split: str, pictures: Any) -> list[Published]:
    """Return the published results on a test set; empty if there are none, or if it has another number of images."""
    found = []
    for test_set in read_yaml(Path(__file__).with_name("published.yaml"))["results"]:
        if (test_set["data"], test_set["split"], test_set["pictures"]) == (corpus, split, pictures):
            for name, figures in test_set["methods"].items():
                found.append(Published(name, test_set["source"], test_set["protocol"], _recall(figures)))
    return found


def _recall(figures: list[list[float | None]]) -> dict[str, Any]:
    recall: dict[str, Any] = {
        way: dict(zip(CUTOFFS, values, strict=True)) for way, values in zip(DIRECTION_LABELS, figures, strict=True)
    }
    first = [values[0] for values in figures if values[0] is not None]
    return recall | {"mean_R@1": sum(first) / 2 if len(first) == 2 else None}
