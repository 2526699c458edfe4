"""Fail unless the quickstart retrieves unseen scenes: mean R@1 of 40 % (chance 0.2 %), twins of 90 % (chance 50 %)."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
figures = {
    "pictures": (report["pictures"], 500),
    "mean R@1, coarse": (report["coarse"]["mean_R@1"], 40.0),
    "mean R@1, re-ranked": (report["reranked"]["mean_R@1"], report["coarse"]["mean_R@1"]),
    "right of two twins, coarse": (report["twins"]["coarse"], 90.0),
    "right of two twins, matching": (report["twins"]["matching"], 90.0),
}
missed = [f"{name}: {value} is below {least}" for name, (value, least) in figures.items() if value < least]
print("\n".join(f"{name}: {value}" for name, (value, _) in figures.items()))
sys.exit("\n".join(missed) or 0)
