"""Fail unless the quickstart's recall is well above chance: R@10 of at least 50 % and twins told apart."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
stage = report["reranked"] or report["coarse"]
figures = {
    "pictures": (report["pictures"], 500),
    "speech to image R@10": (stage["speech_to_image"]["R@10"], 50.0),
    "image to speech R@10": (stage["image_to_speech"]["R@10"], 50.0),
    "twins": (max(report["twins"]["coarse"], report["twins"]["matching"] or 0.0), 55.0),
}
missed = [f"{name}: {value} is below {least}" for name, (value, least) in figures.items() if value < least]
print("\n".join(f"{name}: {value}" for name, (value, _) in figures.items()))
sys.exit("\n".join(missed))
