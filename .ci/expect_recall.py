"""Fail unless the quickstart retrieves over 500 unseen scenes: R@10 of 50 % (chance 2 %), twins of 60 % (50 %)."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
figures = {
    "pictures": (report["pictures"], 500),
    "speech to image R@10": (report["coarse"]["speech_to_image"]["R@10"], 50.0),
    "image to speech R@10": (report["coarse"]["image_to_speech"]["R@10"], 50.0),
    "right of two twins, coarse": (report["twins"]["coarse"], 60.0),
    "right of two twins, matching": (report["twins"]["matching"], 60.0),
}
missed = [f"{name}: {value} is below {least}" for name, (value, least) in figures.items() if value < least]
print("\n".join(f"{name}: {value}" for name, (value, _) in figures.items()))
sys.exit("\n".join(missed) or 0)
